"""Figures of binary, multi-label, regression and language-model reports from collected rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from jaxtrain.evaluation.calibration import Reliability
from jaxtrain.evaluation.class_figures import ClassFigures, PixelFigures, only_numbers
from jaxtrain.evaluation.ranking import Ranking
from jaxtrain.metrics import (
    R2,
    Binary,
    BinaryCounts,
    Bits,
    Classification,
    LanguageModel,
    MultiLabel,
    Perplexity,
    Regression,
)
from jaxtrain.metrics.reports import LabelCounts
from jaxtrain.metrics.task_inputs import logit_of


class Figures(Protocol):
    """Figures of collected rows, for any weighting of the examples."""

    @property
    def ranking_work(self) -> int:
        """Numbers that one computation of AUROC and average precision reads; 0 where there are none."""

    def numbers(self, weight: np.ndarray | None = None, ranking: bool = True) -> dict[str, float]:
        """Return the figures of the examples, each counted ``weight: int [n]`` times; NaN where undefined.

        Args:
          weight: None counts each once.
          ranking: also compute AUROC and average precision.
        """

    def tables(self) -> dict[str, Any]:
        """Return figures by class, and ``reliability``, the columns of the reliability curve."""

    def columns(self, names: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Return what a file of the examples says of each, by column: sequences ``[n]``.

        Args:
          names: of the classes.
        """

    def mistakes(self) -> np.ndarray | None:
        """Return the positions of wrong predictions, the most confident first; None where there are none."""


def figures_of(report: Any, rows: Mapping[str, np.ndarray]) -> Figures:
    """Return the figures of a report of jaxtrain from the rows that ``collect.example_rows`` describes."""
    if isinstance(report, Classification):
        return PixelFigures(report, rows) if "hits" in rows else ClassFigures(report, rows)
    kinds: tuple[tuple[type, Any], ...] = (
        (MultiLabel, MultiLabelFigures),
        (Binary, BinaryFigures),
        (Regression, RegressionFigures),
        (LanguageModel, TextFigures),
    )
    figures: Figures = next(figures for kind, figures in kinds if isinstance(report, kind))(report, rows)
    return figures


class BinaryFigures:
    """Figures of ``metrics.Binary``.

    Args:
      report: the task report.
      rows: ``label`` (0 or 1; -1 where it does not count) and ``logit``: ``[n, questions, labels]``.
    """

    def __init__(self, report: Binary, rows: Mapping[str, np.ndarray]) -> None:
        self._label, self._logit = rows["label"], rows["logit"].astype(np.float64)
        with np.errstate(over="ignore"):
            self._probability = 1 / (1 + np.exp(-self._logit))
        self._positive = self._logit > np.float32(logit_of(report.threshold))  # as the device compares
        self._included = self._label >= 0

    @property
    def ranking_work(self) -> int:
        """Numbers that one computation of AUROC and average precision reads."""
        return self._logit.size

    def numbers(self, weight: np.ndarray | None = None, ranking: bool = True) -> dict[str, float]:
        """Return those of ``BinaryCounts``, ``log_loss``, ``ece``, ``auroc`` and ``average_precision``."""
        weight = self._weight(weight)
        counts = BinaryCounts(*(each.sum() for each in self._counts(weight))).compute()
        shown = ("accuracy", "precision", "recall", "f1")
        figures = {**{name: float(counts[name]) for name in shown}, **self._probabilistic(weight)}
        if ranking:
            each = self._pooled
            figures["auroc"] = each.auroc(weight[self._included])
            figures["average_precision"] = each.average_precision(weight[self._included])
        return figures

    def tables(self) -> dict[str, Any]:
        """Return the reliability curve of the probability of label 1."""
        return {"reliability": self._reliability(self._weight(None)).table()}

    def columns(self, names: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Return label, prediction and probability of label 1, by column."""
        parts = (self._label, self._positive.astype(int), self._probability)
        columns: dict[str, Any] = {}
        for name, part in zip(("label", "prediction", "probability"), parts, strict=True):
            columns |= numbered(name, part)
        return {
            name: [x if x >= 0 else "" for x in column.tolist()] if name.startswith("label") else column
            for name, column in columns.items()
        }

    def mistakes(self) -> np.ndarray | None:
        """Return the positions of the wrong predictions, the most confident first."""
        if self._label[0].size > 1:
            return None
        label, probability = self._label[:, 0, 0], self._probability[:, 0, 0]
        wrong = np.flatnonzero((label >= 0) & (self._positive[:, 0, 0] != (label > 0)))
        return wrong[np.argsort(-np.abs(probability[wrong] - 0.5), kind="stable")]

    def _weight(self, weight: np.ndarray | None) -> np.ndarray:
        """Return how often each label counts: int, of the labels' shape."""
        return self._included * (1 if weight is None else weight[:, None, None])

    def _counts(self, weight: np.ndarray) -> list[np.ndarray]:
        guess, truth = self._positive, self._label > 0
        pairs = ((guess, truth), (guess, ~truth), (~guess, truth), (~guess, ~truth))
        return [weight * (a & b) for a, b in pairs]

    def _probabilistic(self, weight: np.ndarray) -> dict[str, float]:
        nll = np.logaddexp(0, np.where(self._label > 0, -self._logit, self._logit))
        total = weight.sum()
        mean = float((weight * np.where(self._included, nll, 0)).sum() / total) if total else float("nan")
        return {"log_loss": mean, "ece": self._reliability(weight).ece()}

    def _reliability(self, weight: np.ndarray) -> Reliability:
        flat = (self._probability.reshape(-1), (self._label > 0).reshape(-1), weight.reshape(-1))
        return Reliability.of(*flat)

    @functools.cached_property
    def _pooled(self) -> Ranking:
        return Ranking(self._logit[self._included], self._label[self._included] > 0)


class MultiLabelFigures(BinaryFigures):
    """Figures of ``metrics.MultiLabel``: by label, and macro, micro and weighted averages."""

    def numbers(self, weight: np.ndarray | None = None, ranking: bool = True) -> dict[str, float]:
        """Return those of ``LabelCounts``, ``exact_match``, and averages of the rankings of the labels."""
        each = self._weight(weight)
        counts = LabelCounts(*(part.sum((0, 1)) for part in self._counts(each))).compute()
        figures = only_numbers(counts)
        right = ((self._positive == (self._label > 0)) | ~self._included).all(-1)
        rows = each.max(-1)  # an example without a label that counts does not count
        total = rows.sum()
        figures["exact_match"] = float((rows * right).sum() / total) if total else float("nan")
        figures |= self._probabilistic(each)
        if ranking:
            kept = each[self._included]
            for name, values in self._ranked(each).items():
                figures[f"macro_{name}"] = float(values.mean())
                figures[f"micro_{name}"] = getattr(self._pooled, name)(kept)
                support = counts["support"]
                figures[f"weighted_{name}"] = (
                    float(values @ support / support.sum()) if support.sum() else float("nan")
                )
        return figures

    def tables(self) -> dict[str, Any]:
        """Return ``auroc`` and ``average_precision`` by label, and the reliability curve of all labels."""
        return {**self._ranked(self._weight(None)), **super().tables()}

    def mistakes(self) -> None:
        """No single prediction is wrong."""

    def _ranked(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        kept = [weight[..., k][self._included[..., k]] for k in range(weight.shape[-1])]
        pairs = list(zip(self._rankings, kept, strict=True))
        return {
            name: np.array([getattr(ranking, name)(each) for ranking, each in pairs])
            for name in ("auroc", "average_precision")
        }

    @functools.cached_property
    def _rankings(self) -> list[Ranking]:
        places = [(..., k) for k in range(self._label.shape[-1])]
        return [
            Ranking(self._logit[at][self._included[at]], self._label[at][self._included[at]] > 0)
            for at in places
        ]


class RegressionFigures:
    """Figures of ``metrics.Regression``.

    Args:
      report: the task report.
      rows: ``target`` and ``prediction``: float ``[n, steps, outputs]``.
    """

    ranking_work = 0

    def __init__(self, report: Regression, rows: Mapping[str, np.ndarray]) -> None:
        self._target, self._prediction = (rows[k].astype(np.float64) for k in ("target", "prediction"))
        first = self._target[:1, :1]
        self._shift = np.where((self._target == first).all((0, 1)), first[0, 0], self._target.mean((0, 1)))

    def numbers(self, weight: np.ndarray | None = None, ranking: bool = True) -> dict[str, float]:
        """Return ``mae``, ``mse``, ``rmse`` and ``r2``."""
        weight = np.ones(len(self._target)) if weight is None else weight.astype(np.float64)
        sums = {name: weight @ each for name, each in self._sums.items()}
        count = np.full(self._shift.shape, weight.sum() * self._target.shape[1])
        total = count.sum()
        mae, mse = (float(sums[k].sum() / total) if total else float("nan") for k in ("absolute", "residual"))
        r2 = R2(count, self._shift, sums["total"], sums["squares"], sums["residual"]).compute()
        return {"mae": mae, "mse": mse, "rmse": float(np.sqrt(mse)), "r2": r2}

    def tables(self) -> dict[str, Any]:
        """Return nothing: a regression has no classes."""
        return {}

    def columns(self, names: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Return target and prediction, by column."""
        return numbered("target", self._target) | numbered("prediction", self._prediction)

    def mistakes(self) -> None:
        """No prediction is right or wrong."""

    @functools.cached_property
    def _sums(self) -> dict[str, np.ndarray]:
        """Sums of each example by output: float ``[n, outputs]``."""
        error, moved = self._prediction - self._target, self._target - self._shift
        parts = {"absolute": np.abs(error), "residual": error**2, "total": moved, "squares": moved**2}
        return {name: part.sum(1) for name, part in parts.items()}


class TextFigures:
    """Figures of ``metrics.LanguageModel``.

    Args:
      report: the task report.
      rows: ``nll``, the sum of the losses of a text in nats, and ``tokens``, their number: ``[n]``.
    """

    ranking_work = 0

    def __init__(self, report: LanguageModel, rows: Mapping[str, np.ndarray]) -> None:
        self._unit, self._nll, self._tokens = report.unit, rows["nll"], rows["tokens"]

    def numbers(self, weight: np.ndarray | None = None, ranking: bool = True) -> dict[str, float]:
        """Return ``perplexity`` and ``bits_per_byte`` or ``bits_per_token``."""
        weight = np.ones(len(self._nll)) if weight is None else weight
        sums = float(weight @ self._nll), float(weight @ self._tokens)
        return {"perplexity": Perplexity(*sums).compute(), f"bits_per_{self._unit}": Bits(*sums).compute()}

    def tables(self) -> dict[str, Any]:
        """Return nothing: there are no classes."""
        return {}

    def columns(self, names: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Return number of tokens, mean loss in nats and perplexity of each text, by column."""
        loss = self._nll / np.where(self._tokens > 0, self._tokens, np.nan)
        with np.errstate(over="ignore"):
            return {"tokens": self._tokens, "loss": loss, "perplexity": np.exp(loss)}

    def mistakes(self) -> None:
        """No prediction is right or wrong."""


def numbered(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of ``values: [n, ...]``, numbered where there are several.

    >>> list(numbered("target", np.zeros((5, 1, 2))))
    ['target_0', 'target_1']
    """
    flat = values.reshape(len(values), -1)
    return {name if flat.shape[1] == 1 else f"{name}_{k}": flat[:, k] for k in range(flat.shape[1])}
