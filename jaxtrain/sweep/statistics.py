"""Mean, spread and differences of a metric over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
ROUNDING = 1e-7  # differences that differ by less are equal: metrics are float32


class Summary(NamedTuple):
    """A metric over seeds.

    Attributes:
      n: number of values.
      mean: their mean.
      std: their sample standard deviation (n - 1); None of one value.
      ci95: half of the 95 % interval of the mean, by Student's t; None of one value.
    """

    n: int
    mean: float
    std: float | None
    ci95: float | None


class Difference(NamedTuple):
    """A metric compared with the baseline's, seed by seed.

    Attributes:
      n: number of seeds that both have.
      mean: mean of the differences.
      ci95: half of its 95 % interval; None for one seed.
      p: two-sided p-value of the paired t-test; None for one seed or where all differences are equal.
    """

    n: int
    mean: float
    ci95: float | None
    p: float | None


def summarize(values: Sequence[float]) -> Summary:
    """Return mean, standard deviation and the 95 % interval of the mean.

    >>> one = summarize([0.90, 0.92, 0.94])
    >>> one.n, round(one.mean, 4), round(one.std, 4), round(one.ci95, 4)
    (3, 0.92, 0.02, 0.0497)
    >>> summarize([0.9])
    Summary(n=1, mean=0.9, std=None, ci95=None)
    """
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return Summary(len(array), float(array.mean()), None, None)
    std = float(array.std(ddof=1))
    return Summary(len(array), float(array.mean()), std, _half_width(std, len(array)))


def compare(values: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """Compare a metric with the baseline's over the seeds that both have; None without such a seed.

    Args:
      values: the metric by seed.
      baseline: the baseline's, by seed.

    >>> found = compare({0: 0.93, 1: 0.95, 2: 0.96, 3: 0.5}, {0: 0.91, 1: 0.94, 2: 0.93})
    >>> found.n, round(found.mean, 4), round(found.ci95, 4), round(found.p, 4)
    (3, 0.02, 0.0248, 0.0742)
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    differences = np.array([values[seed] - baseline[seed] for seed in seeds])
    summary = summarize(differences.tolist())
    size = max(abs(baseline[seed]) + abs(values[seed]) for seed in seeds)
    if summary.std is None or summary.std <= ROUNDING * size:
        return Difference(summary.n, summary.mean, summary.ci95, None)
    from scipy import stats  # here: the import takes a second

    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(summary.n, summary.mean, summary.ci95, p)


def _half_width(std: float, n: int) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * std / float(np.sqrt(n))
