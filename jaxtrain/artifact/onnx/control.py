"""Calls, loops and branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import helper

from jaxtrain.artifact.onnx.graph import Graph, UnsupportedError, Value, constant, is_fixed, value_info
from jaxtrain.artifact.onnx.operators import apply, flip, slice_, squeeze, tensor, unsqueeze

LONGEST_UNROLLED = 8
"""Steps of a scan that are written out instead of a ``Loop``."""


def call(g: Graph, eqn: Any, *xs: Value) -> list[Value]:
    """Write the equations of a called function in place of the call."""
    params = eqn.params
    inner = next(params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params)
    return g.root.evaluate(g, inner, xs, g.root.layer)


def scan(g: Graph, eqn: Any, *xs: Value) -> list[Value]:
    """Write a short scan out; else use ``Loop``, which TensorRT documents for more types than ``Scan``."""
    params, layer = eqn.params, g.root.layer
    constants, carries = params["num_consts"], params["num_carry"]
    fixed, carry, sequences = xs[:constants], xs[constants : constants + carries], xs[constants + carries :]
    length, reverse, jaxpr = params["length"], params["reverse"], params["jaxpr"]
    if not is_fixed(length):
        raise UnsupportedError("it scans over the batch: TensorRT needs a constant number of steps")
    if length <= LONGEST_UNROLLED:
        return _unrolled(g, eqn, fixed, carry, sequences)
    body = Graph(g)
    step = body.declare(body.fresh("step"), (), np.int64)
    more = body.declare(body.fresh("more"), (), bool)
    inputs = _declare(body, carry)
    place = apply(body, "Sub", constant(np.array(length - 1)), step) if reverse else step
    slices = [tensor(x, body.node("Gather", x, place, axis=0), x.shape[1:]) for x in sequences]
    outs = g.root.evaluate(body, jaxpr, [*fixed, *inputs, *slices], layer)
    results = _loop(g, body, [step, more, *inputs], more, outs, [np.array(length), np.array(True), *carry])
    values = [
        tensor(out, name, out.shape if k < carries else (length, *out.shape))
        for k, (name, out) in enumerate(zip(results, outs, strict=True))
    ]
    return values[:carries] + [flip(g, y, [0]) if reverse else y for y in values[carries:]]


def _unrolled(g: Graph, eqn: Any, fixed: Any, carry: Any, sequences: Any) -> list[Value]:
    params, layer = eqn.params, g.root.layer
    length, carries = params["length"], params["num_carry"]
    collected: list[list[Value]] = []
    steps = range(length)[::-1] if params["reverse"] else range(length)
    for t in steps:
        rows = []
        for x in sequences:
            limits = [t + 1, *x.shape[1:]]
            row = slice_(g, x, [t] + [0] * (x.rank - 1), limits, [1] * x.rank)
            rows.append(squeeze(g, row, [0]))
        outs = g.root.evaluate(g, params["jaxpr"], [*fixed, *carry, *rows], layer)
        carry = outs[:carries]
        collected.append([unsqueeze(g, y, [0]) for y in outs[carries:]])
    if params["reverse"]:
        collected.reverse()
    stacked = []
    for var, ys in zip(eqn.outvars[carries:], zip(*collected, strict=True), strict=False):
        stacked.append(tensor(ys[0], g.node("Concat", *ys, axis=0), var.aval.shape))
    return [*carry, *stacked]


def while_(g: Graph, eqn: Any, *xs: Value) -> list[Value]:
    """``Loop`` without a number of steps."""
    params, layer = eqn.params, g.root.layer
    first, second = params["cond_nconsts"], params["body_nconsts"]
    tests, fixed, carry = xs[:first], xs[first : first + second], xs[first + second :]
    (start,) = g.root.evaluate(g, params["cond_jaxpr"], [*tests, *carry], layer)
    body = Graph(g)
    step = body.declare(body.fresh("step"), (), np.int64)
    more = body.declare(body.fresh("more"), (), bool)
    inputs = _declare(body, carry)
    outs = g.root.evaluate(body, params["body_jaxpr"], [*fixed, *inputs], layer)
    (again,) = g.root.evaluate(body, params["cond_jaxpr"], [*tests, *outs], layer)
    names = _loop(g, body, [step, more, *inputs], again, outs, [None, start, *carry])
    return [tensor(out, name, out.shape) for name, out in zip(names, outs, strict=True)]


def _declare(body: Graph, carry: Sequence[Value]) -> list[Value]:
    return [body.declare(body.fresh("carry"), x.shape, x.dtype) for x in carry]


def _loop(
    g: Graph, body: Graph, inputs: list[Value], more: Value, outs: Sequence[Value], arguments: list[Any]
) -> tuple[str, ...]:
    graph = _close(body, inputs, [more, *outs], "body")
    return g.multi("Loop", *arguments, outputs=len(outs), here=True, body=graph)


def _close(graph: Graph, inputs: Sequence[Value], outs: Sequence[Value], name: str) -> Any:
    """Return the subgraph; each of its outputs is a tensor of its own."""
    names = [graph.node("Identity", out, here=True) for out in outs]
    return helper.make_graph(
        graph.nodes,
        graph.fresh(name),
        [value_info(str(x.name), x.shape, x.dtype) for x in inputs],
        [value_info(name, out.shape, out.dtype) for name, out in zip(names, outs, strict=True)],
    )


def cond(g: Graph, eqn: Any, index: Value, *xs: Value) -> list[Value]:
    """``If``, nested for more than two branches; a constant index selects while exporting."""
    branches = eqn.params["branches"]
    if index.is_constant:
        chosen = min(max(int(index.data), 0), len(branches) - 1)
        return g.root.evaluate(g, branches[chosen], xs, g.root.layer)
    return _switch(g, index, branches, xs, 0, g.root.layer)


def _switch(g: Graph, index: Value, branches: Any, xs: Any, number: int, layer: str) -> list[Value]:
    if number == len(branches) - 1:
        return g.root.evaluate(g, branches[number], xs, layer)
    here = apply(g, "LessOrEqual", index, number)
    yes, no = Graph(g, is_branch=True), Graph(g, is_branch=True)
    outs = g.root.evaluate(yes, branches[number], xs, layer)
    others = _switch(no, index, branches, xs, number + 1, layer)
    names = g.multi(
        "If",
        here,
        outputs=len(outs),
        here=True,
        then_branch=_close(yes, [], outs, "then"),
        else_branch=_close(no, [], others, "else"),
    )
    return [tensor(out, name, out.shape) for name, out in zip(names, outs, strict=True)]


def platform_index(g: Graph, eqn: Any) -> Value:
    """The branch that is not for one kind of device."""
    platforms = list(eqn.params["platforms"])
    number = platforms.index(None) if None in platforms else len(platforms) - 1
    return constant(np.array(number, np.int32))


CALLS = frozenset(
    {"call", "checkpoint", "closed_call", "composite", "core_call", "custom_jvp_call", "custom_vjp_call"}
    | {"jit", "pjit", "remat", "remat2"}
)

CONTROL: dict[str, Any] = {
    **dict.fromkeys(CALLS, call),
    "cond": cond,
    "platform_index": platform_index,
    "scan": scan,
    "while": while_,
}
"""Rules ``(graph, equation, *values) -> value or values``."""
