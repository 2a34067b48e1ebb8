"""Write predictions as JSON lines or csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtrain.artifact.engines import Prediction
from jaxtrain.artifact.manifest import Manifest
from jaxtrain.core.files import to_json

FORMATS = ("jsonl", "csv")


def summarize(manifest: Manifest, prediction: Prediction) -> dict[str, Any]:
    """Return what the outputs of one example mean: label and probability, the value, or the next token."""
    outputs, id = prediction.outputs, prediction.example.id
    if manifest.task == "classification" and outputs["label"].ndim == 0:
        number = int(outputs["label"])
        likely = float(outputs["probability"][number])
        label = None if np.isnan(likely) else _name(manifest, number)  # argmax takes NaN for the largest
        return {"id": id, "label": label, "probability": likely}
    if manifest.task == "language_model":
        last = (prediction.example.tokens or outputs["logits"].shape[0]) - 1
        logits = outputs["logits"][last].astype(np.float64)
        token = int(logits.argmax())
        text = {"text": bytes([token]).decode("latin-1")} if manifest.text and token < 256 else {}
        probability = 1 / float(np.exp(logits - logits.max()).sum())
        return {"id": id, "next": token, **text, "probability": probability}
    shown = ("label", "probability") if "label" in outputs and "probability" in outputs else tuple(outputs)
    if manifest.task in ("classification", "segmentation"):  # a label for each pixel
        shown = ("label",)
    row = {"id": id, **{name: _plain(outputs[name]) for name in shown}}
    if manifest.task == "binary" and np.isnan(outputs["probability"]).all():
        row["label"] = None
    return row


def raw(manifest: Manifest, prediction: Prediction) -> dict[str, Any]:
    """Return all outputs of one example."""
    return {"id": prediction.example.id, **{n: _plain(array) for n, array in prediction.outputs.items()}}


def _name(manifest: Manifest, number: int) -> str | int:
    labels = manifest.labels
    return labels[number] if labels is not None and number < len(labels) else number


def _plain(array: np.ndarray) -> Any:
    return np.asarray(array, np.float32 if array.dtype.kind == "V" else None).tolist()  # bfloat16 is "V"


def make_writer(format: str, write: Callable[[str], Any]) -> Callable[[dict[str, Any]], None]:
    """Return a function that writes one row; csv has a line of names first, and lists in JSON.

    >>> rows = []
    >>> put = make_writer("csv", rows.append)
    >>> put({"id": "a.png", "label": "cat", "probability": 0.5})
    >>> rows
    ['id,label,probability\\n', 'a.png,cat,0.5\\n']
    """
    if format == "jsonl":
        return lambda row: write(to_json(row) + "\n")
    started = False

    def put(row: dict[str, Any]) -> None:
        nonlocal started
        if not started:
            started = True
            write(_csv_line(list(row)))
        write(_csv_line([json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values()]))

    return put


def _csv_line(cells: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
