"""Pictures of a report, with matplotlib: confusion matrix, reliability curve, contact sheet of mistakes."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.data import Source
from jaxtrain.evaluation.text import class_labels
from jaxtrain.metrics import Binary, Classification, MultiLabel, Segmentation

WRITTEN = 16
"""Most classes whose counts are written into the cells of a confusion matrix."""
NAMED = 60
"""Most classes that are named at the axes."""
DPI = 150


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A wrong prediction: the number of the example, its true and its predicted class, and their probability.

    Attributes:
      id: the number of the example in its source.
      label: the true class.
      prediction: the predicted class.
      probability: of the predicted class, in [0, 1].
    """

    id: int
    label: str
    prediction: str
    probability: float


def check_matplotlib(flag: str) -> None:
    """Raise InputError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"{flag} needs matplotlib: pip install 'jaxtrain[plot]'")


def pictures_of(report: Any) -> frozenset[str]:
    """Return which of the pictures ``confusion`` and ``mistakes`` a task report has."""
    if isinstance(report, MultiLabel) or not isinstance(report, Binary | Classification):
        return frozenset()
    return frozenset({"confusion"} if isinstance(report, Segmentation) else {"confusion", "mistakes"})


def image_field(source: Source) -> str | None:
    """Return the field with images ``[height, width, channel]``, of 1 or 3 channels; ``image`` first."""
    fields = source.gather(np.zeros(1, np.int64))
    found = [name for name, x in fields.items() if np.ndim(x) == 4 and np.shape(x)[-1] in (1, 3)]
    return min(found, key=lambda name: name != "image") if found else None


def confusion(matrix: np.ndarray, names: Sequence[str] | None, title: str) -> bytes:
    """Return a PNG of a confusion matrix: the colour is the share of the true class, a row.

    Args:
      matrix: counts of (true, predicted): int ``[classes, classes]``.
      names: of the classes.
      title: of the picture.
    """
    classes = len(matrix)
    labels = class_labels(classes, names)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(16.0, max(4.5, 0.55 * classes if classes <= WRITTEN else 0.22 * classes))
    figure = _figure((side + 1.6, side + 0.8))
    axes = figure.add_subplot()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(title, fontsize=10, wrap=True)
    if classes <= NAMED:
        long = max(map(len, labels)) > 3
        axes.set_xticks(range(classes), labels, rotation=90 if long else 0, fontsize=8)
        axes.set_yticks(range(classes), labels, fontsize=8)
    if classes <= WRITTEN:
        for row, column in np.ndindex(classes, classes):
            if matrix[row, column]:
                colour = "white" if share[row, column] > 0.5 else "black"
                text = f"{matrix[row, column]:,}"
                size = 8 if len(text) <= 5 else 6
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    return _png(figure)


def reliability(table: Mapping[str, Any], title: str) -> bytes:
    """Return a PNG of a reliability curve, above the number of examples by bin.

    Args:
      table: from ``Reliability.table``.
      title: of the picture.
    """
    figure = _figure((5, 5.5))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    middle, width = (table["low"] + table["high"]) / 2, table["high"] - table["low"]
    above.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="perfectly calibrated")
    seen = table["examples"] > 0
    above.plot(table["probability"][seen], table["accuracy"][seen], marker="o", label="model")
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(-0.02, 1.02))
    above.legend(loc="lower right", fontsize=8)
    above.set_title(title, fontsize=10, wrap=True)
    below.bar(middle, table["examples"], width=0.9 * width)
    below.set(xlabel="probability", ylabel="examples")
    return _png(figure)


def contact_sheet(images: np.ndarray, mistakes: Sequence[Mistake], title: str) -> bytes:
    """Return a PNG with an image for each mistake.

    Args:
      images: raw, ``[n, height, width, channel]``; 0, or the lowest value below it, is black, and the highest
        white.
      mistakes: what is written above each, ``n`` of them.
      title: of the picture.
    """
    columns = min(6, len(mistakes))
    rows = math.ceil(len(mistakes) / columns)
    figure = _figure((max(4.0, 1.7 * columns), 2.1 * rows + 0.5))
    figure.suptitle(title, fontsize=10, wrap=True)
    values = images.astype(np.float64)
    low = min(0.0, values.min())
    values = (values - low) / max(values.max() - low, 1e-12)
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.set_axis_off()
    for axes, image, one in zip(grid.flat, values, mistakes, strict=False):
        grey = image.shape[-1] == 1
        axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
        label, prediction = (_shortened(text) for text in (one.label, one.prediction))
        text = f"true {label}\npredicted {prediction}\n{100 * one.probability:.1f} %  (example {one.id})"
        axes.set_title(text, fontsize=6.5)
    return _png(figure)


def _shortened(text: str, longest: int = 20) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    return Figure(figsize=size, layout="constrained")


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.1)
    return out.getvalue()
