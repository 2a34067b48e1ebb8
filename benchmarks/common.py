"""What the benchmarks share: interleaved timing, ratios with their spread, one JSON object as output."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.cli.doctor import huge_page_status

PACKAGES = (
    *("jaxtrain", "jax", "jaxlib", "flax", "optax", "grain", "numpy"),
    *("keras", "tensorflow", "tensorflow-cpu", "torch"),
)
CIFAR10 = (50_000, 32, 32, 3)


def arguments(about: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=_positive, default=rounds, help="how often each side is timed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return number


def interleave(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Time every side once a round, after one round of warm-up that is thrown away.

    Every other round goes through the sides backwards (A B B A), so that a machine that slows down or is
    disturbed does so for all of them alike.

    Args:
      sides: functions that do a fixed amount of work, wait for it, and return their own seconds a unit.
      rounds: how many to keep, at least 1.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        names = list(sides) if number % 2 else list(sides)[::-1]
        for name in names:
            seconds = sides[name]()
            if number:
                times[name].append(seconds)
    return times


def each(work: Callable[[], Any], units: int) -> Callable[[], float]:
    """A side: seconds for one of the ``units`` that ``work()`` goes through and waits for."""

    def side() -> float:
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) / units

    return side


def result(name: str, values: Sequence[float], unit: str, goal: str | None = None) -> dict[str, Any]:
    """One line of the table: median and quartiles over the rounds, and the goal (such as ``">= 1.3"``)."""
    q1, median, q3 = np.percentile(values, (25, 50, 75)).tolist()
    found = {"name": name, "unit": unit, "median": median, "q1": q1, "q3": q3, "n": len(values)}
    if goal is None:
        return found
    sign, bound = goal.split()
    met = median >= float(bound) if sign == ">=" else median < float(bound)
    return found | {"goal": goal, "met": met}


def speedup(
    name: str, slow: Sequence[float], fast: Sequence[float], goal: str | None = None
) -> dict[str, Any]:
    """How many times faster ``fast`` is than ``slow``, both in seconds, paired by round."""
    return result(name, [a / b for a, b in zip(slow, fast, strict=True)], "×", goal)


def medians(times: Mapping[str, Sequence[float]], scale: float = 1.0) -> dict[str, float]:
    """The median of each side, times ``scale``."""
    return {name: scale * statistics.median(values) for name, values in times.items()}


def finish(
    args: argparse.Namespace,
    benchmark: str,
    results: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Any],
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Print the one JSON object, and write it where ``--out`` says.

    Args:
      args: from ``arguments``.
      benchmark: its name.
      results: from ``result`` and ``speedup``.
      figures: whatever else helps to read them, absolute times with their unit in the name.
      skipped: what was not measured, and why.
    """
    record = {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        **environment(),
        "results": list(results),
        "figures": dict(figures),
        "skipped": dict(skipped or {}),
    }
    text = json.dumps(record, indent=1, default=float)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


def environment() -> dict[str, Any]:
    """Date, device, cores and versions: what a figure is worth nothing without."""
    import jax

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "huge_pages": huge_page_status().partition(";")[0],
        "load_before": LOAD,
        "versions": versions,
    }


def processor() -> str:
    """What the CPU calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def cifar_like(n: int = CIFAR10[0], seed: int = 0) -> dict[str, np.ndarray]:
    """Random bytes in the shapes of CIFAR-10's training set. What is in the pixels costs no time."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, *CIFAR10[1:]), np.uint8),
        "label": rng.integers(0, 10, n, np.int32),
    }


LOAD = os.getloadavg()[0]  # read before the benchmark itself loads the machine; 0 on an idle one
