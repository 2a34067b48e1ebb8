"""What ``evaluate`` has written into a run's folder: figures, the confusion matrix, mistakes."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

FIGURES = "figures.json"
LARGEST = 2**26
LARGEST_PICTURE = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
      folder: with its files.
      step: of the checkpoint.
      split: the data.
      examples: how many.
      figures: numbers and tables by name.
      class_names: of the classes; None without names.
      mistakes: the most confident ones: ``id``, ``label``, ``prediction``, ``probability`` and, of texts,
        ``text``.
      picture: the mistakes as a PNG; None without one.
    """

    folder: Path
    step: int
    split: str
    examples: int
    figures: dict[str, Any]
    class_names: list[str] | None
    mistakes: list[dict[str, Any]]
    picture: Path | None

    @property
    def confusion(self) -> list[list[int]] | None:
        """Counts by true class (rows) and predicted class; None where there is no valid matrix."""
        return confusion_of(self.figures)

    def picture_url(self) -> str | None:
        """Return the picture as a data URL; None without one, or where it is too large or no PNG."""
        if self.picture is None:
            return None
        try:
            if self.picture.stat().st_size > LARGEST_PICTURE:
                return None
            data = self.picture.read_bytes()
        except OSError:
            return None
        if not data.startswith(b"\x89PNG\r\n\x1a\n"):
            return None
        return "data:image/png;base64," + base64.b64encode(data).decode()


def confusion_of(figures: dict[str, Any]) -> list[list[int]] | None:
    """Return the confusion matrix among figures; None without a valid one.

    >>> confusion_of({"confusion": [[5, 1], [0, 4]]})
    [[5, 1], [0, 4]]
    >>> names = ("true_negatives", "false_positives", "false_negatives", "true_positives")
    >>> confusion_of(dict(zip(names, (5, 1, 0, 4))))
    [[5, 1], [0, 4]]
    """
    names = ("true_negatives", "false_positives", "false_negatives", "true_positives")
    rows: Any = figures.get("confusion")
    if rows is None and all(name in figures for name in names):
        a, b, c, d = (figures[name] for name in names)
        rows = [[a, b], [c, d]]
    if not isinstance(rows, list) or not rows:
        return None
    square = all(isinstance(row, list) and len(row) == len(rows) for row in rows)
    if not square or not all(isinstance(x, int) and 0 <= x < 2**53 for row in rows for x in row):
        return None
    return rows


def in_result(folder: Path, result: dict[str, Any]) -> list[Evaluation]:
    """Return the confusion matrix among the tables of a result, of its best step where it has one."""
    best = result.get("best")
    of = best if isinstance(best, dict) else result
    tables, step = of.get("tables"), of.get("step", result.get("steps"))
    matrix = confusion_of(tables) if isinstance(tables, dict) else None
    if matrix is None or not isinstance(step, int):
        return []
    figures = {"confusion": matrix}
    return [Evaluation(folder, step, "test", sum(map(sum, matrix)), figures, None, [], None)]


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Return the evaluations in a run's folder by step and split; damaged ones are left out."""
    found = []
    for path in sorted(folder.glob(f"evaluation/*/{FIGURES}")):
        try:
            if path.stat().st_size > LARGEST:
                continue
            found.append(_evaluation(path, json.loads(path.read_bytes())))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue
    return sorted(found, key=lambda one: (one.step, one.split, one.folder))


def _evaluation(path: Path, body: dict[str, Any]) -> Evaluation:
    picture = path.with_name("mistakes.png")
    names = body.get("class_names")
    return Evaluation(
        folder=path.parent,
        step=int(body["step"]),
        split=str(body["split"]),
        examples=int(body["examples"]),
        figures=dict(body["figures"]),
        class_names=None if names is None else [str(name) for name in names],
        mistakes=[
            {
                "id": int(one["id"]),
                "label": str(one["label"]),
                "prediction": str(one["prediction"]),
                "probability": float(one["probability"]),
                **({"text": str(one["text"])} if "text" in one else {}),
            }
            for one in body.get("mistakes", ())
        ],
        picture=picture if picture.is_file() else None,
    )
