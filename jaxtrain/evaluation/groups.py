"""Figures by group: every figure of each group with its interval, and the largest gap between groups."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.evaluation.bootstrap import Bootstrap, Interval
from jaxtrain.evaluation.figures import figures_of

MOST = 100
"""Most groups of a report."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The figures of the examples of one group.

    Attributes:
      name: the value of the field.
      examples: their number.
      figures: by name.
      intervals: of the figures.
    """

    name: str
    examples: int
    figures: dict[str, float]
    intervals: dict[str, Interval]


@dataclasses.dataclass(frozen=True)
class Gap:
    """The largest difference of a figure between two groups.

    Attributes:
      size: highest minus lowest; NaN where fewer than two groups have the figure.
      lowest: the name of the group with the lowest figure, the first of equals.
      highest: of the highest.
    """

    size: float
    lowest: str
    highest: str


def group_figures(
    report: Any, rows: Mapping[str, np.ndarray], values: np.ndarray, field: str, bootstrap: Bootstrap
) -> list[Group]:
    """Return the groups in the order of their values.

    Args:
      report: a task report.
      rows: what was collected: arrays ``[n, ...]``.
      values: the group of each example: numbers ``[n]``.
      field: their name, for messages.
      bootstrap: how the intervals are computed.

    Raises:
      InputError: there are more than ``MOST`` groups.
    """
    found = np.unique(values)
    if len(found) > MOST:
        raise InputError(
            f"--by {field}: the examples have {len(found):,} values of it, and at most {MOST} groups are "
            "reported: give a field with fewer values"
        )
    groups = []
    for number, value in enumerate(found):
        ids = np.flatnonzero((values == value) | (np.isnan(values) & np.isnan(value)))
        figures = figures_of(report, {name: array[ids] for name, array in rows.items()})
        intervals = bootstrap.intervals(figures, len(ids), stream=number + 1)
        groups.append(Group(_name(value), len(ids), figures.numbers(), intervals))
    return groups


def _name(value: Any) -> str:
    """Return a value as text, different for different values: ``np.float32(0.1)`` is 0.1.

    >>> _name(np.int32(20240101)), _name(np.float32(0.1)), _name(np.float32(2)), _name(np.bool_(True))
    ('20240101', '0.1', '2', '1')
    """
    return str(int(value)) if np.isfinite(value) and value == int(value) else str(value)


def largest_gaps(groups: list[Group]) -> dict[str, Gap]:
    """Return the largest gap of each figure.

    >>> groups = [Group("0", 9, {"accuracy": 0.75}, {}), Group("1", 9, {"accuracy": 0.5}, {})]
    >>> largest_gaps(groups)["accuracy"]
    Gap(size=0.25, lowest='1', highest='0')
    """
    gaps = {}
    for name in groups[0].figures:
        known = [(group.figures[name], group.name) for group in groups if not math.isnan(group.figures[name])]
        if len(known) < 2:
            gaps[name] = Gap(float("nan"), "", "")
            continue
        low, high = min(known, key=lambda pair: pair[0]), max(known, key=lambda pair: pair[0])
        gaps[name] = Gap(high[0] - low[0], low[1], high[1])
    return gaps
