"""Compare a program that was compiled for a described GPU with the one that was compiled on the GPU.

Both are the JSON of ``python -m jaxtrain plan --json``, whose ``gpu`` holds what ``plan.read_gpu_step`` read.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SAME_BYTES = 0.05  # relative difference of two sizes below which no line is written

Json = Mapping[str, Any]


def summary(plan: Json) -> dict[str, Any]:
    """Return what is compared of a plan: sizes and counts by name, and tables of counts."""
    gpu = plan["gpu"] or {}
    kernels: dict[str, int] = {}
    for one in gpu.get("kernels", ()):
        kernels[one["kind"]] = kernels.get(one["kind"], 0) + one["count"]
    attention: dict[str, int] = {}
    for one in gpu.get("attention", ()):
        attention[one["kernel"]] = attention.get(one["kernel"], 0) + 1
    return {
        "temporaries": plan["bytes_per_device"]["temporaries"],
        "total_bytes": plan["bytes_per_device"]["total"],
        "traffic": gpu.get("traffic"),
        "launches": gpu.get("launches"),
        "host_launches": (gpu.get("cuda_graphs") or {}).get("host_launches"),
        "kernels": kernels,
        "attention": attention,
        "collectives": {
            f"{one['kind']} over {'+'.join(one['axes'])}": {"count": one["count"], "bytes": one["bytes"]}
            for one in plan["collectives"]
        },
    }


def compare(described: Json, here: Json) -> dict[str, Any]:
    """Compare two plans of the same run.

    Args:
      described: compiled for a described GPU.
      here: compiled on the device.

    Returns:
      ``described`` and ``here``, as from ``summary``; ``ratios`` of the first to the second, of each number
      that both have; ``differences``, one line each.

    Raises:
      ValueError: they are of different runs.
    """
    for name in ("batch", "precision", "parameters", "mesh", "resident"):
        if described[name] != here[name]:
            raise ValueError(f"not the same run: {name} is {described[name]} described, {here[name]} here")
    both = summary(described), summary(here)
    ratios = {
        name: both[0][name] / both[1][name]
        for name in ("temporaries", "total_bytes", "traffic", "launches", "host_launches")
        if both[0][name] is not None and both[1][name]
    }
    return {"described": both[0], "here": both[1], "ratios": ratios, "differences": list(_lines(*both))}


def _lines(described: Json, here: Json) -> Iterator[str]:
    for name in ("temporaries", "total_bytes", "traffic"):
        one, other = described[name], here[name]
        if one is None or other is None:
            if one != other:
                yield f"{name}: known of one program only"
        elif abs(one - other) > SAME_BYTES * max(one, other):
            yield f"{name}: {one / 1e6:,.2f} MB described, {other / 1e6:,.2f} MB here"
    for name in ("launches", "host_launches"):
        if described[name] != here[name]:
            one, other = ("unknown" if side[name] is None else side[name] for side in (described, here))
            yield f"{name}: {one} described, {other} here"
    for name in ("kernels", "attention"):
        for kind in sorted({*described[name], *here[name]}):
            one, other = described[name].get(kind, 0), here[name].get(kind, 0)
            if one != other:
                yield f"{name}, {kind}: {one} described, {other} here"
    for kind in sorted({*described["collectives"], *here["collectives"]}):
        one, other = (_moved(side["collectives"].get(kind)) for side in (described, here))
        if one != other:
            yield f"{kind}: {one} described, {other} here"


def _moved(one: Json | None) -> str:
    return "none" if one is None else f"{one['count']} of {one['bytes'] / 1e6:,.3f} MB together"


def check_bound(bound: Json | None, seconds: Sequence[float]) -> dict[str, Any]:
    """Compare a lower bound of the time of a step with measured times.

    Args:
      bound: ``lower_bound`` of a plan's ``gpu``; None where there is none.
      seconds: of a step, one of each round.

    Returns:
      ``step_ms`` (the median) and ``rounds_ms``; with a bound also ``bound_ms``, ``limit``, ``mfu`` (of each
      round, at the card's peak) and ``holds``: whether no round was faster than the bound.
    """
    found: dict[str, Any] = {
        "step_ms": 1e3 * statistics.median(seconds),
        "rounds_ms": [1e3 * each for each in seconds],
    }
    if bound is None:
        return found
    return found | {
        "bound_ms": 1e3 * bound["seconds"],
        "limit": bound["limit"],
        "mfu": [bound["flops"] / bound["peak"] / each for each in seconds],
        "holds": bound["seconds"] <= min(seconds),
    }
