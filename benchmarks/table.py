"""The JSON files of ``benchmarks/results`` as one markdown table.

python -m benchmarks.table [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEAD = """\
| benchmark | what | median | quartiles | n | goal | device, cores, date |
|---|---|---|---|---|---|---|"""


def rows(record: dict[str, Any]) -> list[str]:
    """A row for each result of one benchmark."""
    versions = record["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch") if name in versions)
    where = f"{record['device']}, {record['cores']} cores, {shown}, {record['date']}"
    out = []
    for item in record["results"]:
        goal = f"{item['goal']} {'met' if item['met'] else '**missed**'}" if "goal" in item else "–"
        low, high = number(item["q1"]), number(item["q3"])
        middle = f"{number(item['median'])} {item['unit']}"
        cells = (record["benchmark"], item["name"], middle, f"{low}–{high}", str(item["n"]), goal, where)
        out.append(f"| {' | '.join(cells)} |")
    for name, why in record["skipped"].items():
        out.append(f"| {record['benchmark']} | {name} | not measured: {why} | – | – | – | {where} |")
    return out


def number(value: float) -> str:
    """Three figures at least, no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> None:
    """Read every benchmark's file in the folder, oldest name first."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = [line for record in records if "benchmark" in record for line in rows(record)]
    print("\n".join([HEAD, *lines]) if lines else f"no results in {folder}")


if __name__ == "__main__":
    main()
