"""Gather, dynamic slices and scatter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from jaxtrain.artifact.onnx.elementwise import INT64
from jaxtrain.artifact.onnx.graph import (
    Dim,
    Graph,
    Shape,
    UnsupportedError,
    Value,
    broadcast_shapes,
    constant,
    is_fixed,
)
from jaxtrain.artifact.onnx.operators import (
    apply,
    cast,
    expand,
    reshape,
    slice_,
    squeeze,
    tensor,
    transpose,
    unsqueeze,
)

Label = tuple[str, int]
"""An axis of a result: ``("index", k)`` of the indices, or ``("operand", k)`` of the operand."""


def gather(g: Graph, eqn: Any, x: Value, index: Value) -> Value:
    """``Slice`` for one constant window, ``Gather`` for one axis, else ``GatherND``."""
    params, out = eqn.params, eqn.outvars[0].aval
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    fills = params["mode"] == GatherScatterMode.FILL_OR_DROP
    columns = _columns(g, index)
    one = all(dim == 1 for dim in index.shape[:-1]) and not numbers.operand_batching_dims
    if one and index.is_constant and _all_inside(columns, numbers.start_index_map, x, sizes):
        starts = [0] * x.rank
        for axis, column in zip(numbers.start_index_map, columns, strict=True):
            starts[axis] = int(column.data.flat[0])
        limits = [start + size for start, size in zip(starts, sizes, strict=True)]
        window = slice_(g, x, starts, limits, [1] * x.rank)
        return reshape(g, squeeze(g, window, numbers.collapsed_slice_dims), out.shape)
    inside: Value | None = None
    if params["mode"] != GatherScatterMode.PROMISE_IN_BOUNDS:
        for number, axis in enumerate(numbers.start_index_map):
            column, limit = columns[number], _extent(g, x.shape[axis] - sizes[axis])
            columns[number] = _clamp(g, column, limit)
            if fills:
                here = apply(
                    g, "And", apply(g, "GreaterOrEqual", column, 0), apply(g, "LessOrEqual", column, limit)
                )
                inside = here if inside is None else apply(g, "And", inside, here)
    labels, result = _points(g, x, columns, numbers, sizes)
    wanted = _output_labels(numbers, x.rank, len(out.shape))
    result = _arrange(g, labels, result, wanted)
    if inside is None or (inside.is_constant and inside.data.all()):
        return result
    mask = dataclasses.replace(inside, shape=tuple(index.shape[:-1]))
    mask = unsqueeze(g, mask, [k for k, (kind, _) in enumerate(wanted) if kind == "operand"])
    return apply(g, "Where", mask, result, _fill(params["fill_value"], x.dtype))


def _columns(g: Graph, index: Value) -> list[Value]:
    """Return the components of the index vectors, int64 and without the last axis."""
    wide, last = cast(g, index, INT64), index.rank - 1
    columns = []
    for number in range(index.shape[-1]):
        starts = [0] * last + [number]
        column = slice_(g, wide, starts, [*index.shape[:-1], number + 1], [1] * index.rank)
        columns.append(squeeze(g, column, [last]))
    return columns


def _all_inside(columns: Sequence[Value], axes: Sequence[int], x: Value, sizes: Sequence[Dim]) -> bool:
    """Whether constant windows are inside the operand, for every batch size."""
    for axis, column in zip(axes, columns, strict=True):
        limit = x.shape[axis] - sizes[axis]
        if (column.data < 0).any() or (is_fixed(limit) and (column.data > limit).any()):
            return False
    return True


def _extent(g: Graph, dim: Dim) -> Value:
    """Return a dimension as an int64 scalar."""
    if is_fixed(dim):
        return constant(np.array(dim, np.int64))
    return Value((), INT64, (), g.node("Squeeze", g.size(dim), np.array([0])))


def _clamp(g: Graph, start: Value, limit: Value) -> Value:
    return apply(g, "Max", apply(g, "Min", start, limit), 0)


def _fill(fill: Any, dtype: Any) -> Value:
    """Return JAX's value for what is outside: NaN, the lowest signed or the highest unsigned integer."""
    if fill is None:
        fill = {"f": np.nan, "b": True}.get(dtype.kind)
    if fill is None:
        fill = np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max
    return constant(np.array(fill, dtype))


def _points(
    g: Graph, x: Value, columns: Sequence[Value], numbers: Any, sizes: Sequence[Dim]
) -> tuple[list[Label], Value]:
    """Gather the windows, and name the axes of the result."""
    batching, on_index = list(numbers.operand_batching_dims), list(numbers.start_indices_batching_dims)
    # A window as large as its axis starts at 0: the axis is not indexed.
    pairs = [
        (axis, column)
        for axis, column in zip(numbers.start_index_map, columns, strict=True)
        if str(sizes[axis]) != str(x.shape[axis]) or axis in numbers.collapsed_slice_dims
    ]
    indexed = [axis for axis, _ in pairs]
    rest = [axis for axis in range(x.rank) if axis not in (*batching, *indexed)]
    index_rank = columns[0].rank if columns else 0
    if len(pairs) == 1 and not batching and sizes[indexed[0]] == 1:
        axis, column = pairs[0]
        labels: list[Label] = [("operand", k) for k in rest]
        labels[axis:axis] = [("index", k) for k in range(index_rank)]
        shape = (*x.shape[:axis], *column.shape, *x.shape[axis + 1 :])
        return labels, tensor(x, g.node("Gather", x, column, axis=axis), shape)
    order = on_index + [k for k in range(index_rank) if k not in on_index]
    windows = [axis for axis in indexed if sizes[axis] != 1]
    labels = [("index", k) for k in order] + [("operand", axis) for axis in (*windows, *rest)]
    parts = []
    for axis, column in pairs:
        part = transpose(g, column, order)
        part = unsqueeze(g, part, range(part.rank, part.rank + len(windows)))
        if axis in windows:
            part = apply(g, "Add", part, _ramp(sizes[axis], windows.index(axis), len(windows)))
        parts.append(part)
    if not parts:
        raise UnsupportedError("it gathers along the batch only")
    common = broadcast_shapes(*(part.shape for part in parts))
    vectors = [unsqueeze(g, dataclasses.replace(part, shape=common), [len(common)]) for part in parts]
    index = (
        vectors[0]
        if len(vectors) == 1
        else tensor(vectors[0], g.node("Concat", *vectors, axis=len(common)), (*common, len(vectors)))
    )
    data = transpose(g, x, [*batching, *indexed, *rest])
    shape = (*common, *(x.shape[axis] for axis in rest))
    return labels, tensor(x, g.node("GatherND", data, index, batch_dims=len(batching)), shape)


def _ramp(size: Dim, place: int, count: int) -> Value:
    """Return the offsets in a window, on axis ``place`` of ``count``."""
    if not is_fixed(size):
        raise UnsupportedError("a window's size depends on the batch")
    return constant(np.arange(size, dtype=np.int64).reshape([-1 if k == place else 1 for k in range(count)]))


def _output_labels(numbers: Any, operand_rank: int, rank: int) -> list[Label]:
    """Return what each axis of the gather's output is."""
    hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    operand = iter([axis for axis in range(operand_rank) if axis not in hidden])
    index = iter(range(rank))
    return [
        ("operand", next(operand)) if k in numbers.offset_dims else ("index", next(index))
        for k in range(rank)
    ]


def _arrange(g: Graph, labels: list[Label], value: Value, wanted: list[Label]) -> Value:
    """Bring axes into order; those that are missing have size 1."""
    present = [label for label in wanted if label in labels]
    value = transpose(g, value, [labels.index(label) for label in present])
    return unsqueeze(g, value, [k for k, label in enumerate(wanted) if label not in labels])


def dynamic_slice(g: Graph, eqn: Any, x: Value, *starts: Value) -> Value:
    """``Slice`` where the start is constant, else ``Gather`` of consecutive positions."""
    for axis, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        if str(size) == str(x.shape[axis]):
            continue
        room = x.shape[axis] - size
        if start.is_constant and (is_fixed(room) or int(start.data) <= 0):
            first = min(max(int(start.data), 0), room) if is_fixed(room) else 0
            limits = [first + size if k == axis else dim for k, dim in enumerate(x.shape)]
            x = slice_(g, x, [first if k == axis else 0 for k in range(x.rank)], limits, [1] * x.rank)
            continue
        first_ = _clamp(g, cast(g, start, INT64), _extent(g, room))
        index = apply(g, "Add", first_, _ramp(size, 0, 1))
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        x = tensor(x, g.node("Gather", x, index, axis=axis), shape)
    return x


def dynamic_update_slice(g: Graph, eqn: Any, x: Value, update: Value, *starts: Value) -> Value:
    """Select the update where its window is; ``Gather`` moves it there."""
    clamped = [
        _clamp(g, cast(g, start, INT64), _extent(g, dim - size))
        for start, dim, size in zip(starts, x.shape, update.shape, strict=True)
    ]
    moved, inside = _place(g, x.shape, update, clamped)
    return moved if inside is None else _where(g, inside, moved, x)


def _place(g: Graph, shape: Shape, update: Value, starts: Sequence[Value]) -> tuple[Value, Value | None]:
    """Return ``update`` moved to ``starts`` in ``shape``, and where it is; None if everywhere."""
    inside: Value | None = None
    for axis, start in enumerate(starts):
        dim, size = shape[axis], update.shape[axis]
        if str(dim) == str(size):
            continue
        if not (is_fixed(dim) and is_fixed(size)):
            raise UnsupportedError("it changes a part of the batch")
        position = apply(g, "Sub", constant(np.arange(dim, dtype=np.int64)), start)
        here = apply(g, "And", apply(g, "GreaterOrEqual", position, 0), apply(g, "Less", position, size))
        here = unsqueeze(g, here, [k for k in range(len(shape)) if k != axis])
        inside = here if inside is None else apply(g, "And", inside, here)
        index = expand(g, _clamp(g, position, constant(np.array(size - 1, np.int64))))
        moved = (*update.shape[:axis], dim, *update.shape[axis + 1 :])
        update = tensor(update, g.node("Gather", update, index, axis=axis), moved)
    return update, inside


def _where(g: Graph, condition: Value, yes: Value, no: Value) -> Value:
    return apply(g, "Where", condition, yes, no)


def scatter(g: Graph, eqn: Any, x: Value, index: Value, update: Value) -> Value:
    """One window that is set or added; or ``ScatterND`` of points that are set."""
    params, adds = eqn.params, eqn.primitive.name == "scatter-add"
    numbers = params["dimension_numbers"]
    columns, axes = _columns(g, index), list(numbers.scatter_dims_to_operand_dims)
    hidden = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    if numbers.operand_batching_dims:
        raise UnsupportedError("a scatter with batch dimensions has no equivalent in TensorRT")
    if index.rank == 1:
        window = unsqueeze(g, update, hidden)
        limits = {axis: x.shape[axis] - window.shape[axis] for axis in axes}
        sizes = [window.shape[axis] for axis in range(x.rank)]
        if params["mode"] != GatherScatterMode.PROMISE_IN_BOUNDS and not (
            index.is_constant and _all_inside(columns, axes, x, sizes)
        ):
            columns = [
                _clamp(g, column, _extent(g, limits[axis]))
                for axis, column in zip(axes, columns, strict=True)
            ]
            if params["mode"] == GatherScatterMode.FILL_OR_DROP:
                raise UnsupportedError("it sets a window that may be outside: use mode='clip'")
        zero = constant(np.zeros((), np.int64))
        starts = [columns[axes.index(axis)] if axis in axes else zero for axis in range(x.rank)]
        moved, inside = _place(g, x.shape, window, starts)
        moved = apply(g, "Add", x, moved) if adds else moved
        return moved if inside is None else _where(g, inside, moved, x)
    return _scatter_points(g, params, x, index, update, columns, adds)


def _scatter_points(
    g: Graph, params: Any, x: Value, index: Value, update: Value, columns: list[Value], adds: bool
) -> Value:
    numbers = params["dimension_numbers"]
    axes, inserted = list(numbers.scatter_dims_to_operand_dims), list(numbers.inserted_window_dims)
    if adds or sorted(axes) != sorted(inserted):
        raise UnsupportedError("TensorRT has no scatter that adds, or of windows")
    ones = [1] * x.rank
    if params["mode"] != GatherScatterMode.PROMISE_IN_BOUNDS and not (
        index.is_constant and _all_inside(columns, axes, x, ones)
    ):
        raise UnsupportedError(
            "it sets elements whose positions may be outside: use mode='promise_in_bounds'"
        )
    rest = [axis for axis in range(x.rank) if axis not in axes]
    windows = list(numbers.update_window_dims)
    order = [k for k in range(update.rank) if k not in windows] + windows
    data, updates = transpose(g, x, [*axes, *rest]), transpose(g, update, order)
    result = tensor(x, g.node("ScatterND", data, cast(g, index, INT64), updates), data.shape)
    return transpose(g, result, np.argsort([*axes, *rest]))


INDEXING: dict[str, Any] = {
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
    "scatter": scatter,
    "scatter-add": scatter,
}
"""Rules ``(graph, equation, *values) -> value``."""
