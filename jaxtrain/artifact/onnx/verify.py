"""Run an ONNX model and compare its outputs with those of JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime

from jaxtrain.artifact.onnx.convert import HALF_KEY
from jaxtrain.artifact.onnx.graph import onnx_dtype
from jaxtrain.core.errors import RunError
from jaxtrain.core.text import first_line

TOLERANCE = 1e-5
HALF_TOLERANCE = 3e-2


def verify(
    model: onnx.ModelProto,
    feeds: Mapping[str, Any],
    expected: Mapping[str, Any],
    batches: Sequence[int],
    tolerance: float | None,
) -> float:
    """See ``jaxtrain.artifact.onnx.check``."""
    if tolerance is None:
        properties = {entry.key: entry.value for entry in model.metadata_props}
        tolerance = HALF_TOLERANCE if properties.get(HALF_KEY) else TOLERANCE
    try:
        onnx.checker.check_model(model, full_check=True)
        session = make_session(model)
    except Exception as error:  # both packages raise many types
        raise RunError(f"ONNX export: the model is not valid: {first_line(error)}") from error
    worst = 0.0
    for batch in batches:
        rows = {name: _rows(value, batch) for name, value in feeds.items()}
        try:
            outputs = session.run(None, rows)
        except Exception as error:
            raise RunError(
                f"ONNX export: ONNX Runtime fails at batch {batch}: {first_line(error)}"
            ) from error
        for info, got in zip(session.get_outputs(), outputs, strict=True):
            difference = relative_error(got, _rows(expected[info.name], batch))
            if difference > tolerance:
                raise RunError(
                    f"ONNX export: output {info.name!r} differs from JAX by {difference:.1e} at batch "
                    f"{batch}; {tolerance:.0e} is allowed"
                )
            worst = max(worst, difference)
    return worst


def make_session(model: onnx.ModelProto) -> Any:
    """Return an ONNX Runtime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def relative_error(got: Any, expected: Any) -> float:
    """Return the largest difference over the largest expected absolute value; inf where they cannot agree.

    >>> relative_error(np.array([1.0, 4.0]), np.array([1.0, 5.0]))
    0.2
    """
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if got.dtype.kind != "f":
        return 0.0 if np.array_equal(got, expected) else float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    a, b = got[finite].astype(np.float64), expected[finite].astype(np.float64)
    difference = float(np.abs(a - b).max())
    return difference / float(np.abs(b).max()) if difference else 0.0


def _rows(value: Any, batch: int) -> np.ndarray:
    array = np.asarray(value)
    array = array.astype(onnx_dtype(array.dtype))
    return array[np.arange(batch) % len(array)]
