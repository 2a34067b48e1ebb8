"""A report's metrics as one metric, and as figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp  # noqa: F401 - the doctests
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Metrics
from jaxtrain.metrics.mean import Mean, Total, check_mergeable, merge  # noqa: F401 - the doctests

LEFT_OUT = "labels_left_out"
REPORT = "task report"
"""The name of a report's metrics among those of an evaluation."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MetricGroup:
    """Several metrics as one, whose ``compute`` returns their figures.

    >>> MetricGroup({"loss": Mean(3.0, 2.0)}).merge(MetricGroup({"loss": Mean(1.0, 2.0)})).compute()
    {'loss': 1.0}
    """

    metrics: Metrics

    def merge(self, other: Self) -> Self:
        """Return the group merged by name."""
        return type(self)(merge(self.metrics, other.metrics))

    def compute(self) -> dict[str, Any]:
        """Return ``report_figures``."""
        return report_figures(self.metrics)


@dataclasses.dataclass(frozen=True)
class GroupedReport:
    """A report whose metrics are one metric, ``REPORT``, so that no name collides with one of the loss.

    >>> GroupedReport(lambda outputs, batch: {"loss": Mean.of(outputs)})(jnp.ones(2), {})[REPORT].compute()
    {'loss': 1.0}
    """

    report: Any

    @property
    def chunked(self) -> bool:
        """Whether the report accepts ``ChunkedLogits``."""
        return bool(getattr(self.report, "chunked", False))

    def __call__(self, outputs: Any, batch: Batch) -> Metrics:
        """Return the metrics of one batch."""
        metrics = self.report(outputs, batch)
        check_mergeable("report", metrics)
        return {REPORT: MetricGroup(dict(metrics))}


def report_figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report's metrics as figures: numbers and arrays by name.

    Args:
      metrics: those that a report returned, or what their ``compute`` returned. A metric that computes a dict
        is replaced by its entries.

    Raises:
      InputError: a model with one class has labels of others.

    >>> report_figures({"error": Mean(3.0, 2.0), "labels_left_out": Total(0)})
    {'error': 1.5}
    """
    figures: dict[str, Any] = {}
    for name, metric in metrics.items():
        value = metric.compute() if hasattr(metric, "compute") else metric
        figures |= value if isinstance(value, Mapping) else {name: value}
    if LEFT_OUT in figures:
        figures[LEFT_OUT] = int(figures[LEFT_OUT])
    if not figures.get(LEFT_OUT, True):
        del figures[LEFT_OUT]
    if LEFT_OUT in figures and np.shape(figures.get("precision", 0)) == (1,):
        raise InputError(
            "the model has one class and the labels have more: one logit for two classes is reported by "
            "metrics.Binary"
        )
    return {name: x.item() if np.ndim(x) == 0 and hasattr(x, "item") else x for name, x in figures.items()}
