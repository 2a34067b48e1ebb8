"""Warn where a mesh makes a step move more than it computes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxtrain import sharding
from jaxtrain.core.text import size_text
from jaxtrain.plan.collectives import Collective
from jaxtrain.plan.roofline import GPUS_PER_HOST, collective_seconds, peak_name
from jaxtrain.sharding.cards import Card, load_card

MIN_SECONDS = 1e-3
"""Communication below this is not warned about: so short a step waits for other things."""


H100 = {"bfloat16": 989.5e12, "float16": 989.5e12, "tf32": 494.5e12, "float32": 67e12}


def mesh_warnings(
    collectives: Sequence[Collective],
    flops: float | None,
    mesh: Mapping[str, int],
    precision: str = "bfloat16",
    card: Card | None = None,
    gpus_per_host: int = GPUS_PER_HOST,
) -> list[str]:
    """Return a line for each set of mesh axes whose collectives take longer than the computation of a step.

    Both are lower bounds: the collectives by ``roofline.collective_seconds``, the computation as FLOPs at the
    card's peak. Collectives of less than a millisecond are not warned about. On a CPU, XLA sends bfloat16
    as float32, so a plan compiled there counts up to twice the bytes.

    Args:
      collectives: of a step.
      flops: of a step, all devices together; None where they were not counted: then there is no warning.
      mesh: size by axis, in the mesh's order.
      precision: of the run.
      card: the speed of a device; None is ``h100`` of ``sharding.cards``.
      gpus_per_host: devices of a host.

    >>> moved = [Collective("all-gather", ("model",), 9_120_000_000, 94)]
    >>> [line] = mesh_warnings(moved, 2.5e13, {"data": 4, "fsdp": 1, "model": 2})
    >>> line.partition(":")[0]
    'model moves 9.12 GB between devices in a step (all-gather 9.12 GB)'
    """
    if not flops:
        return []
    card = card or load_card("h100")
    peak = card.peak[peak_name(precision)]
    compute = flops / math.prod(mesh.values()) / peak
    lines = []
    for axes in dict.fromkeys(one.axes for one in collectives):
        moved = [one for one in collectives if one.axes == axes]
        seconds = sum(collective_seconds(one, mesh, card.link, card.network, gpus_per_host) for one in moved)
        if seconds <= max(compute, MIN_SECONDS):
            continue
        kinds = ", ".join(f"{one.kind} {size_text(one.bytes)}" for one in moved)
        lines.append(
            f"{'+'.join(axes)} moves {size_text(sum(one.bytes for one in moved))} between devices in a step "
            f"({kinds}): at least {1e3 * seconds:.1f} ms, longer than {1e3 * compute:.1f} ms of computation "
            f"(peak of {card.name}); {_alternative(axes, mesh)}"
        )
    return lines


def _alternative(axes: tuple[str, ...], mesh: Mapping[str, int]) -> str:
    """Return what to try instead of a mesh whose ``axes`` move too much."""
    if "model" in axes:
        sizes = {**mesh, "data": mesh.get("data", 1) * mesh["model"], "model": 1}
        sharded = {**mesh, "fsdp": mesh.get("fsdp", 1) * mesh["model"], "model": 1}
        return (
            f"try --mesh {sharding.mesh_text(sizes)}, or {sharding.mesh_text(sharded)} if the state does not "
            "fit"
        )
    if axes == ("fsdp",):
        sizes = {**mesh, "data": mesh.get("data", 1) * mesh["fsdp"], "fsdp": 1}
        return f"try a larger batch, or --mesh {sharding.mesh_text(sizes)} if the state fits"
    return "try a larger batch, or fewer devices"
