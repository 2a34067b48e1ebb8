"""A model as an ONNX file, for ONNX Runtime, TensorRT, OpenVINO and others (docs/onnx.md)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtrain.core.errors import InputError

if TYPE_CHECKING:
    import onnx

BATCHES = (1, 3, 17)
"""Batch sizes that ``check`` runs."""
INSTALL = "pip install 'jaxtrain[onnx]'"


def to_onnx(
    apply: Callable[[Any, dict[str, Any]], Mapping[str, Any]], weights: Any, inputs: Mapping[str, Any]
) -> onnx.ModelProto:
    """Convert a pure function to an ONNX model (opset 17) that takes any batch size.

    Whatever depends on the weights alone is computed now. bfloat16 and float16 are computed in float32,
    inputs and outputs too: the precision is the choice of what runs the model (``trtexec --fp16``).

    Args:
      apply: ``(weights, inputs) -> outputs``; both dicts hold arrays by name, with the batch as first axis.
      weights: pytree of arrays. They become initializers named by their path, such as
        ``params/head/kernel``; ``/folded`` is appended to those that BatchNorm or a bias was folded into.
      inputs: name → ``jax.ShapeDtypeStruct`` of one example, without the batch axis.

    Returns:
      The model. Inputs and outputs have the names of the dicts, and a first axis named ``batch``. Nodes are
      named after the layers.

    Raises:
      InputError: onnx is not installed; an operator cannot be expressed (with the layer's name); an output
        has no batch axis; or the weights exceed 2 GiB.

    >>> import jax, jax.numpy as jnp
    >>> def apply(weights, inputs):
    ...     return {"logits": jax.nn.relu(inputs["x"] @ weights["kernel"])}
    >>> model = to_onnx(apply, {"kernel": jnp.ones((3, 2))}, {"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
    >>> [node.op_type for node in model.graph.node]
    ['MatMul', 'Relu', 'Identity']
    >>> [tensor.name for tensor in model.graph.initializer]
    ['kernel']
    """
    _require("onnx")
    from jaxtrain.artifact.onnx.convert import convert

    return convert(apply, weights, inputs)


def check(
    model: onnx.ModelProto,
    feeds: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    batches: Sequence[int] = BATCHES,
    tolerance: float | None = None,
) -> float:
    """Check a model with ONNX's checker and ONNX Runtime on a CPU, and return the largest error.

    The error of an output is the largest difference, divided by the largest absolute value expected of it.
    Integers and booleans must be equal; NaN and infinities must be where they are expected.

    Args:
      model: from ``to_onnx``.
      feeds: example inputs by name, ``[n, ...]``; rows are repeated for a batch larger than n.
      expected: the outputs of those rows by name, computed by JAX.
      batches: batch sizes to run; a row's output must not depend on the others.
      tolerance: the largest error allowed; by default 1e-5, and 3e-2 for a model that computes in bfloat16
        or float16 in JAX (in float32 in ONNX).

    Raises:
      InputError: onnx or onnxruntime is not installed.
      RunError: the checker refuses the model, ONNX Runtime cannot run it, or an output differs.
    """
    _require("onnx")
    _require("onnxruntime")
    from jaxtrain.artifact.onnx.verify import verify

    return verify(model, feeds, expected, batches, tolerance)


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"ONNX export needs the package {package}, which is not installed: {INSTALL}")
