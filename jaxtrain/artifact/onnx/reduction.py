"""Reductions, running reductions, products of matrices, and sorting."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxtrain.artifact.onnx.elementwise import BOOL, INT32, INT64, logarithm_of_one_plus, widen
from jaxtrain.artifact.onnx.graph import Graph, UnsupportedError, Value, constant, is_fixed
from jaxtrain.artifact.onnx.operators import (
    apply,
    cast,
    matmul,
    pad,
    product,
    reshape,
    tensor,
    transpose,
)

LARGEST_SORTED = 3840
"""TensorRT's ``TopK`` takes fewer than this many elements."""


def reduce(kind: str) -> Any:
    """Return the rule of a reduction that is one operator."""

    def rule(g: Graph, eqn: Any, x: Value) -> Value:
        out, axes = eqn.outvars[0].aval, [int(axis) for axis in eqn.params["axes"]]
        if not axes:
            return x
        wide = widen(g, x)
        return cast(g, tensor(wide, _reduce(g, kind, wide, axes), out.shape), out.dtype)

    return rule


def _reduce(g: Graph, kind: str, x: Value, axes: list[int]) -> str:
    if kind == "ReduceSum":  # the only one whose axes are an input in opset 17
        return g.node(kind, x, np.array(axes, np.int64), keepdims=0)
    return g.node(kind, x, axes=axes, keepdims=0)


def reduce_xor(g: Graph, eqn: Any, x: Value) -> Value:
    if x.dtype != BOOL:
        raise UnsupportedError("TensorRT has no bitwise operators of integers")
    wide = cast(g, x, INT32)
    total = tensor(wide, _reduce(g, "ReduceSum", wide, list(eqn.params["axes"])), eqn.outvars[0].aval.shape)
    return cast(g, apply(g, "Mod", total, 2), BOOL)


def arg(kind: str) -> Any:
    """Return the rule of argmax or argmin: the first of equal elements."""

    def rule(g: Graph, eqn: Any, x: Value) -> Value:
        out = eqn.outvars[0].aval
        (axis,) = eqn.params["axes"]
        index = g.node(kind, widen(g, x), axis=int(axis), keepdims=0)
        return cast(g, Value(out.shape, INT64, out.shape, index), out.dtype)

    return rule


def cumsum(g: Graph, eqn: Any, x: Value) -> Value:
    wide, axis = widen(g, x), np.array(eqn.params["axis"], np.int64)
    out = tensor(wide, g.node("CumSum", wide, axis, reverse=int(eqn.params["reverse"])), x.shape)
    return cast(g, out, x.dtype)


def running(kind: str) -> Any:
    """Return the rule of another running reduction, by doubling (Hillis and Steele 1986).

    After step k every element is combined with the ``2**k - 1`` before it.
    """

    def combine(g: Graph, a: Value, b: Value) -> Value:
        if kind != "LogAddExp":
            return apply(g, kind, a, b)
        gap = apply(g, "Neg", apply(g, "Abs", apply(g, "Sub", a, b)))
        return apply(g, "Add", apply(g, "Max", a, b), logarithm_of_one_plus(g, apply(g, "Exp", gap)))

    def rule(g: Graph, eqn: Any, x: Value) -> Value:
        axis, reverse = eqn.params["axis"], eqn.params["reverse"]
        count, wide = x.shape[axis], widen(g, x)
        if not is_fixed(count):
            raise UnsupportedError("it runs along the batch")
        fill, step = constant(np.array(_neutral(kind, wide.dtype), wide.dtype)), 1
        while step < count:
            pads = [(0, 0)] * x.rank
            pads[axis] = (-step, step) if reverse else (step, -step)
            wide = combine(g, wide, pad(g, wide, fill, pads))
            step *= 2
        return cast(g, wide, x.dtype)

    return rule


def _neutral(kind: str, dtype: Any) -> Any:
    if kind == "Mul":
        return 1
    limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    if kind == "LogAddExp":  # finite: the difference of two infinities is NaN
        return limits.min
    if dtype.kind == "f":
        return np.inf if kind == "Min" else -np.inf
    return limits.max if kind == "Min" else limits.min


def dot_general(g: Graph, eqn: Any, a: Value, b: Value) -> Value:
    """Move axes to ``[batch..., rows, contracted]`` and ``[batch..., contracted, columns]``, and multiply."""
    (contract_a, contract_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    out = eqn.outvars[0].aval
    rows = [k for k in range(a.rank) if k not in (*contract_a, *batch_a)]
    columns = [k for k in range(b.rank) if k not in (*contract_b, *batch_b)]
    # The batch axes of a product broadcast in MatMul; a matrix of weights needs no reshape of the other side.
    a, b = (widen(g, x) for x in (a, b))
    size = product([a.shape[k] for k in contract_a])
    lead = [a.shape[k] for k in batch_a]
    left = transpose(g, a, [*batch_a, *rows, *contract_a])
    right = transpose(g, b, [*batch_b, *contract_b, *columns])
    right = reshape(g, right, [*lead, size, product([b.shape[k] for k in columns])])
    row_dims = [a.shape[k] for k in rows]
    if lead or not row_dims:
        row_dims = [product(row_dims)]
    left = reshape(g, left, [*lead, *row_dims, size])
    result = matmul(g, left, right, [*lead, *row_dims, right.shape[-1]])
    return cast(g, reshape(g, result, out.shape), out.dtype)


def sort(g: Graph, eqn: Any, *xs: Value) -> list[Value]:
    """Sort by the last key first; ``TopK`` keeps the order of equal elements."""
    axis, results = eqn.params["dimension"], list(xs)
    for number in reversed(range(eqn.params["num_keys"])):
        key = results[number]
        values, index = _top(g, key, axis, key.shape[axis], largest=0)
        results = [
            cast(g, values, x.dtype) if k == number else tensor(x, _take(g, x, index, axis), x.shape)
            for k, x in enumerate(results)
        ]
    return results


def top_k(g: Graph, eqn: Any, x: Value) -> list[Value]:
    axis = eqn.params.get("axis", x.rank - 1)
    values, index = _top(g, x, axis, eqn.params["k"], largest=1)
    positions = Value(values.shape, INT64, values.shape, index)
    return [cast(g, values, x.dtype), cast(g, positions, eqn.outvars[1].aval.dtype)]


def _top(g: Graph, x: Value, axis: int, k: Any, largest: int) -> tuple[Value, str]:
    if not is_fixed(x.shape[axis]):
        raise UnsupportedError("it sorts the batch")
    if k >= LARGEST_SORTED:
        raise UnsupportedError(f"it sorts {k} elements, and TensorRT sorts fewer than {LARGEST_SORTED}")
    wide = widen(g, x)
    values, index = g.multi(
        "TopK", wide, np.array([k], np.int64), outputs=2, axis=axis, largest=largest, sorted=1
    )
    shape = (*x.shape[:axis], k, *x.shape[axis + 1 :])
    return tensor(wide, values, shape), index


def _take(g: Graph, x: Value, index: str, axis: int) -> str:
    return g.node("GatherElements", x, index, axis=axis)


def logical_reduction(kind: str) -> Any:
    """Return the rule of all or any, computed in int32."""

    def rule(g: Graph, eqn: Any, x: Value) -> Value:
        if x.dtype != BOOL:
            raise UnsupportedError("TensorRT has no bitwise operators of integers")
        return reduce(kind)(g, eqn, x)

    return rule


REDUCTION: dict[str, Any] = {
    "argmax": arg("ArgMax"),
    "argmin": arg("ArgMin"),
    "cumlogsumexp": running("LogAddExp"),
    "cummax": running("Max"),
    "cummin": running("Min"),
    "cumprod": running("Mul"),
    "cumsum": cumsum,
    "dot_general": dot_general,
    "reduce_and": logical_reduction("ReduceMin"),
    "reduce_max": reduce("ReduceMax"),
    "reduce_min": reduce("ReduceMin"),
    "reduce_or": logical_reduction("ReduceMax"),
    "reduce_prod": reduce("ReduceProd"),
    "reduce_sum": reduce("ReduceSum"),
    "reduce_xor": reduce_xor,
    "sort": sort,
    "top_k": top_k,
}
"""Rules ``(graph, equation, *values) -> value or values``."""
