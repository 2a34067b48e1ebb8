"""AUROC and average precision of scores, for many weightings of the same examples.

The figures are those of ``sklearn.metrics.roc_auc_score`` and ``average_precision_score``. Scores are sorted
once; each weighting, such as a bootstrap resample, then takes time proportional to the number of examples.
"""

from __future__ import annotations

import numpy as np


class Ranking:
    """Examples in the order of their scores.

    Args:
      score: float ``[n]``, higher for the positive class.
      positive: bool ``[n]``.

    >>> Ranking(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]) > 0).auroc()
    0.75
    """

    def __init__(self, score: np.ndarray, positive: np.ndarray) -> None:
        self._ordered = not np.isnan(score).any()
        self._order = np.argsort(score, kind="stable")
        ranked = score[self._order]
        self._starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(score) else None
        self._positive = positive[self._order]

    def auroc(self, weight: np.ndarray | None = None) -> float:
        """Return the probability that a positive example has the higher score than a negative one.

        Equal scores count half. NaN without positive or without negative examples, and where a score is NaN.
        """
        yes, no = self._counts(weight)
        pairs = yes.sum() * no.sum()
        if not pairs:
            return float("nan")
        below = np.cumsum(no) - no
        return float((yes * (below + no / 2)).sum() / pairs)

    def average_precision(self, weight: np.ndarray | None = None) -> float:
        """Return the precision at each positive example, averaged; NaN where ``auroc`` has no positives."""
        yes, no = (counts[::-1] for counts in self._counts(weight))
        total = yes.sum()
        if not total:
            return float("nan")
        hits = np.cumsum(yes)
        selected = hits + np.cumsum(no)
        precision = np.divide(hits, selected, out=np.zeros(len(hits)), where=selected > 0)
        return float((yes * precision).sum() / total)

    def _counts(self, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the positive and the negative examples of each distinct score, from the lowest."""
        if self._starts is None or not self._ordered:
            return np.zeros(0), np.zeros(0)
        weight = np.ones(len(self._order)) if weight is None else weight[self._order].astype(np.float64)
        yes = np.where(self._positive, weight, 0)
        if len(self._starts) == len(weight):
            return yes, weight - yes
        return np.add.reduceat(yes, self._starts), np.add.reduceat(weight - yes, self._starts)
