"""Find the kernels that a compiled GPU program launches, what they are, and the bytes that they move."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jaxtrain.plan.collectives import OF_PARTITIONS, OF_REPLICAS
from jaxtrain.plan.hlo import Hlo, Op, array_bytes, called, nested, operands, result_shape, trips

PRODUCT, CONVOLUTION, ATTENTION = "matrix product", "convolution", "attention"
SORT, SCATTER, COPY, FUSION, COLLECTIVE, OTHER = "sort", "scatter", "copy", "fusion", "collective", "other"
KINDS = (PRODUCT, CONVOLUTION, ATTENTION, SORT, SCATTER, COPY, FUSION, COLLECTIVE, OTHER)

NOT_LAUNCHED = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "reshape"),
    *("after-all", "add-dependency", "opt-barrier", "domain"),
)
MOVES = (
    "transpose",
    "concatenate",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "pad",
    "reverse",
    "copy",
)
SLICES = ("slice", "dynamic-slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place: the position of the operand that is written

TARGETS = (
    (r"__cublas", PRODUCT),
    (r"__cudnn\$conv", CONVOLUTION),
    (r"__cudnn\$fmha", ATTENTION),
    (r"__cub\$.*Sort|.*\bsort", SORT),
)


class Launch(NamedTuple):
    """An instruction that runs as itself, in which computation, and how often in a step."""

    op: Op
    computation: str
    times: int


class Loop(NamedTuple):
    """A loop: its trip count, 1 where it is unknown, and whether its condition is evaluated."""

    trips: int
    tests: bool


def loops(program: Hlo, computation: str | None = None) -> Iterator[Loop]:
    """Yield the loops of a program in its order, each before those inside of it.

    Args:
      program: from ``read_hlo``, scheduled.
      computation: where to begin; None is the entry.
    """
    for op in program.computations.get(computation or program.entry, ()):
        if op.opcode == "while":
            yield Loop(trips(op, program.computations), "known_trip_count" not in op.rest)
        if op.opcode in ("while", "conditional", "call", "call-start", "async-start"):
            for name in called(op):
                yield from loops(program, name)


def launches(program: Hlo, ops: Iterable[Op] | None = None) -> Iterator[Launch]:
    """Yield what a program launches: in loops once per iteration, not what is inside of fusions.

    A loop of unknown length counts as one iteration. Of the branches of a conditional the one with most
    launches counts. A memory copy is a launch, the end of an asynchronous operation is none. A sort, which
    also copies its input, counts as one.

    Args:
      program: from ``read_hlo``.
      ops: some instructions of the program, instead of those of its entry.
    """
    if ops is not None:
        for op in ops:
            yield from _launches(program, op, "", 1)
        return
    for op in program.computations[program.entry]:
        yield from _launches(program, op, program.entry, 1)


def _launches(program: Hlo, op: Op, computation: str, times: int) -> Iterator[Launch]:
    def inside(name: str, more: int = 1) -> Iterator[Launch]:
        for inner in program.computations.get(name, ()):
            yield from _launches(program, inner, name, times * more)

    if op.opcode in NOT_LAUNCHED or op.opcode.endswith(("-done", "-update")):
        return
    if op.opcode == "while":
        count, tests = trips(op, program.computations), "known_trip_count" not in op.rest
        body = re.search(r"body=%?([\w.-]+)", op.rest)
        condition = re.search(r"condition=%?([\w.-]+)", op.rest)
        yield from inside(body[1], count) if body else ()
        yield from inside(condition[1], count) if condition and tests else ()
    elif op.opcode == "conditional":
        branches = [list(inside(name)) for name in called(op)]
        yield from max(branches, key=lambda branch: sum(one.times for one in branch), default=[])
    elif op.opcode in ("call", "call-start", "async-start"):
        for name in called(op):
            yield from inside(name)
    else:
        yield Launch(op, computation, times)


def classify(op: Op, program: Hlo) -> tuple[str, str]:
    """Return the kind of a kernel (one of ``KINDS``) and its name.

    A name is that of the library's function (``__cudnn$convForward``), of XLA's own kernel for products
    (``__triton_gemm``), or of the HLO operation that a fusion is about.
    """
    opcode = op.opcode.removesuffix("-start")
    if opcode in OF_REPLICAS + OF_PARTITIONS:
        return COLLECTIVE, opcode
    if opcode == "custom-call":
        target = _find(r'custom_call_target="([^"]*)"', op.rest) or opcode
        kinds = [kind for pattern, kind in TARGETS if re.match(pattern, target)]
        return (kinds[0] if kinds else OTHER), target
    if opcode == "fusion":
        return _classify_fusion(op, program)
    if opcode in MOVES:
        return COPY, opcode
    return {"dot": PRODUCT, "convolution": CONVOLUTION, "sort": SORT, "scatter": SCATTER}.get(
        opcode, OTHER
    ), opcode


def _classify_fusion(op: Op, program: Hlo) -> tuple[str, str]:
    [fused] = called(op)
    inside = [each.opcode for each in nested(fused, program.computations)]
    backend = _find(r'"fusion_backend_config":\{"kind":"([^"]+)"', op.rest)
    for found, kind in (("dot", PRODUCT), ("scaled-dot", PRODUCT), ("convolution", CONVOLUTION)):
        if found in inside:
            return kind, backend or "fusion"
    for kind in (SORT, SCATTER):
        if kind in inside:
            return kind, "fusion"
    direct = {each.opcode for each in program.computations.get(fused, ())} - {*NOT_LAUNCHED}
    if direct and direct <= {*MOVES}:
        return COPY, next(name for name in MOVES if name in direct)
    if backend:
        return FUSION, backend
    return FUSION, "reduce" if {"reduce", "reduce-window"} & {*inside} else "elementwise"


def traffic(launch: Launch, program: Hlo) -> int:
    """Return the bytes that one run of a kernel reads and writes at least: each operand and result once.

    Of an array that a fusion only slices or gathers from, what it takes; of one that it updates in place,
    what it writes. A kernel that reads an operand several times moves more.
    """
    op = launch.op
    if op.opcode.removesuffix("-start") == "fusion":
        return _fusion_traffic(program.computations.get(called(op)[0], []))
    shapes = {each.name: each.shape for each in program.computations.get(launch.computation, ())}
    read = sum(array_bytes(shapes.get(name, "")) for name in {*operands(op)})
    return read + array_bytes(result_shape(op))


def _fusion_traffic(ops: list[Op]) -> int:
    shapes = {op.name: op.shape for op in ops}
    users: dict[str, list[tuple[Op, int]]] = {}
    for op in ops:
        for at, name in enumerate(operands(op)):
            users.setdefault(name, []).append((op, at))

    def read(name: str) -> int:
        total = 0
        for user, at in users.get(name, ()):
            if user.opcode == "bitcast":
                total += read(user.name)
            elif user.opcode in SLICES and at == 0:
                total += array_bytes(user.shape)
            elif user.opcode not in UPDATES or at != 0:
                total += array_bytes(shapes[name])
        return min(total, array_bytes(shapes[name]))

    def written(op: Op) -> int:
        names = operands(op)
        inputs = [each for each in ops if each.name in names]
        if op.opcode == "tuple":
            return sum(written(each) for each in inputs)
        if op.opcode == "bitcast" and inputs:
            return written(inputs[0])
        if op.opcode in UPDATES:
            return array_bytes(shapes.get(names[UPDATES[op.opcode]], op.shape))
        return array_bytes(op.shape)

    return sum(read(op.name) for op in ops if op.opcode == "parameter") + (written(ops[-1]) if ops else 0)


def _find(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None
