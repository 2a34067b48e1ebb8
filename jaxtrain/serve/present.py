"""What the page shows of a prediction: the likeliest classes, a value, the next tokens, shares of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxtrain.artifact.engines import Prediction
from jaxtrain.artifact.manifest import Manifest

SHOWN = 10
"""Classes that are shown at most."""
MAX_NUMBERS = 1000
"""Numbers of an output that are shown at most."""


def present(manifest: Manifest, prediction: Prediction) -> dict[str, Any]:
    """Return ``{"classes": [{"label", "probability"}, ...]}``, likeliest first, or ``{"outputs": ...}``.

    The probability is None where it is NaN. For segmentation, ``share`` is the part of the pixels; for a
    binary model there are two classes, and for a language model the classes are the next tokens.
    """
    outputs = prediction.outputs
    if manifest.task == "language_model":
        last = (prediction.example.tokens or len(outputs["logits"])) - 1
        logits = outputs["logits"][last].astype(np.float64)
        exponentials = np.exp(logits - logits.max())
        return {"classes": _top(manifest, exponentials / exponentials.sum(), "probability")}
    if manifest.task in ("classification", "segmentation"):
        labels = outputs["label"]
        if labels.ndim == 0:
            return {"classes": _top(manifest, outputs["probability"], "probability")}
        counts = np.bincount(labels.ravel(), minlength=outputs["probability"].shape[-1])
        return {"classes": [row for row in _top(manifest, counts / counts.sum(), "share") if row["share"]]}
    if manifest.task == "multi_label":
        return {"classes": _top(manifest, outputs["probability"], "probability")}
    if manifest.task == "binary" and outputs["probability"].size == 1:
        positive = float(outputs["probability"].ravel()[0])
        return {"classes": _top(manifest, np.array([1 - positive, positive]), "probability")}
    return {"outputs": {name: _values(array) for name, array in outputs.items()}}


def _top(manifest: Manifest, probability: np.ndarray, name: str) -> list[dict[str, Any]]:
    numbers = np.asarray(probability, np.float64)
    order = np.argsort(-numbers, kind="stable")[:SHOWN]
    return [{"label": _label(manifest, int(n)), name: _finite(numbers[n])} for n in order]


def _label(manifest: Manifest, number: int) -> str:
    if manifest.task == "language_model":
        return repr(bytes([number]).decode("latin-1")) if manifest.text and number < 256 else str(number)
    labels = manifest.labels
    return labels[number] if labels is not None and number < len(labels) else str(number)


def _finite(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


def _values(array: np.ndarray) -> Any:
    if array.size > MAX_NUMBERS:
        return f"{array.dtype} {list(array.shape)}"
    values = [_finite(number) for number in array.astype(np.float64).ravel()]
    return values if array.ndim else values[0]
