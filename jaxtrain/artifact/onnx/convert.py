"""Trace a pure function and write it as an ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import onnx
from jax.interpreters import partial_eval
from onnx import helper

import jaxtrain
from jaxtrain.artifact.onnx.graph import (
    BATCH,
    HALF,
    IR_VERSION,
    OPSET,
    Graph,
    UnsupportedError,
    Value,
    constant,
    tensors,
    value_info,
)
from jaxtrain.artifact.onnx.interpreter import evaluate
from jaxtrain.artifact.onnx.simplify import simplify
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import leaf_paths
from jaxtrain.models.plain_operators import plain_operators

LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights in one file: protobuf's limit is 2 GiB."""
HALF_KEY = "half_precision"
"""Key of the model's metadata that holds the half-precision types it was traced with."""

Apply = Callable[[Any, dict[str, Any]], Mapping[str, Any]]


def convert(apply: Apply, weights: Any, inputs: Mapping[str, Any]) -> onnx.ModelProto:
    """See ``jaxtrain.artifact.onnx.to_onnx``."""
    arrays = {name: np.asarray(leaf) for name, leaf in leaf_paths(weights).items()}
    size = sum(array.nbytes for array in arrays.values())
    if size > LARGEST_FILE:
        raise InputError(f"ONNX export: {size / 1e9:.1f} GB of weights are more than one file holds (2 GiB)")
    closed, names = _trace(apply, weights, inputs)
    g = Graph()
    g.evaluate = evaluate
    # Names of inputs and outputs are the caller's: no other tensor may take one.
    g.depths.update(dict.fromkeys([*inputs, *names], 0))
    values = [constant(array, name) for name, array in arrays.items()]
    values += [
        g.declare(name, var.aval.shape, var.aval.dtype)
        for name, var in zip(sorted(inputs), closed.jaxpr.invars[len(values) :], strict=True)
    ]
    declared = values[len(arrays) :]
    g.batch_source = str(declared[0].name)
    outs = evaluate(g, closed, values, "")
    results = [_output(g, name, value) for name, value in zip(names, outs, strict=True)]
    simplify(g, names)
    graph = helper.make_graph(
        g.nodes,
        "jaxtrain",
        [value_info(str(value.name), value.shape, value.dtype) for value in declared],
        results,
        tensors(g.initializers),
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="jaxtrain",
        producer_version=jaxtrain.__version__,
    )
    helper.set_model_props(model, {HALF_KEY: ",".join(sorted(_half_types(closed.jaxpr)))})
    return model


def _trace(apply: Apply, weights: Any, inputs: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Return the jaxpr for any batch size, and the names of its outputs in order."""
    if not inputs:
        raise InputError("ONNX export: the model has no inputs, and so no batch")
    (batch,) = jax.export.symbolic_shape(BATCH)
    specs = {
        name: jax.ShapeDtypeStruct((batch, *spec.shape), jax.dtypes.canonicalize_dtype(spec.dtype))
        for name, spec in inputs.items()
    }
    abstract = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(np.shape(w), jax.dtypes.canonicalize_dtype(w.dtype)), weights
    )
    try:
        with plain_operators():
            closed, out = jax.make_jaxpr(apply, return_shape=True)(abstract, specs)
    except jax.errors.InconclusiveDimensionOperation as error:
        raise InputError(
            f"ONNX export: the model decides something by its batch size, which is open: {first_line(error)}"
        ) from error
    if not isinstance(out, dict) or not all(hasattr(spec, "shape") for spec in out.values()):
        raise InputError(f"ONNX export: the function returns {type(out).__name__}, not a dict of arrays")
    names = sorted(out)
    for name in names:
        if not out[name].shape or str(out[name].shape[0]) != BATCH:
            raise InputError(
                f"ONNX export: output {name!r} has shape {out[name].shape}: its first axis must be the batch"
            )
        if name in inputs:
            raise InputError(f"ONNX export: {name!r} is an input and an output: rename one of them")
    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return closed.replace(jaxpr=used), names


def _output(g: Graph, name: str, value: Value) -> onnx.ValueInfoProto:
    try:
        info = value_info(name, value.shape, value.dtype)
        g.nodes.append(helper.make_node("Identity", [g.full(value)], [name], name=f"output/{name}"))
    except UnsupportedError as error:
        raise InputError(f"ONNX export: output {name!r}: {error}") from error
    return info


def _half_types(jaxpr: Any) -> set[str]:
    """Return the half-precision types in a jaxpr and the jaxprs in it."""
    found = set()
    for eqn in jaxpr.eqns:
        for var in (*eqn.invars, *eqn.outvars):
            dtype = getattr(var.aval, "dtype", None)
            if dtype in HALF:
                found.add(str(dtype))
        for param in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(param):
                found |= _half_types(getattr(param, "jaxpr", param))
    return found


def _is_jaxpr(param: Any) -> bool:
    return hasattr(param, "eqns")
