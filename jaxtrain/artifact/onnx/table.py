"""The table of primitives: JAX's name → the rule that writes its ONNX nodes."""

from __future__ import annotations

from typing import Any

from jaxtrain.artifact.onnx.control import CONTROL
from jaxtrain.artifact.onnx.convolution import CONVOLUTION
from jaxtrain.artifact.onnx.elementwise import ELEMENTWISE
from jaxtrain.artifact.onnx.indexing import INDEXING
from jaxtrain.artifact.onnx.reduction import REDUCTION
from jaxtrain.artifact.onnx.shape import SHAPE

PRIMITIVES: dict[str, Any] = {
    **ELEMENTWISE,
    **SHAPE,
    **REDUCTION,
    **CONVOLUTION,
    **INDEXING,
    **CONTROL,
}
"""A rule takes ``(graph, equation, *input values)`` and returns the output's value, or a list of them."""
