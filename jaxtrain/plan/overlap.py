"""Read which collectives of a GPU program run while kernels compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh

from jaxtrain.plan.collectives import Collective, collective_of
from jaxtrain.plan.gpu_kernels import ATTENTION, COLLECTIVE, CONVOLUTION, PRODUCT, classify, launches
from jaxtrain.plan.hlo import Hlo, Op, called, operands

LARGE = (PRODUCT, CONVOLUTION, ATTENTION)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How the collectives of one kind over the same axes overlap computation, in one run of a program.

    XLA starts a collective on a stream of its own and waits for it later. What it schedules in between runs
    at the same time; whether that takes as long as the collective, the program does not show.

    Attributes:
      kind, axes, count, bytes: as in ``Collective``.
      overlapped, overlapped_bytes: of those with at least one kernel between start and end.
      behind_products, behind_products_bytes: of those with at least one matrix product, convolution or
        attention kernel between start and end.
      products, others: the kernels that run between start and end, of all of them together.
    """

    kind: str
    axes: tuple[str, ...]
    count: int = 0
    bytes: int = 0
    overlapped: int = 0
    overlapped_bytes: int = 0
    behind_products: int = 0
    behind_products_bytes: int = 0
    products: int = 0
    others: int = 0


def read_overlaps(program: Hlo, mesh: Mesh | AbstractMesh) -> tuple[Overlap, ...]:
    """Return the overlap of collectives with computation, by kind and axes, those with most bytes first.

    Args:
      program: from ``read_hlo``, scheduled.
      mesh: the mesh that it was compiled for.
    """
    wrapped = {  # computation of a generic asynchronous operation: where it starts
        name: (computation, op)
        for computation, ops in program.computations.items()
        for op in ops
        if op.opcode == "async-start"
        for name in called(op)
    }
    found: dict[tuple[str, tuple[str, ...]], Overlap] = {}
    for op, computation, times in launches(program):
        moved = collective_of(op, mesh)
        if moved is None:
            continue
        place, start = wrapped.get(computation, (computation, op))
        kinds = [
            kind
            for launch in launches(program, _between(program.computations[place], start))
            for kind in [classify(launch.op, program)[0]] * launch.times
            if kind != COLLECTIVE
        ]
        products = sum(kind in LARGE for kind in kinds)
        before = found.get((moved.kind, moved.axes), Overlap(moved.kind, moved.axes))
        found[moved.kind, moved.axes] = Overlap(
            moved.kind,
            moved.axes,
            before.count + times,
            before.bytes + times * moved.bytes,
            before.overlapped + times * bool(kinds),
            before.overlapped_bytes + times * bool(kinds) * moved.bytes,
            before.behind_products + times * bool(products),
            before.behind_products_bytes + times * bool(products) * moved.bytes,
            before.products + times * products,
            before.others + times * (len(kinds) - products),
        )
    return tuple(sorted(found.values(), key=lambda one: (-one.bytes, one.kind, one.axes)))


def _between(ops: list[Op], start: Op) -> list[Op]:
    """Return what is scheduled between the start of an asynchronous operation and its end."""
    if not start.opcode.endswith("-start") or '"is_sync":true' in start.rest:
        return []
    waits, at = {start.name}, ops.index(start)
    for end, op in enumerate(ops[at + 1 :], at + 1):
        if op.opcode.endswith("-update") and waits & {*operands(op)}:
            waits.add(op.name)
        elif op.opcode.endswith("-done") and waits & {*operands(op)}:
            return ops[at + 1 : end]
    return []


def exposed_collectives(overlaps: Sequence[Overlap]) -> tuple[Collective, ...]:
    """Return the collectives that no kernel overlaps: computation waits for them.

    >>> exposed_collectives([Overlap("all-reduce", ("data",), 3, 900, overlapped=1, overlapped_bytes=800)])
    (Collective(kind='all-reduce', axes=('data',), bytes=100, count=2),)
    """
    return tuple(
        Collective(one.kind, one.axes, one.bytes - one.overlapped_bytes, one.count - one.overlapped)
        for one in overlaps
        if one.count > one.overlapped
    )
