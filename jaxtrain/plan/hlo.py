"""Parse the text of a compiled program (HLO) into computations and instructions.

The text is that of ``compiled.as_text()``. Instructions of a scheduled program (``is_scheduled=true``) are in
the order in which a device starts them. https://openxla.org/xla/operation_semantics
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from jaxtrain.core.errors import InputError

COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+)(?: .*)?\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)")
CALLED = re.compile(r", (calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.-]+))")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")


class Op(NamedTuple):
    """An instruction, ``name = shape opcode(rest``; ``rest`` starts with the operands."""

    name: str
    shape: str
    opcode: str
    rest: str


class Hlo(NamedTuple):
    """The name of the entry computation, and the instructions of each computation."""

    entry: str
    computations: dict[str, list[Op]]


def read_hlo(hlo: str, mesh: Mesh | AbstractMesh | None = None) -> Hlo:
    """Parse a compiled program.

    Raises:
      InputError: the text is not a compiled program, or one for another number of devices than ``mesh``.

    >>> text = '''
    ... ENTRY %main (p: f32[8]) -> f32[8] {
    ...   ROOT %p = f32[8]{0} parameter(0)
    ... }'''
    >>> read_hlo(text)
    Hlo(entry='main', computations={'main': [Op(name='p', shape='f32[8]{0}', opcode='parameter', rest='0)')]})
    """
    partitions = re.match(r"HloModule .*\bnum_partitions=(\d+)", hlo)
    if mesh is not None and partitions and int(partitions[1]) != mesh.size:
        raise InputError(
            f"the program is partitioned over {partitions[1]} devices and the mesh has {mesh.size}: "
            "pass the mesh that it was compiled for"
        )
    entry, ops = "", list[Op]()
    computations: dict[str, list[Op]] = {}
    for line in hlo.splitlines():
        if head := COMPUTATION.match(line):
            ops = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif op := INSTRUCTION.match(line):
            ops.append(Op(op[1], op[2], op[3], op[4]))
    if not entry:
        raise InputError(
            "no ENTRY in the program's text: pass that of the compiled program, compiled.as_text()"
        )
    return Hlo(entry, computations)


def called(op: Op) -> list[str]:
    """Return the computations that an instruction calls; an all-reduce calls only the sum of two numbers."""
    found = CALLED.findall(op.rest)
    return [name.strip(" %") for _, many, one in found for name in (one or many).split(",")]


def trips(loop: Op, computations: dict[str, list[Op]]) -> int:
    """Return a loop's trip count: XLA's own, or n of a condition ``i < n``; 1 where it is unknown."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest):
        return int(known[1])
    [condition] = [one for name, _, one in CALLED.findall(loop.rest) if name == "condition"]
    ops = computations[condition]
    ops = ops + [inner for op in ops for name in called(op) for inner in computations[name]]
    compared = [op.rest for op in ops if op.opcode == "compare"]
    limits = [op.rest for op in ops if op.opcode == "constant" and re.match(r"[su]\d+\[\]", op.shape)]
    if len(compared) != 1 or len(limits) != 1 or "direction=LT" not in compared[0]:
        return 1
    return int(limits[0].partition(")")[0])


def operands(op: Op) -> list[str]:
    """Return the names of the operands.

    >>> operands(Op("sum", "f32[8]{0}", "add", "%a, /*index=1*/%b.2), metadata={op_name=\\"%c\\"}"))
    ['a', 'b.2']
    """
    depths = itertools.accumulate((char in "([{") - (char in ")]}") for char in op.rest)
    end = next((at for at, depth in enumerate(depths) if depth < 0), len(op.rest))
    return re.findall(r"%([\w.-]+)", op.rest[:end])


def result_shape(op: Op) -> str:
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


def array_bytes(shape: str) -> int:
    """Return the bytes of an array or of a tuple of arrays; sub-byte types are packed, a token has none.

    >>> array_bytes("(f32[2,3]{1,0}, bf16[8]{0}, token[])")
    40
    """
    total = 0
    for dtype, dims in ARRAY.findall(shape):
        bits = re.match(r"[a-z]+(\d+)", dtype)
        width = 8 if dtype == "pred" else int(bits[1]) if bits else 0
        total += math.ceil(width * math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n) / 8)
    return total


def nested(name: str, computations: dict[str, list[Op]]) -> Iterator[Op]:
    """Yield the instructions of a computation and of those that it calls, such as those of a fusion."""
    for op in computations.get(name, ()):
        yield op
        for inner in called(op):
            yield from nested(inner, computations)
