"""Operators on values, computed at once where all inputs are constants: what the rules are written in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxtrain.artifact.onnx.graph import (
    Dim,
    Graph,
    Shape,
    Value,
    affine,
    broadcast_shapes,
    constant,
    element_type,
    is_fixed,
    is_static,
    onnx_dtype,
)

LARGEST = np.iinfo(np.int64).max
COMPARISONS = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN", "IsInf"})


def _divide(a: Any, b: Any) -> Any:
    """Divide as ONNX does: integers are rounded to zero."""
    return np.divide(a, b) if a.dtype.kind == "f" else (a - np.fmod(a, b)) // b


FOLD: dict[str, Callable[..., Any]] = {
    "Abs": np.abs,
    "Add": np.add,
    "And": np.logical_and,
    "Ceil": np.ceil,
    "Cos": np.cos,
    "Div": _divide,
    "Equal": np.equal,
    "Exp": np.exp,
    "Floor": np.floor,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Log": np.log,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Pow": np.power,
    "Reciprocal": np.reciprocal,
    "Sign": np.sign,
    "Sin": np.sin,
    "Sqrt": np.sqrt,
    "Sub": np.subtract,
    "Tanh": np.tanh,
    "Where": np.where,
    "Xor": np.logical_xor,
}
"""NumPy's functions of operators: constants are computed with them, which takes no compilation."""


def apply(g: Graph, kind: str, *inputs: Any, **attributes: Any) -> Value:
    """Apply an elementwise operator; its inputs broadcast by NumPy's rules.

    Args:
      g: the graph.
      kind: ONNX operator.
      *inputs: values; a Python number takes the dtype of the first value.
      **attributes: of the operator.
    """
    first = next(x for x in inputs if isinstance(x, Value) and (kind != "Where" or x is not inputs[0]))
    values = [x if isinstance(x, Value) else constant(np.array(x, first.dtype)) for x in inputs]
    shape = broadcast_shapes(*(value.shape for value in values))
    if kind in FOLD and all(value.is_constant for value in values):
        label = next((value.label for value in values if value.label), "")
        with np.errstate(all="ignore"):
            data = np.asarray(FOLD[kind](*(value.data for value in values)))
        return constant(data, label, shape)
    stored = broadcast_shapes(*(value.stored for value in values))
    name = g.node(kind, *(g.stored(value) for value in values), **attributes)
    dtype = np.dtype(bool) if kind in COMPARISONS else first.dtype
    return Value(shape, dtype, stored, name)


def cast(g: Graph, value: Value, dtype: Any) -> Value:
    """Convert to a dtype (half precision is float32)."""
    dtype = onnx_dtype(dtype)
    if value.dtype == dtype:
        return value
    if value.is_constant:
        return constant(value.data.astype(dtype), value.label, value.shape)
    name = g.node("Cast", g.stored(value), to=element_type(dtype))
    return Value(value.shape, dtype, value.stored, name)


def tensor(value: Value, name: str, shape: Sequence[Dim]) -> Value:
    """Return the value of a node's output, with the dtype of ``value``."""
    return Value(tuple(shape), value.dtype, tuple(shape), name)


def expand(g: Graph, value: Value) -> Value:
    """Return ``value`` stored in its full shape; a constant stays one if its shape has no batch size."""
    if value.is_constant and is_static(value.shape):
        return constant(np.broadcast_to(value.data, value.shape), value.label)
    return tensor(value, g.full(value), value.shape)


def transpose(g: Graph, value: Value, permutation: Iterable[Any]) -> Value:
    """Permute axes, as ``numpy.transpose``."""
    order = [int(axis) for axis in permutation]
    if order == list(range(value.rank)):
        return value
    shape = tuple(value.shape[axis] for axis in order)
    if value.is_constant:
        data = value.data.reshape((1,) * (value.rank - value.data.ndim) + value.data.shape)
        return constant(np.transpose(data, order), value.label, shape)
    return tensor(value, g.node("Transpose", value, perm=order), shape)


def reshape(g: Graph, value: Value, shape: Sequence[Dim]) -> Value:
    """Change the shape; at most one dimension may depend on the batch size."""
    shape = tuple(shape)
    if tuple(map(str, shape)) == tuple(map(str, value.shape)):
        return value
    value = expand(g, value)
    if value.is_constant:
        return constant(np.reshape(value.data, shape), value.label)
    dynamic = [k for k, dim in enumerate(shape) if not is_fixed(dim)]
    target = [dim if is_fixed(dim) else -1 for dim in shape]
    if len(dynamic) > 1:
        return tensor(value, g.node("Reshape", value, g.dims(shape)), shape)
    if dynamic and dynamic[0] < value.rank and str(shape[dynamic[0]]) == str(value.shape[dynamic[0]]):
        target[dynamic[0]] = 0  # keeps the dimension, and its name in shape inference
    return tensor(value, g.node("Reshape", value, np.array(target, np.int64)), shape)


def unsqueeze(g: Graph, value: Value, axes: Sequence[int]) -> Value:
    """Insert axes of size 1, numbered as in the result."""
    if not axes:
        return value
    value = expand(g, value) if len(value.stored) != value.rank else value
    rank = value.rank + len(axes)

    def insert(dims: Shape) -> Shape:
        rest = iter(dims)
        return tuple(1 if axis in axes else next(rest) for axis in range(rank))

    shape, stored = insert(value.shape), insert(value.stored)
    if value.is_constant:
        return constant(value.data.reshape(stored), value.label, shape)
    name = g.node("Unsqueeze", g.stored(value), np.array(axes, np.int64))
    return Value(shape, value.dtype, stored, name)


def squeeze(g: Graph, value: Value, axes: Sequence[int]) -> Value:
    """Remove axes of size 1."""
    if not axes:
        return value
    shape = tuple(dim for axis, dim in enumerate(value.shape) if axis not in axes)
    if value.is_constant:
        data = value.data.reshape((1,) * (value.rank - value.data.ndim) + value.data.shape)
        return constant(np.squeeze(data, tuple(axes)), value.label, shape)
    return tensor(value, g.node("Squeeze", value, np.array(axes, np.int64)), shape)


def slice_(
    g: Graph, value: Value, starts: Sequence[Dim], limits: Sequence[Dim], steps: Sequence[int]
) -> Value:
    """Cut ``starts[k]:limits[k]:steps[k]`` of every axis, steps positive; entire axes are left out."""
    kept: list[tuple[int, Dim, Dim, int]] = []
    shape: list[Dim] = []
    for axis, (start, limit, step, dim) in enumerate(zip(starts, limits, steps, value.shape, strict=True)):
        if str(start) == "0" and str(limit) == str(dim) and step == 1:
            shape.append(dim)
            continue
        kept.append((axis, _position(start, dim), _position(limit, dim), step))
        shape.append(limit - start if step == 1 else -(-(limit - start) // step))
    if not kept:
        return value
    if value.is_constant and is_static(value.shape):
        index = [slice(None)] * value.rank
        for axis, start, limit, step in kept:
            index[axis] = slice(start, limit, step)
        return constant(np.broadcast_to(value.data, value.shape)[tuple(index)], value.label)
    axes, first, last, stride = (list(column) for column in zip(*kept, strict=True))
    fixed = np.array(axes, np.int64), np.array(stride, np.int64)
    return tensor(value, g.node("Slice", value, g.dims(first), g.dims(last), *fixed), shape)


def _position(position: Dim, dim: Dim) -> Dim:
    """Return a position on an axis as ONNX's Slice counts it, from the end where that needs no batch size."""
    if is_fixed(position):
        return int(position)
    (factor, offset), (whole, rest) = affine(position), affine(dim)
    if factor != whole or offset > rest:
        return position
    return LARGEST if offset == rest else offset - rest


def flip(g: Graph, value: Value, axes: Sequence[int]) -> Value:
    """Reverse axes."""
    if value.is_constant and is_static(value.shape):
        return constant(np.flip(np.broadcast_to(value.data, value.shape), tuple(axes)), value.label)
    count = len(axes)
    first, last = np.full(count, -1), np.full(count, -LARGEST)
    return tensor(
        value, g.node("Slice", value, first, last, np.array(axes, np.int64), np.full(count, -1)), value.shape
    )


def pad(g: Graph, value: Value, fill: Value, pads: Sequence[tuple[int, int]]) -> Value:
    """Pad the ends of every axis with a scalar; a negative pad crops."""
    crop = [(max(0, -low), max(0, -high)) for low, high in pads]
    limits = [dim - high for dim, (_, high) in zip(value.shape, crop, strict=True)]
    value = slice_(g, value, [low for low, _ in crop], limits, [1] * value.rank)
    pads = [(max(0, low), max(0, high)) for low, high in pads]
    if not any(low or high for low, high in pads):
        return value
    shape = tuple(dim + low + high for dim, (low, high) in zip(value.shape, pads, strict=True))
    if value.is_constant and fill.is_constant and is_static(value.shape):
        data = np.broadcast_to(value.data, value.shape)
        return constant(np.pad(data, pads, constant_values=fill.data.item()), value.label)
    amounts = np.array([low for low, _ in pads] + [high for _, high in pads], np.int64)
    if value.dtype in (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int32), np.dtype(np.int64)):
        return tensor(value, g.node("Pad", value, amounts, fill), shape)
    wide = cast(g, value, np.int32)
    padded = tensor(wide, g.node("Pad", wide, amounts, cast(g, fill, np.int32)), shape)
    return cast(g, padded, value.dtype)


def matmul(g: Graph, a: Value, b: Value, shape: Sequence[Dim]) -> Value:
    """Multiply the last two axes, as ``numpy.matmul``; ``shape`` is the result's."""
    return tensor(a, g.node("MatMul", a, b), shape)


def product(dims: Sequence[Dim]) -> Dim:
    """Return the product of dimensions."""
    return math.prod(dims, start=1)
