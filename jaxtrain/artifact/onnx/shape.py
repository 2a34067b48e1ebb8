"""Primitives that move, repeat or join elements without computing."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxtrain.artifact.onnx.graph import Graph, UnsupportedError, Value, constant, is_static, onnx_dtype
from jaxtrain.artifact.onnx.operators import (
    cast,
    expand,
    flip,
    pad,
    reshape,
    slice_,
    squeeze,
    tensor,
    transpose,
    unsqueeze,
)


def broadcast_in_dim(g: Graph, eqn: Any, x: Value, *_: Value) -> Value:
    """Insert axes of size 1; consumers broadcast them."""
    shape, kept = tuple(eqn.outvars[0].aval.shape), eqn.params["broadcast_dimensions"]
    if not x.stored:
        return Value(shape, x.dtype, (), x.name, x.data, x.label)
    wide = unsqueeze(g, x, [axis for axis in range(len(shape)) if axis not in kept])
    return Value(shape, x.dtype, wide.stored, wide.name, wide.data, wide.label)


def reshape_rule(g: Graph, eqn: Any, x: Value, *_: Value) -> Value:
    order = eqn.params["dimensions"]
    return reshape(g, x if order is None else transpose(g, x, order), eqn.outvars[0].aval.shape)


def iota(g: Graph, eqn: Any, *_: Value) -> Value:
    """Count along one axis: a constant, or ``Range`` along the batch."""
    shape, axis = tuple(eqn.outvars[0].aval.shape), eqn.params["dimension"]
    dtype = onnx_dtype(eqn.params["dtype"])
    stored = tuple(dim if k == axis else 1 for k, dim in enumerate(shape))
    if is_static(stored):
        return constant(np.arange(shape[axis]).astype(dtype).reshape(stored), shape=shape)
    count = g.node("Squeeze", g.size(shape[axis]), np.array([0]))
    line = g.node("Range", np.array(0), count, np.array(1))
    row = Value((shape[axis],), np.dtype(np.int64), (shape[axis],), line)
    row = unsqueeze(g, cast(g, row, dtype), [k for k in range(len(shape)) if k != axis])
    return Value(shape, dtype, row.stored, row.name)


def dim_as_value(g: Graph, eqn: Any) -> Value:
    """The batch size as a scalar."""
    name = g.node("Squeeze", g.size(eqn.params["dim"]), np.array([0]))
    return cast(g, Value((), np.dtype(np.int64), (), name), eqn.outvars[0].aval.dtype)


def concatenate(g: Graph, eqn: Any, *xs: Value) -> Value:
    return tensor(xs[0], g.node("Concat", *xs, axis=eqn.params["dimension"]), eqn.outvars[0].aval.shape)


def stack(g: Graph, eqn: Any, *xs: Value) -> Value:
    axis = eqn.params["axis"]
    rows = [unsqueeze(g, x, [axis]) for x in xs]
    return tensor(xs[0], g.node("Concat", *rows, axis=axis), eqn.outvars[0].aval.shape)


def unstack(g: Graph, eqn: Any, x: Value) -> list[Value]:
    axis, count = eqn.params["axis"], len(eqn.outvars)
    parts = []
    for k in range(count):
        limits = [k + 1 if n == axis else dim for n, dim in enumerate(x.shape)]
        part = slice_(g, x, [k if n == axis else 0 for n in range(x.rank)], limits, [1] * x.rank)
        parts.append(squeeze(g, part, [axis]))
    return parts


def tile(g: Graph, eqn: Any, x: Value) -> Value:
    return tensor(x, g.node("Tile", x, g.dims(eqn.params["reps"])), eqn.outvars[0].aval.shape)


def split(g: Graph, eqn: Any, x: Value) -> list[Value]:
    sizes, axis = eqn.params["sizes"], eqn.params["axis"]
    if not is_static(sizes):
        raise UnsupportedError("it splits the batch")
    if len(sizes) == 1:
        return [x]
    names = g.multi("Split", x, np.array(sizes, np.int64), outputs=len(sizes), axis=axis)
    return [tensor(x, name, var.aval.shape) for name, var in zip(names, eqn.outvars, strict=True)]


def slice_rule(g: Graph, eqn: Any, x: Value) -> Value:
    params = eqn.params
    steps = params["strides"] or (1,) * x.rank
    return slice_(g, x, params["start_indices"], params["limit_indices"], steps)


def pad_rule(g: Graph, eqn: Any, x: Value, fill: Value) -> Value:
    """Pad; interior padding inserts an axis, pads it, and merges it."""
    config = eqn.params["padding_config"]
    for axis, (_, _, interior) in enumerate(config):
        if not interior:
            continue
        size = x.shape[axis]
        x = unsqueeze(g, x, [axis + 1])
        x = pad(g, x, fill, [(0, interior if k == axis + 1 else 0) for k in range(x.rank)])
        merged = size * (interior + 1)
        x = reshape(g, x, (*x.shape[:axis], merged, *x.shape[axis + 2 :]))
        limits = [dim - (interior if k == axis else 0) for k, dim in enumerate(x.shape)]
        x = slice_(g, x, [0] * x.rank, limits, [1] * x.rank)
    return pad(g, x, fill, [(low, high) for low, high, _ in config])


def identity(g: Graph, eqn: Any, x: Value, *_: Value) -> Value:
    return x


IDENTITY = (
    *("copy", "copy_p", "device_put", "mesh_cast", "name", "pvary", "reduce_precision", "reshard"),
    *("sharding_constraint", "stop_gradient"),
)

SHAPE: dict[str, Any] = {
    **dict.fromkeys(IDENTITY, identity),
    "broadcast_in_dim": broadcast_in_dim,
    "concatenate": concatenate,
    "dim_as_value": dim_as_value,
    "expand_dims": lambda g, eqn, x: unsqueeze(g, x, eqn.params["dimensions"]),
    "iota": iota,
    "optimization_barrier": lambda g, eqn, *xs: list(xs),
    "pad": pad_rule,
    "reshape": reshape_rule,
    "rev": lambda g, eqn, x: flip(g, expand(g, x), eqn.params["dimensions"]),
    "slice": slice_rule,
    "split": split,
    "squeeze": lambda g, eqn, x: squeeze(g, x, eqn.params["dimensions"]),
    "stack": stack,
    "tie": lambda g, eqn, _, x: x,
    "tile": tile,
    "transpose": lambda g, eqn, x: transpose(g, x, eqn.params["permutation"]),
    "unstack": unstack,
}
"""Rules ``(graph, equation, *values) -> value or values``."""
