"""Bootstrap confidence intervals: percentiles of figures over resamples of the examples."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxtrain.evaluation.figures import Figures

LEVEL = 0.95
"""Of the intervals: 2.5 % of the resamples are below and 2.5 % above."""
RESAMPLES = 1000
SEED = 0
RANKING_WORK = 2 * 10**9
"""Numbers that the resamples of AUROC and average precision may read: about half a minute."""

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """How intervals are computed (Efron & Tibshirani 1993, chapter 13): the percentile method.

    Resample k draws ``n`` of ``n`` examples with replacement, a pure function of (seed, k, stream).

    Attributes:
      resamples: at least 1.
      seed: of the resamples, in [0, 2**31).
    """

    resamples: int = RESAMPLES
    seed: int = SEED

    def weights(self, n: int, number: int, stream: int = 0) -> np.ndarray:
        """Return how often each of ``n`` examples is in resample ``number``: int64 ``[n]``.

        Args:
          n: the number of examples.
          number: of the resample, from 0.
          stream: other streams are independent, such as those of groups.

        >>> int(Bootstrap().weights(5, number=0).sum())
        5
        """
        # Raw words, because NumPy guarantees their values across versions.
        words = np.random.Philox(key=[self.seed, (stream << 32) + number]).random_raw(n)
        return np.bincount((words % np.uint64(n)).astype(np.int64), minlength=n)

    def ranks(self, work: int) -> bool:
        """Return whether figures that read ``work`` scores each time are resampled."""
        return work * self.resamples <= RANKING_WORK

    def intervals(self, figures: Figures, n: int, stream: int = 0) -> dict[str, Interval]:
        """Return the interval of each figure, by name.

        Resamples in which a figure is undefined are left out; (NaN, NaN) where it is in all.

        Args:
          figures: of the examples.
          n: the number of examples.
          stream: as in ``weights``.
        """
        ranking = self.ranks(figures.ranking_work)
        drawn = [figures.numbers(self.weights(n, k, stream), ranking) for k in range(self.resamples)]
        return {name: _interval(np.array([one[name] for one in drawn])) for name in drawn[0]}


def _interval(values: np.ndarray) -> Interval:
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
    return float(low), float(high)
