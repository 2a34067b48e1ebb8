"""Read the collectives of a compiled step from its text.

XLA chooses the collectives when it partitions a program, so only the compiled program shows whether a
sharding works as intended: data parallelism all-reduces the gradients over ``data``, FSDP gathers the
parameters over ``fsdp``, and a misspelt sharding shows as an unexpected all-gather.

The operations: https://openxla.org/xla/operation_semantics. ``send`` and ``recv`` are not counted.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxtrain.core.errors import RunError
from jaxtrain.plan.hlo import Op, array_bytes, called, read_hlo, result_shape, trips

# Groups of these number replicas, of which a jitted program has one, unless use_global_device_ids=true.
OF_REPLICAS = ("all-reduce", "all-gather", "reduce-scatter")
OF_PARTITIONS = ("all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")

LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=(\S+?)(?:, |$)")
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S*)\))? \{([^}]*)\}")

_Totals = dict[tuple[str, tuple[str, ...]], tuple[int, int]]  # (kind, axes): (bytes, count)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same axes, in one run of a program.

    Attributes:
      kind: the name in HLO: ``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all``,
        ``collective-permute``, ``collective-broadcast`` or ``ragged-all-to-all``.
      axes: the mesh axes along which data moves, in the mesh's order; never one of size 1. For device groups
        that match no set of axes, the smallest set that contains them.
      bytes: the size of the result on one device (of the operand for ``reduce-scatter``), summed over the
        ``count``. This is the usual measure of a collective, not the traffic on the wire: in a ring
        all-reduce of b bytes over n devices each sends 2 b (n - 1) / n.
      count: how often it runs, in a loop once per iteration. Arrays that XLA combined count as one.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int


def collectives(hlo: str, mesh: Mesh | AbstractMesh) -> tuple[Collective, ...]:
    """Return the collectives of a compiled step, those with most bytes first.

    A loop of unknown length counts as one iteration. Of the branches of a conditional only the one that moves
    most bytes counts. A collective among groups of one device moves nothing and is left out.

    Args:
      hlo: ``compiled.as_text()`` of a jitted function whose arrays are sharded over ``mesh``.
      mesh: the mesh it was compiled for, with devices in any order: HLO numbers them by position.

    Raises:
      InputError: the text is not a compiled program, or one for another number of devices.
      RunError: this version of XLA writes the groups of a collective in an unknown form.

    >>> from jax.sharding import AbstractMesh
    >>> text = '''
    ... ENTRY %main (p: f32[8]) -> f32[8] {
    ...   %p = f32[8] parameter(0)
    ...   ROOT %sum = f32[8] all-reduce(%p), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
    ... }'''
    >>> collectives(text, AbstractMesh((2, 4), ("data", "model")))
    (Collective(kind='all-reduce', axes=('data',), bytes=32, count=1),)
    """
    entry, computations = read_hlo(hlo, mesh)
    cache: dict[str, _Totals] = {}

    def total(computation: str) -> _Totals:
        if computation not in cache:
            sums: _Totals = {}
            for op in computations.get(computation, ()):
                if one := collective_of(op, mesh):
                    _add(sums, {(one.kind, one.axes): (one.bytes, one.count)})
                if op.opcode == "conditional":
                    branches = [total(name) for name in called(op)]
                    _add(sums, max(branches, key=lambda branch: sum(size for size, _ in branch.values())))
                elif not op.opcode.endswith(("-done", "-update")):  # counted at its start
                    times = trips(op, computations) if op.opcode == "while" else 1
                    for name in called(op):
                        _add(sums, total(name), times)
            cache[computation] = sums
        return cache[computation]

    found = [Collective(kind, axes, size, n) for (kind, axes), (size, n) in total(entry).items()]
    return tuple(sorted(found, key=lambda one: (-one.bytes, one.kind, one.axes)))


def _add(sums: _Totals, more: _Totals, times: int = 1) -> None:
    for key, (size, count) in more.items():
        before = sums.get(key, (0, 0))
        sums[key] = (before[0] + times * size, before[1] + times * count)


def collective_of(op: Op, mesh: Mesh | AbstractMesh) -> Collective | None:
    """Return what one instruction moves; None for most, and where each group is one device."""
    kind = op.opcode.removesuffix("-start")
    if kind not in OF_REPLICAS + OF_PARTITIONS:
        return None
    groups = _groups(kind, op.rest, mesh.size)
    positions = np.unravel_index(groups, tuple(mesh.shape.values()))
    axes = tuple(name for name, at in zip(mesh.axis_names, positions, strict=True) if np.any(at != at[:, :1]))
    size = array_bytes(result_shape(op)) * (
        groups.shape[1] if kind == "reduce-scatter" else 1
    )  # of its operand
    return Collective(kind, axes, size, 1) if axes else None


def _groups(kind: str, text: str, devices: int) -> np.ndarray:
    """Return the groups of communicating devices: positions in the mesh, int [groups, devices in each]."""
    everyone = np.arange(devices)[None]
    if kind in OF_REPLICAS and "channel_id=" in text and "use_global_device_ids=true" not in text:
        return everyone
    if listed := LISTED.search(text):
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        longest = max(map(len, groups), default=0)
        return np.array([g + g[:1] * (longest - len(g)) for g in groups]) if groups else everyone
    if iota := IOTA.search(text):
        return _order(iota[3]).reshape(int(iota[1]), int(iota[2]))
    if named := MESH.search(text):
        return _mesh_groups(named[1], named[2], named[3])
    if "replica_groups=" not in text:
        return everyone
    form = text.partition("replica_groups=")[2][:60]
    raise RunError(
        f"XLA writes the groups of a collective in an unknown form: {kind} {form!r}: use an older JAX"
    )


def _order(text: str) -> np.ndarray:
    """Parse a device order: ``[2,4]T(1,0)`` is iota of that shape, transposed; ``3,1,2,0`` is a list."""
    shape = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not shape:
        return np.array(text.split(","), int)
    dims = [int(n) for n in shape[1].split(",")]
    iota = np.arange(math.prod(dims)).reshape(dims)
    return (iota.transpose([int(n) for n in shape[2].split(",")]) if shape[2] else iota).ravel()


def _mesh_groups(mesh: str, order: str | None, axes: str) -> np.ndarray:
    """Return groups along ``axes`` (``'b'``) of XLA's own mesh (``'a'=2,'b'=4``), maybe not the user's.

    ``'b':(2)2`` is a part of the axis: with its size split as 2 × 2 (× the rest), the second factor.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", mesh)}
    ids = _order(order) if order else np.arange(math.prod(sizes.values()))
    positions = dict(zip(sizes, np.indices(tuple(sizes.values())).reshape(len(sizes), -1), strict=True))
    group_size = 1
    for name, before, part in re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", axes):
        size = int(part or sizes[name])
        stride = sizes[name] // (int(before or 1) * size)
        positions[name] = positions[name] - positions[name] // stride % size * stride
        group_size *= size
    group = np.ravel_multi_index(tuple(positions.values()), tuple(sizes.values()))
    return ids[np.argsort(group, kind="stable")].reshape(-1, group_size)
