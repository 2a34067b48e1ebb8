"""Estimate the least time of a step from its FLOPs, its memory traffic and its collectives.

The roofline model (Williams et al., doi:10.1145/1498765.1498785) with a third ceiling for communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from jaxtrain.plan.collectives import Collective
from jaxtrain.sharding.cards import Card

GPUS_PER_HOST = 8
EXACT = ("highest", "float32", "F32_F32_F32")  # values of jax_default_matmul_precision


@dataclasses.dataclass(frozen=True)
class LowerBound:
    """A lower bound of the time of a step, in seconds. A step takes longer, never less.

    Attributes:
      compute: matrix products and convolutions at the card's peak.
      memory: the traffic of all kernels at the bandwidth of the memory; None where it is not known.
      communication: all collectives at the speed of the links.
      exposed: of ``communication``, those that no kernel overlaps.
      flops: of a step on one device.
      peak: FLOP/s that ``compute`` and ``mfu`` are relative to.
    """

    compute: float
    memory: float | None
    communication: float
    exposed: float
    flops: float
    peak: float

    @property
    def seconds(self) -> float:
        """The bound: computation or memory, then exposed collectives; never less than all collectives."""
        return max(max(self.compute, self.memory or 0.0) + self.exposed, self.communication)

    @property
    def limit(self) -> str:
        """What the bound consists of: ``compute``, ``memory`` or ``communication``."""
        if self.communication >= max(self.compute, self.memory or 0.0) + self.exposed:
            return "communication"
        return "memory" if (self.memory or 0.0) > self.compute else "compute"

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation of a step that takes exactly this long, an upper bound, in [0, 1]."""
        return self.flops / self.peak / self.seconds if self.seconds else 0.0


def peak_name(precision: str) -> str:
    """Return which of ``Card.peak`` a run reaches at most: JAX rounds float32 products to TF32 by default.

    >>> peak_name("float32"), peak_name("bfloat16")
    ('tf32', 'bfloat16')
    """
    exact = getattr(jax.config, "jax_default_matmul_precision", None) in EXACT
    return ("float32" if exact else "tf32") if precision == "float32" else precision


def lower_bound(
    flops: float,
    traffic: int | None,
    collectives: Sequence[Collective],
    exposed: Sequence[Collective],
    mesh: Mapping[str, int],
    card: Card,
    peak: str,
    gpus_per_host: int = GPUS_PER_HOST,
) -> LowerBound:
    """Return a lower bound of the time of a step.

    Each part assumes the datasheet's speed and no latency, no launch and no wait. Products overlap with
    memory traffic; a collective overlaps with kernels unless it is in ``exposed``; collectives follow each
    other, as XLA runs them by default. The memory part is only a bound where arrays are larger than the L2
    cache: what a kernel finds there does not come from memory.

    Args:
      flops: of a step, all devices together.
      traffic: bytes that the kernels of one device read and write (``GpuProgram.traffic``), or None.
      collectives: of a step.
      exposed: of these, those that no kernel overlaps (``exposed_collectives``).
      mesh: size by axis, in the mesh's order: the last axis is on neighbouring devices.
      card: the speed of each device.
      peak: which of ``card.peak`` (``peak_name``).
      gpus_per_host: devices of a host.

    >>> import types
    >>> card = types.SimpleNamespace(bandwidth=1e12, link=1e11, network=1e10, peak={"tf32": 1e14})
    >>> moved = [Collective("all-reduce", ("data",), bytes=100_000_000, count=1)]
    >>> bound = lower_bound(4e11, 3_000_000_000, moved, [], {"data": 2}, card, "tf32")
    >>> bound.compute, bound.memory, bound.communication, bound.seconds, bound.limit
    (0.002, 0.003, 0.001, 0.003, 'memory')
    >>> round(bound.mfu, 3)
    0.667
    """
    devices = int(np.prod([*mesh.values()], dtype=np.int64))

    def moving(some: Iterable[Collective]) -> float:
        return sum(collective_seconds(one, mesh, card.link, card.network, gpus_per_host) for one in some)

    return LowerBound(
        compute=flops / devices / card.peak[peak],
        memory=None if traffic is None else traffic / card.bandwidth,
        communication=moving(collectives),
        exposed=moving(exposed),
        flops=flops / devices,
        peak=card.peak[peak],
    )


def collective_seconds(
    one: Collective, mesh: Mapping[str, int], link: float, network: float, gpus_per_host: int = GPUS_PER_HOST
) -> float:
    """Return the least time of collectives of one kind, by what each GPU has to send.

    In a ring of n devices each sends 2 (n - 1) / n of the bytes of an all-reduce, and (n - 1) / n of those of
    an all-gather, reduce-scatter or all-to-all; a permute or broadcast sends them once. A group that spans h
    hosts, with k of its devices in each, sends as much over ``link`` as k devices, and (h - 1) / h of the
    bytes over the k ``network`` ports of a host, both at the same time.

    Args:
      one: bytes as in ``Collective``.
      mesh: size by axis, in the mesh's order.
      link, network: bytes per second that one GPU sends inside of its host, and to other hosts.
      gpus_per_host: devices of a host.

    >>> moved = Collective("all-reduce", ("data",), bytes=1_000_000, count=1)
    >>> collective_seconds(moved, {"data": 4, "fsdp": 2}, link=1e9, network=1e8)
    0.0015
    >>> collective_seconds(moved, {"data": 2, "fsdp": 8}, link=1e9, network=1e8)
    0.01
    """
    hosts, inside = _group(mesh, one.axes, gpus_per_host)
    if one.kind in ("collective-permute", "collective-broadcast"):
        return one.bytes / (network if hosts > 1 else link)
    if one.kind in ("all-to-all", "ragged-all-to-all"):
        n = hosts * inside
        return one.bytes * max((inside - 1) / n / link, (n - inside) / n / network)
    times = 2 if one.kind == "all-reduce" else 1
    local = (inside - 1) / inside / link
    return times * one.bytes * max(local, (hosts - 1) / hosts / inside / network)


def _group(mesh: Mapping[str, int], axes: Sequence[str], gpus_per_host: int) -> tuple[int, int]:
    """Return over how many hosts a group along ``axes`` spans, and how many of its devices each host has."""
    positions = np.arange(int(np.prod([*mesh.values()], dtype=np.int64))).reshape([*mesh.values()])
    group = positions[tuple(slice(None) if name in axes else 0 for name in mesh)]
    hosts = len(np.unique(group // gpus_per_host))
    return hosts, max(1, group.size // hosts)
