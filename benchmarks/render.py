"""``docs/performance.md``, made from the JSON files of ``benchmarks/results`` and from nothing else.

python -m benchmarks.render [--check]

With ``--check`` nothing is written, and the exit code is 1 where the page is not what would be written.
Needs no package.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"

HEAD = """\
# Performance

Written by `python -m benchmarks.render` from `benchmarks/results/*.json`: change it by measuring again, with
the command of a section. The docstring of each file in `benchmarks/` says what it compares and how.

- A ratio is taken round by round, with both sides interleaved in one process (A B B A), and is the median
  over the `n` rounds, with quartiles. Of speeds, above 1 means that the side named first is faster.
- `huge pages enabled` (older records: `asked for`): the process ran with
  `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, so PyTorch's sides and the loops written by hand had them, too.
  Where nothing is said of them there were none.
- `load` is the machine's load average before the benchmark. Well above 0, others were using it: their work is
  part of the spread, and of the median where they used the cores that a side needed.
- Figures hold for the device and versions of their section. Without a section that names a GPU, nothing was
  measured on one.
"""


def page(folder: Path = RESULTS) -> str:
    """The page, from the files in ``folder`` in the order of their names."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return "\n".join([HEAD, *(line for name, record in records.items() for line in section(name, record))])


def section(name: str, record: Mapping[str, Any]) -> Iterator[str]:
    """One file: its command and device, a row for each result, what was skipped, and the other figures."""
    yield f"## {name}\n"
    yield f"`{record['command']}`\n"
    yield f"{where(record)}.\n"
    if "results" in record:
        yield "| What | median | quartiles | n | goal |"
        yield "|---|---:|---:|---:|---|"
        yield from (result(each) for each in record["results"])
    elif "cases" in record:
        yield from table(record["cases"])
    yield ""
    for what, why in record.get("skipped", {}).items():
        yield f"- Not measured: {what}: {why}."
    if record.get("skipped"):
        yield ""
    if figures := list(flat(record.get("figures", {}))):
        yield "<details><summary>Other figures</summary>\n"
        yield "| Figure | value |"
        yield "|---|---:|"
        yield from (f"| {cell(what)} | {cell(value)} |" for what, value in figures)
        yield "\n</details>\n"


def where(record: Mapping[str, Any]) -> str:
    """Date, device, versions and load, as far as the record has them."""
    versions = record.get("versions", {})
    words = [record.get("date"), record.get("device")]
    words += [f"{record['cores']} cores"] if "cores" in record else []
    words += [f"{name} {version}" for name, version in versions.items()]
    words += [f"huge pages {record['huge_pages']}"] if "huge_pages" in record else []
    words += [f"load {record['load_before']:.1f}"] if "load_before" in record else []
    words += [str(record["note"])] if "note" in record else []
    return ", ".join(word for word in words if word)


def result(found: Mapping[str, Any]) -> str:
    """A row of a table."""
    goal = f"{found['goal']}: {'met' if found['met'] else '**missed**'}" if "goal" in found else "–"
    middle = f"{number(found['median'])} {found['unit']}"
    spread = f"{number(found['q1'])} – {number(found['q3'])}"
    return f"| {cell(found['name'])} | {middle} | {spread} | {found['n']} | {goal} |"


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Rows that have the same plain values."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list | dict)]
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    for row in rows:
        yield f"| {' | '.join(cell(row.get(name)) for name in names)} |"


def flat(figures: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every plain value with the names that lead to it; lists are left to the JSON."""
    for name, value in figures.items():
        path = (*before, str(name))
        if isinstance(value, dict):
            yield from flat(value, path)
        elif not isinstance(value, list):
            yield ": ".join(path), value


def cell(value: Any) -> str:
    """As text that stays within its cell."""
    text = number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return text.strip().replace("|", "\\|").replace("\n", " ")


def number(value: float) -> str:
    """Three figures at least.

    >>> number(12345.6), number(0.98765), number(3), number(2.3e-7)
    ('12,346', '0.988', '3', '2.3e-07')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> None:
    """Write the page, or look whether it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where the page is another")
    args, made = parser.parse_args(), page()
    if not args.check:
        PAGE.write_text(made)
    elif not PAGE.exists() or PAGE.read_text() != made:
        sys.exit(f"{PAGE.relative_to(ROOT)} is not what the results say: python -m benchmarks.render")


if __name__ == "__main__":
    main()
