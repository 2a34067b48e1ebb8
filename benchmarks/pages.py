"""What huge pages bring to runs on a CPU (``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``).

The same run of each network over resident data, crop and flip, batch 128, in processes with huge pages and
without, in turn (A B B A). Each round starts one process per side, with a warm compile cache. The figure is
the run's own: examples per second, without compilation and evaluation.

  python -m benchmarks.pages [--nets NAME ...] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.convolution import NETS
from benchmarks.sides import short
from jaxtrain.cli.doctor import TUNABLE, huge_page_status
from jaxtrain.core import cache
from jaxtrain.monitor.console import Plain
from jaxtrain.train import loop

UPDATES = {"cifar_small_cnn": 40, "cifar_lenet": 150, "cifar_cnn": 12}
SIDES = {"small": "0", "huge": "1"}


def run(name: str) -> dict[str, Any]:
    """One run in this process."""
    program = short(UPDATES[name], model=NETS[name]["model"], log_every=UPDATES[name])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = loop.fit(program, Path(folder), Plain())
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {"page_faults": used.ru_minflt, "peak_memory_mb": used.ru_maxrss / 1024}
    figures |= {"seconds": 1 / found["examples_per_second"], "loss": found["test"]["loss"]}
    return {**figures, "huge_pages": huge_page_status()}


def run_process(name: str, side: str) -> dict[str, Any]:
    """``run(name)`` in a process that has such pages."""
    environment = {**os.environ, "GLIBC_TUNABLES": f"{TUNABLE}={SIDES[side]}"}
    words = [sys.executable, "-m", "benchmarks.pages", "--run", name]
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    status = found.pop("huge_pages")
    if (status == "enabled") != (side == "huge"):
        raise SystemExit(f"benchmarks.pages: huge pages are {status}: nothing to compare")
    return found


def measure(name: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Results and figures of one network."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}

    def side(which: str) -> float:
        runs[which].append(run_process(name, which))
        seconds: float = runs[which][-1]["seconds"]
        return seconds

    times = common.interleave({which: lambda which=which: side(which) for which in SIDES}, rounds)
    losses = {one["loss"] for found in runs.values() for one in found}
    if len(losses) > 1:
        raise SystemExit(f"these were not the same runs: their losses are {losses}")
    figures = {
        f"{key}: {which}": common.medians({key: [one[key] for one in found[1:]]})[key]
        for which, found in runs.items()
        for key in ("page_faults", "peak_memory_mb")
    }
    figures |= {f"examples_per_second: {side}": 1 / s for side, s in common.medians(times).items()}
    return [common.speedup(f"{name}: examples/s with huge pages", times["small"], times["huge"])], figures


def main() -> None:
    """All networks, one JSON object."""
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--nets", nargs="+", choices=UPDATES, default=list(UPDATES))
    parser.add_argument("--run", choices=UPDATES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cache.enable_compilation_cache(print)
    if args.run:
        print(json.dumps(run(args.run)))
        return
    results, figures = [], {}
    for name in args.nets:
        found, figures[name] = measure(name, args.rounds)
        results += found
    common.finish(args, "pages", results, figures)


if __name__ == "__main__":
    main()
