"""Evaluate a jaxpr on values of a graph: constants are computed, all else becomes nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from jaxtrain.artifact.onnx.control import CONTROL
from jaxtrain.artifact.onnx.elementwise import ELEMENTWISE
from jaxtrain.artifact.onnx.graph import (
    HALF,
    OPSET,
    Graph,
    UnsupportedError,
    Value,
    broadcast_shapes,
    constant,
    is_static,
)
from jaxtrain.artifact.onnx.shape import SHAPE
from jaxtrain.artifact.onnx.table import PRIMITIVES
from jaxtrain.core.errors import InputError


def evaluate(g: Graph, jaxpr: Any, inputs: Sequence[Value], layer: str) -> list[Value]:
    """Evaluate a jaxpr, closed or not.

    Args:
      g: the graph that gets the nodes.
      jaxpr: with one input variable for each value.
      inputs: their values.
      layer: path of the layer that contains it, for names of nodes and errors.

    Raises:
      InputError: an equation cannot be expressed; the message names its layer.
    """
    constants = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    values: dict[Any, Value] = {}

    def read(var: Any) -> Value:
        aval: Any = var.aval
        return constant(np.asarray(var.val, aval.dtype)) if isinstance(var, Literal) else values[var]

    values.update(zip(jaxpr.constvars, map(constant, constants), strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        g.root.layer = "/".join(filter(None, (layer, str(eqn.source_info.name_stack))))
        try:
            outs = _equation(g, eqn, [read(var) for var in eqn.invars])
        except UnsupportedError as error:
            where = f"layer {g.root.layer}" if g.root.layer else "the model"
            raise InputError(
                f"ONNX export: {where} uses {eqn.primitive.name}, which cannot be expressed: {error}; "
                "change the layer, or export in another format"
            ) from error
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _equation(g: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name not in CONTROL and name != "dim_as_value" and all(value.is_constant for value in inputs):
        folded = _by_rule(g, eqn, inputs) or _fold(eqn, inputs)
        if folded is not None:
            return folded
    if name not in PRIMITIVES:
        raise UnsupportedError(f"opset {OPSET} has no such operator")
    result = PRIMITIVES[name](g, eqn, *inputs)
    outs = result if isinstance(result, list) else [result]
    for out, var in zip(outs, eqn.outvars, strict=True):
        if tuple(map(str, out.shape)) != tuple(map(str, var.aval.shape)):
            raise AssertionError(f"the rule of {name} gave {out.shape} for {var.aval}: {eqn}")
    return outs


def _by_rule(g: Graph, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    """Compute an equation of constants with its rule, in NumPy; None if the rule writes nodes."""
    if eqn.primitive.name not in ELEMENTWISE and eqn.primitive.name not in SHAPE:
        return None
    try:
        result = PRIMITIVES[eqn.primitive.name](g, eqn, *inputs)
    except UnsupportedError:  # with nodes it would be
        return None
    outs = result if isinstance(result, list) else [result]
    return outs if all(out.is_constant for out in outs) else None


def _fold(eqn: Any, inputs: list[Value]) -> list[Value] | None:
    """Compute an equation of constants; None if its result depends on the batch size."""
    shapes = [tuple(var.aval.shape) for var in eqn.outvars]
    label = next((value.label for value in inputs if value.label), "")
    params = {name: _in_float32(param) for name, param in eqn.params.items()}
    if all(map(is_static, [*shapes, *(value.shape for value in inputs)])):
        arrays = [_broadcast(value) for value in inputs]
    elif eqn.primitive.name in ELEMENTWISE:
        stored = broadcast_shapes(*(value.stored for value in inputs))
        arrays = [np.broadcast_to(value.data, stored) for value in inputs]
    else:
        return None
    with jax.default_matmul_precision("highest"):
        outs = eqn.primitive.bind(*arrays, **params)
    outs = outs if eqn.primitive.multiple_results else [outs]
    return [constant(out, label, shape) for out, shape in zip(outs, shapes, strict=True)]


def _in_float32(param: Any) -> Any:
    """Return a parameter that is a dtype of half precision as float32."""
    try:
        return np.dtype(np.float32) if param is not None and np.dtype(param) in HALF else param
    except TypeError:
        return param


def _broadcast(value: Value) -> Any:
    if value.stored == value.shape:  # keys of random numbers are no NumPy arrays
        return value.data
    return np.broadcast_to(value.data, value.shape)
