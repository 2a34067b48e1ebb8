"""Convolutions and pooling, which ONNX defines for ``[batch, channel, ...]`` only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtrain.artifact.onnx.graph import Graph, Shape, UnsupportedError, Value, constant
from jaxtrain.artifact.onnx.operators import (
    apply,
    cast,
    flip,
    pad,
    reshape,
    slice_,
    squeeze,
    tensor,
    transpose,
    unsqueeze,
)

Pads = Sequence[tuple[int, int]]


def convolution(g: Graph, eqn: Any, x: Value, kernel: Value) -> Value:
    """``Conv``, or ``ConvTranspose`` where the input is dilated."""
    params, out = eqn.params, eqn.outvars[0].aval
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise UnsupportedError("it groups the batch")
    x, kernel = transpose(g, x, numbers.lhs_spec), transpose(g, kernel, numbers.rhs_spec)
    if x.dtype.kind != "f":  # sums of small integers are exact in float32
        if x.dtype.itemsize > 1 or kernel.dtype.itemsize > 1:
            raise UnsupportedError(f"it convolves {x.dtype}")
        x, kernel = cast(g, x, np.float32), cast(g, kernel, np.float32)
    compute = _conv if set(params["lhs_dilation"]) <= {1} else _transposed
    y = compute(g, params, x, kernel, tuple(out.shape[axis] for axis in numbers.out_spec))
    return cast(g, transpose(g, y, np.argsort(numbers.out_spec)), out.dtype)


def _conv(g: Graph, params: Any, x: Value, kernel: Value, shape: Shape) -> Value:
    pads = [(int(low), int(high)) for low, high in params["padding"]]
    if any(min(side) < 0 for side in pads):
        x, pads = _pad(g, x, pads), [(0, 0)] * len(pads)
    return tensor(
        x,
        g.node(
            "Conv",
            x,
            kernel,
            kernel_shape=list(kernel.shape[2:]),
            strides=list(params["window_strides"]),
            dilations=list(params["rhs_dilation"]),
            group=params["feature_group_count"],
            pads=[low for low, _ in pads] + [high for _, high in pads],
        ),
        shape,
    )


def _transposed(g: Graph, params: Any, x: Value, kernel: Value, shape: Shape) -> Value:
    """Write a convolution of a dilated input as the transpose of a strided one with the reversed kernel."""
    groups, strides = params["feature_group_count"], params["lhs_dilation"]
    outputs, inputs, *window = kernel.shape
    kernel = flip(g, kernel, range(2, kernel.rank))
    kernel = reshape(g, kernel, (groups, outputs // groups, inputs, *window))
    kernel = transpose(g, kernel, (0, 2, 1, *range(3, kernel.rank)))
    kernel = reshape(g, kernel, (groups * inputs, outputs // groups, *window))
    reach = [(size - 1) * step for size, step in zip(window, params["rhs_dilation"], strict=True)]
    crop = [(int(r - low), int(r - high)) for r, (low, high) in zip(reach, params["padding"], strict=True)]
    sizes = [
        (dim - 1) * stride + 1 + r - max(0, low) - max(0, high)
        for dim, stride, r, (low, high) in zip(x.shape[2:], strides, reach, crop, strict=True)
    ]
    name = g.node(
        "ConvTranspose",
        x,
        kernel,
        kernel_shape=list(window),
        strides=list(strides),
        dilations=list(params["rhs_dilation"]),
        group=groups,
        pads=[max(0, low) for low, _ in crop] + [max(0, high) for _, high in crop],
    )
    y = tensor(x, name, (*shape[:2], *sizes))
    y = _pad(g, y, [(max(0, -low), max(0, -high)) for low, high in crop])
    return slice_(g, y, [0] * y.rank, y.shape, [1, 1, *params["window_strides"]])


def _pad(g: Graph, x: Value, pads: Pads) -> Value:
    return pad(g, x, constant(np.zeros((), x.dtype)), [(0, 0), (0, 0), *pads])


def pooling(kind: str) -> Any:
    """Return the rule of a window reduction: ``max``, ``min`` or ``sum``."""

    def rule(g: Graph, eqn: Any, x: Value) -> Value:
        params, out = eqn.params, eqn.outvars[0].aval
        if {*params["base_dilation"], *params["window_dilation"]} != {1}:
            raise UnsupportedError("TensorRT has no dilated pooling")
        if x.dtype.kind != "f":
            raise UnsupportedError(f"TensorRT pools no {x.dtype}")
        others, spatial = _image_axes(params, x.rank)
        if not spatial:
            return x
        order, pads = [*others, *spatial], params["padding"]
        if kind == "sum" or any(min(side) < 0 for side in pads):
            fill = {"sum": 0.0, "max": -np.inf, "min": np.inf}[kind]
            x = pad(g, x, constant(np.array(fill, x.dtype)), pads)
            pads = ((0, 0),) * x.rank
        # TensorRT pools two or three dimensions.
        added = [*range(len(others), 2)]
        line = [2 + len(spatial)] if len(spatial) == 1 else []
        image = unsqueeze(g, transpose(g, x, order), [*added, *line])
        window: dict[str, Any] = {
            "kernel_shape": [*(params["window_dimensions"][k] for k in spatial), *(1 for _ in line)],
            "strides": [*(params["window_strides"][k] for k in spatial), *(1 for _ in line)],
            "pads": [
                int(pads[k][end]) if k >= 0 else 0 for end in (0, 1) for k in [*spatial, *(-1 for _ in line)]
            ],
        }
        pooled = iter([out.shape[k] for k in order])
        shape = tuple(1 if k in (*added, *line) else next(pooled) for k in range(image.rank))
        y = squeeze(g, _pool(g, kind, image, window, shape), [*added, *line])
        return transpose(g, y, np.argsort(order))

    return rule


def _pool(g: Graph, kind: str, image: Value, window: dict[str, Any], shape: Shape) -> Value:
    if kind == "max":
        return tensor(image, g.node("MaxPool", image, **window), shape)
    if kind == "min":
        return apply(g, "Neg", _pool(g, "max", apply(g, "Neg", image), window, shape))
    count = float(np.prod(window["kernel_shape"]))
    return apply(g, "Mul", tensor(image, g.node("AveragePool", image, **window), shape), count)


def _image_axes(params: Any, rank: int) -> tuple[list[int], list[int]]:
    """Return batch and channel axes, at most two, and the axes that windows move along, at most three."""
    windows = zip(params["window_dimensions"], params["window_strides"], params["padding"], strict=True)
    spatial = [k for k, window in enumerate(windows) if window != (1, 1, (0, 0))]
    others = [k for k in range(rank) if k not in spatial]
    while spatial and len(others) > 2:
        spatial = sorted([*spatial, others.pop(1)])
    if len(spatial) > 3:
        raise UnsupportedError("TensorRT pools two or three dimensions")
    return others, spatial


CONVOLUTION: dict[str, Any] = {
    "conv_general_dilated": convolution,
    "reduce_window_max": pooling("max"),
    "reduce_window_min": pooling("min"),
    "reduce_window_sum": pooling("sum"),
}
"""Rules ``(graph, equation, *values) -> value``."""
