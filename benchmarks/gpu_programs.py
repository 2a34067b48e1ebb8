"""Every shipped experiment compiled for a GPU that need not be here, on one device and three meshes of eight.

A row is what ``python -m jaxtrain plan --for CARD --json`` says of the train step: launches, traffic,
temporaries, attention, collectives and their overlap. Nothing is run, so nothing is a time. The table is
written after every row, and rows that it has are left out: the command can be interrupted and repeated. Large
models take minutes each. ``scripts/test --nightly tests/plan/test_gpu_goldens.py`` compiles every row again
and compares it with the table.

  python -m benchmarks.gpu_programs [--card h100] [--experiment NAME ...] [--again | --markdown]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_programs"
MESHES = ("", "data=8", "data=2,fsdp=4", "data=4,model=2")
HALF = ("shakespeare_gpt",)
"""Experiments that are also compiled in bfloat16; their files have another precision."""
MARGIN = 1.03
"""More launches and temporaries than this part of the recorded ones are a difference; fewer are none."""


def names() -> list[str]:
    """Return the shipped experiments."""
    return sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))


def cases(chosen: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the key of each row and the arguments of its command."""
    for name in chosen:
        for mesh in MESHES:
            for precision in ("", "bfloat16") if name in HALF else ("",):
                flags = ("--mesh", mesh, "--devices", "8") if mesh else ("--devices", "1")
                flags += ("--set", f"precision={precision}") if precision else ()
                yield " ".join(filter(None, (name, mesh, precision))), ("--experiment", name, *flags)


def compile_one(arguments: Sequence[str], card: str) -> dict[str, Any]:
    """Run ``plan`` in a process of its own; returns the row."""
    command = [sys.executable, "-m", "jaxtrain", "plan", *arguments, "--for", card, "--json"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    about = {"command": " ".join(["python", *command[1:]]), "seconds": round(time.perf_counter() - began, 1)}
    about["date"] = datetime.date.today().isoformat()
    if done.returncode:
        return about | {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return about | row(json.loads(done.stdout))


def row(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the table keeps of a plan's JSON."""
    gpu = plan["gpu"]
    kernels: dict[str, int] = {}
    for one in gpu["kernels"]:
        kernels[one["kind"]] = kernels.get(one["kind"], 0) + one["count"]
    return {
        "batch": plan["batch"],
        "precision": plan["precision"],
        "bytes_per_device": plan["bytes_per_device"],
        "launches": gpu["launches"],
        "host_launches": (gpu["cuda_graphs"] or {}).get("host_launches"),
        "traffic": gpu["traffic"],
        "kernels": kernels,
        "attention": sorted({one["kernel"] for one in gpu["attention"]}),
        "aliased": gpu["aliased"],
        "outputs": gpu["outputs"],
        "waits_for_host": gpu["host"],
        "overlap": gpu["overlap"],
        "lower_bound": gpu["lower_bound"],
        "notes": plan["notes"],
    }


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Compare a row of the table with that of a new compilation; returns a line for each difference.

    Exact are attention, the arrays that are updated in place, what waits for the host, and the collectives by
    kind, axes, count and bytes.

    >>> old = {"launches": 100, "aliased": 9}
    >>> differences(old, {"launches": 103, "aliased": 9}), differences(old, {"launches": 104, "aliased": 8})
    ([], ['aliased: 9 before, now 8', 'launches: 100 before, now 104'])
    """
    exact = [
        {name: one.get(name) for name in ("error", "attention", "aliased", "outputs", "waits_for_host")}
        | {
            "collectives": [
                [each[n] for n in ("kind", "axes", "count", "bytes")] for each in one.get("overlap", ())
            ]
        }
        for one in (recorded, found)
    ]
    ceilings = [
        {"launches": one.get("launches"), "temporaries": one.get("bytes_per_device", {}).get("temporaries")}
        for one in (recorded, found)
    ]
    changed = [name for name, value in exact[0].items() if value != exact[1][name]]
    changed += [
        name
        for name, value in ceilings[0].items()
        if value is not None and (ceilings[1][name] or 0) > MARGIN * value
    ]
    before, now = exact[0] | ceilings[0], exact[1] | ceilings[1]
    return [f"{name}: {before[name]} before, now {now[name]}" for name in changed]


def markdown(table: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Return the rows as a table in Markdown, with those of ``before`` after an arrow where they differ.

    Collectives are counted with the bytes that a device contributes to them.
    """
    lines = [
        "| experiment, mesh | launches | temporaries, MB | traffic, MB | collectives | MB in collectives |",
        "|---|---|---|---|---|---|",
    ]
    for key, found in table["rows"].items():
        if "error" in found:
            lines.append(f"| {key} | – | | | {found['error'].removeprefix('jaxtrain plan: ')} | |")
            continue
        old = before["rows"].get(key, found)
        pairs = zip(_numbers(found if "error" in old else old), _numbers(found), strict=True)
        cells = [new if was == new else f"{was} → {new}" for was, new in pairs]
        lines.append(f"| {' | '.join([key, *cells])} |")
    return "\n".join(lines) + "\n"


def _numbers(found: Mapping[str, Any]) -> list[str]:
    def megabytes(size: float) -> str:
        return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:,.1f}" if size else "0"

    return [
        f"{found['launches']:,}",
        megabytes(found["bytes_per_device"]["temporaries"]),
        megabytes(found["traffic"]),
        f"{sum(one['count'] for one in found['overlap'])}",
        megabytes(sum(one["bytes"] for one in found["overlap"])),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what the table lacks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--card", default="h100")
    parser.add_argument("--experiment", nargs="+", default=names(), metavar="NAME")
    parser.add_argument("--again", action="store_true", help="compile rows that the table has, too")
    parser.add_argument("--markdown", action="store_true", help="print the table and compile nothing")
    args = parser.parse_args(argv)
    path = RESULTS / f"{args.card}.json"
    if args.markdown:
        before = RESULTS / f"{args.card}-before.json"
        sys.stdout.write(markdown(*(json.loads(one.read_text()) for one in (path, before))))
        return 0
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    table |= {"card": args.card, "jax": importlib.metadata.version("jax")}
    for key, arguments in cases(args.experiment):
        if key in table["rows"] and not args.again:
            continue
        found = table["rows"][key] = compile_one(arguments, args.card)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        print(
            f"{key}: {found.get('error') or str(found['launches']) + ' launches'}, {found['seconds']} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
