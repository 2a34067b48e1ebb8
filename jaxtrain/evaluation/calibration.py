"""Calibration: how often predictions are right, by the probability that the model gives them."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np

BINS = 15
"""Bins of equal width, as Guo et al. 2017 (arXiv:1706.04599) use."""


@dataclasses.dataclass(frozen=True)
class Reliability:
    """The reliability curve, and the expected calibration error (ECE).

    Attributes:
      count: examples by bin, float ``[BINS]``. Bin i is for probabilities in ``(i / BINS, (i + 1) / BINS]``;
        the first also has 0.
      right: how many of them are right (of a binary label: positive), float ``[BINS]``.
      confidence: the sum of their probabilities, float ``[BINS]``.

    >>> round(Reliability.of(np.array([0.8, 0.8, 0.4, 0.4]), np.array([1, 1, 1, 0])).ece(), 4)
    0.15
    """

    count: Any
    right: Any
    confidence: Any

    @classmethod
    def of(cls, probability: np.ndarray, right: np.ndarray, weight: np.ndarray | None = None) -> Self:
        """Count probabilities in [0, 1], float ``[n]``, each ``weight`` times; NaN is in the first bin."""
        # As sklearn.calibration.calibration_curve: a probability on an edge is in the lower bin.
        place = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], np.nan_to_num(probability))
        weight = np.ones(len(place)) if weight is None else weight

        def total(values: Any) -> np.ndarray:
            return np.bincount(place, weight * values, minlength=BINS)

        return cls(total(1.0), total(right), total(probability))

    def ece(self) -> float:
        """Return the mean distance of probability and accuracy, weighted by the examples of a bin."""
        total = np.sum(self.count)
        return float(np.abs(self.confidence - self.right).sum() / total) if total else float("nan")

    def table(self) -> dict[str, Any]:
        """Return the curve by bin: ``low``, ``high``, ``examples``, ``probability`` and ``accuracy``.

        The last two are NaN in an empty bin.
        """
        count = np.asarray(self.count, np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            probability, accuracy = self.confidence / count, self.right / count
        edges = np.linspace(0, 1, BINS + 1)
        return {
            "low": edges[:-1],
            "high": edges[1:],
            "examples": count.astype(np.int64),
            "probability": probability,
            "accuracy": accuracy,
        }
