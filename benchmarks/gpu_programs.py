"""Every shipped experiment compiled for a GPU that need not be here, on one device and three meshes of eight.

A row is what ``python -m jaxtrain plan --for CARD --json`` says of the train step: launches, traffic,
temporaries, attention, collectives and their overlap. Nothing is run, so nothing is a time. The table is
written after every row, and rows that it has are left out: the command can be interrupted and repeated. Large
models take minutes each.

  python -m benchmarks.gpu_programs [--card h100] [--experiment NAME ...] [--again]
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
HALF = ("imagenet_resnet50", "imagenet_vit_s16", "shakespeare_gpt")
"""Experiments that are also compiled in bfloat16, where their file has another precision."""


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
                yield " ".join((name, mesh, precision)).strip(), ("--experiment", name, *flags)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what the table lacks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--card", default="h100")
    parser.add_argument("--experiment", nargs="+", default=names(), metavar="NAME")
    parser.add_argument("--again", action="store_true", help="compile rows that the table has, too")
    args = parser.parse_args(argv)
    path = RESULTS / f"{args.card}.json"
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
