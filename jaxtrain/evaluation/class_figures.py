"""Figures of reports of classes from collected rows: one class for each example, or one for each pixel."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain.evaluation.calibration import Reliability
from jaxtrain.evaluation.ranking import Ranking
from jaxtrain.metrics import ClassCounts, Classification

TOP = 5
"""``top5`` is reported for models with more than this many classes."""


def only_numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures that are numbers, without the tables.

    >>> only_numbers({"accuracy": np.array(0.5), "recall": np.zeros(3)})
    {'accuracy': 0.5}
    """
    return {name: float(value) for name, value in figures.items() if not np.ndim(value)}


class ClassFigures:
    """Figures of ``metrics.Classification`` with one label for each example.

    Args:
      report: the task report.
      rows: ``label`` (-1 where it does not count), ``prediction``, ``probability`` of the prediction,
        ``rank`` and ``label_logp`` of the label, each ``[n]``; and where they were collected ``scores``,
        log-probabilities ``[n, classes]``.
    """

    def __init__(self, report: Classification, rows: Mapping[str, np.ndarray]) -> None:
        self._rows = rows
        self._label, self._prediction = rows["label"].astype(int), rows["prediction"].astype(int)
        self._included = self._label >= 0
        self._right = self._included & (self._label == self._prediction)
        seen = max(self._label.max(initial=0), self._prediction.max(initial=0)) + 1
        self._classes = rows["scores"].shape[1] if "scores" in rows else int(seen)

    @property
    def ranking_work(self) -> int:
        """Numbers that one computation of AUROC and average precision reads."""
        return self._rows["scores"].size if "scores" in self._rows else 0

    def numbers(self, weight: np.ndarray | None = None, ranking: bool = True) -> dict[str, float]:
        """Return the figures of the examples, each counted ``weight: int [n]`` times.

        Args:
          weight: None counts each once.
          ranking: also compute AUROC and average precision.
        """
        weight = self._included * (1 if weight is None else weight)
        total = weight.sum()
        label, counted = np.where(self._included, self._label, 0), weight * self._right
        columns = ((label, counted), (self._prediction, weight), (label, weight))
        counts = [np.bincount(index, each, self._classes).astype(np.int64) for index, each in columns]
        figures = only_numbers(ClassCounts(*counts).compute())

        def mean(values: np.ndarray) -> float:
            return float((weight * values).sum() / total) if total else float("nan")

        if self._classes > TOP:
            figures[f"top{TOP}"] = mean(self._rows["rank"] < TOP)
        figures["log_loss"] = -mean(np.where(self._included, self._rows["label_logp"], 0))
        figures["ece"] = self._reliability(weight).ece()
        if ranking and "scores" in self._rows:
            for name, values in self._ranked(weight).items():
                figures[f"macro_{name}"] = float(values.mean())
                figures[f"weighted_{name}"] = float(values @ counts[2] / total) if total else float("nan")
        return figures

    def tables(self) -> dict[str, Any]:
        """Return ``auroc`` and ``average_precision`` by class, one-vs-rest, and the reliability curve."""
        ranked = self._ranked(self._included * 1) if "scores" in self._rows else {}
        return {**ranked, "reliability": self._reliability(self._included * 1).table()}

    def columns(self, names: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Return what a file of the examples says of each, by column."""
        label = [str(x) if x >= 0 else "" for x in self._label.tolist()]
        found = {"label": label, "prediction": self._prediction, "probability": self._rows["probability"]}
        if names is not None:
            found["label_name"] = [names[x] if 0 <= x < len(names) else "" for x in self._label.tolist()]
            found["prediction_name"] = [names[x] if x < len(names) else "" for x in self._prediction.tolist()]
        return found

    def mistakes(self) -> np.ndarray:
        """Return the positions of the wrong predictions, the most confident first: int ``[mistakes]``."""
        wrong = np.flatnonzero(self._included & ~self._right)
        return wrong[np.argsort(-self._rows["probability"][wrong], kind="stable")]

    def _reliability(self, weight: np.ndarray) -> Reliability:
        return Reliability.of(self._rows["probability"], self._right, weight)

    def _ranked(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "auroc": np.array([each.auroc(weight) for each in self._rankings]),
            "average_precision": np.array([each.average_precision(weight) for each in self._rankings]),
        }

    @functools.cached_property
    def _rankings(self) -> list[Ranking]:
        """The examples by their score for each class."""
        return [Ranking(scores, self._label == k) for k, scores in enumerate(self._rows["scores"].T)]


class PixelFigures:
    """Figures of ``metrics.Segmentation``, and of a classification with several labels for each example.

    Args:
      report: the task report.
      rows: counts of each example by class, ``hits``, ``predicted`` and ``actual: int [n, classes]``, and by
        bin of confidence, ``bin_count``, ``bin_hits`` and ``bin_confidence``: ``[n, BINS]``.
    """

    ranking_work = 0

    def __init__(self, report: Classification, rows: Mapping[str, np.ndarray]) -> None:
        self._counts, self._rows = report.counts, rows

    def numbers(self, weight: np.ndarray | None = None, ranking: bool = True) -> dict[str, float]:
        """Return the figures of the pixels of the examples, each counted ``weight: int [n]`` times."""
        counts = [self._sum(name, weight).astype(np.int64) for name in ("hits", "predicted", "actual")]
        figures = only_numbers(self._counts(*counts).compute())
        return {**figures, "ece": self._reliability(weight).ece()}

    def tables(self) -> dict[str, Any]:
        """Return the reliability curve of the pixels."""
        return {"reliability": self._reliability(None).table()}

    def columns(self, names: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Return the number of labels and the figures of each example, by column."""
        shown = ("accuracy", "mean_iou")
        counts = zip(
            *(self._rows[name].astype(np.int64) for name in ("hits", "predicted", "actual")), strict=True
        )
        each = [self._counts(*one).compute() for one in counts]
        found: dict[str, Any] = {"labels": self._rows["actual"].sum(1).astype(np.int64)}
        return found | {name: [one[name] for one in each] for name in shown if name in each[0]}

    def mistakes(self) -> None:
        """No single prediction is wrong."""

    def _sum(self, name: str, weight: np.ndarray | None) -> np.ndarray:
        rows = self._rows[name]
        return rows.sum(0) if weight is None else weight @ rows

    def _reliability(self, weight: np.ndarray | None) -> Reliability:
        return Reliability(*(self._sum(name, weight) for name in ("bin_count", "bin_hits", "bin_confidence")))
