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
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxtrain.core.errors import InputError, RunError

# Groups of these number replicas, of which a jitted program has one, unless use_global_device_ids=true.
OF_REPLICAS = ("all-reduce", "all-gather", "reduce-scatter")
OF_PARTITIONS = ("all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")

COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+)(?: .*)?\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (.+?) ([a-z][\w-]*)\((.*)")
CALLED = re.compile(r", (calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.-]+))")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
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


class _Op(NamedTuple):
    """An instruction, ``shape opcode(rest``; ``rest`` starts with the operands."""

    shape: str
    opcode: str
    rest: str


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
    partitions = re.match(r"HloModule .*\bnum_partitions=(\d+)", hlo)
    if partitions and int(partitions[1]) != mesh.size:
        raise InputError(
            f"the program is partitioned over {partitions[1]} devices and the mesh has {mesh.size}: "
            "pass the mesh that it was compiled for"
        )
    entry, computations = _read(hlo)
    cache: dict[str, _Totals] = {}

    def total(name: str) -> _Totals:
        if name not in cache:
            sums: _Totals = {}
            for op in computations.get(name, ()):
                _add(sums, _collective(op, mesh))
                if op.opcode == "conditional":
                    branches = [total(called) for called in _called(op)]
                    _add(sums, max(branches, key=lambda branch: sum(size for size, _ in branch.values())))
                elif not op.opcode.endswith(("-done", "-update")):  # counted at its start
                    times = _trips(op, computations) if op.opcode == "while" else 1
                    for called in _called(op):
                        _add(sums, total(called), times)
            cache[name] = sums
        return cache[name]

    found = [Collective(kind, axes, size, n) for (kind, axes), (size, n) in total(entry).items()]
    return tuple(sorted(found, key=lambda one: (-one.bytes, one.kind, one.axes)))


def _read(hlo: str) -> tuple[str, dict[str, list[_Op]]]:
    """Return the name of the entry computation, and the instructions of each computation."""
    entry, ops = "", list[_Op]()
    computations: dict[str, list[_Op]] = {}
    for line in hlo.splitlines():
        if head := COMPUTATION.match(line):
            ops = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif op := INSTRUCTION.match(line):
            ops.append(_Op(op[1], op[2], op[3]))
    if not entry:
        raise InputError(
            "no ENTRY in the program's text: pass that of the compiled program, compiled.as_text()"
        )
    return entry, computations


def _called(op: _Op) -> list[str]:
    """Return the computations that an instruction calls; an all-reduce calls only the sum of two numbers."""
    found = CALLED.findall(op.rest)
    return [name.strip(" %") for _, many, one in found for name in (one or many).split(",")]


def _add(sums: _Totals, more: _Totals, times: int = 1) -> None:
    for key, (size, count) in more.items():
        before = sums.get(key, (0, 0))
        sums[key] = (before[0] + times * size, before[1] + times * count)


def _trips(loop: _Op, computations: dict[str, list[_Op]]) -> int:
    """Return a loop's trip count: XLA's own, or n of a condition ``i < n``; 1 where it is unknown."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest):
        return int(known[1])
    [condition] = [one for name, _, one in CALLED.findall(loop.rest) if name == "condition"]
    ops = computations[condition]
    ops = ops + [inner for op in ops for name in _called(op) for inner in computations[name]]
    compared = [op.rest for op in ops if op.opcode == "compare"]
    limits = [op.rest for op in ops if op.opcode == "constant" and re.match(r"[su]\d+\[\]", op.shape)]
    if len(compared) != 1 or len(limits) != 1 or "direction=LT" not in compared[0]:
        return 1
    return int(limits[0].partition(")")[0])


def _collective(op: _Op, mesh: Mesh | AbstractMesh) -> _Totals:
    """Return what one instruction moves; empty for most."""
    kind = op.opcode.removesuffix("-start")
    if kind not in OF_REPLICAS + OF_PARTITIONS:
        return {}
    groups = _groups(kind, op.rest, mesh.size)
    positions = np.unravel_index(groups, tuple(mesh.shape.values()))
    axes = tuple(name for name, at in zip(mesh.axis_names, positions, strict=True) if np.any(at != at[:, :1]))
    size = _bytes(_result(op)) * (groups.shape[1] if kind == "reduce-scatter" else 1)  # of its operand
    return {(kind, axes): (size, 1)} if axes else {}


def _result(op: _Op) -> str:
    """Return the shape of the result; that of an asynchronous start is ``(operands, results, ...)``."""
    if not op.opcode.endswith("-start") or not op.shape.startswith("("):
        return op.shape
    parts, depth = [""], 0
    for char in op.shape[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    # The shape of an all-reduce-start is its results only, unless XLA prints an async-start under that name.
    results_only = op.opcode == "all-reduce-start" and not parts[0].startswith("(")
    return op.shape if results_only else parts[1]


def _bytes(shape: str) -> int:
    """Return the bytes of an array or of a tuple of arrays; sub-byte types are packed, a token has none."""
    total = 0
    for dtype, dims in ARRAY.findall(shape):
        bits = re.match(r"[a-z]+(\d+)", dtype)
        width = 8 if dtype == "pred" else int(bits[1]) if bits else 0
        total += math.ceil(width * math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n) / 8)
    return total


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
