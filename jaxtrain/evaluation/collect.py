"""What an evaluation collects of each example on the device: ``Collect``.

A row is small: of a class its label, prediction and probability; of a segmented image the counts of its
pixels by class; of a text the sum of its losses. Figures of subsets, such as groups and bootstrap resamples,
are computed from the rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError
from jaxtrain.core.outputs import select_output
from jaxtrain.core.types import Batch, Metrics
from jaxtrain.evaluation.calibration import BINS
from jaxtrain.metrics import Binary, Classification, LanguageModel, MultiLabel, Regression
from jaxtrain.metrics.counts import count_labels
from jaxtrain.metrics.figures import GroupedReport
from jaxtrain.metrics.mean import expand_mask
from jaxtrain.metrics.reports import batch_field, binary_logits, class_scores
from jaxtrain.metrics.rows import Rows
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID

ROWS = "rows of examples"
"""The name of the collected rows among the metrics of an evaluation."""
LIMIT = 2**27
"""Most numbers that are collected: 1 GiB in float64 on each host."""
GROUP = "group"
"""The row field with the value of ``Collect.by``."""


@dataclasses.dataclass(frozen=True)
class Collect:
    """The metrics of a report's evaluation: the report's own, and what is collected of each example.

    Nothing is collected for a report that is not one of jaxtrain's, and where it would be more than ``limit``
    numbers. The scores of all classes, which AUROC and average precision need, are left out first.

    Attributes:
      report: a task report.
      examples: how many examples are evaluated.
      by: a batch field with the group of each example; None for none.
      limit: most numbers that are collected.
    """

    report: Any
    examples: int
    by: str | None = None
    limit: int = LIMIT

    @property
    def chunked(self) -> bool:
        """Whether the report accepts ``ChunkedLogits``."""
        return bool(getattr(self.report, "chunked", False))

    def __call__(self, outputs: Any, batch: Batch) -> Metrics:
        """Return the metrics of one batch."""
        metrics = GroupedReport(self.report)(outputs, batch)
        group = {} if self.by is None else {GROUP: group_field(batch, self.by)}
        for scores in (True, False):
            rows = example_rows(self.report, outputs, batch, scores)
            numbers = sum(math.prod(x.shape[1:]) for x in rows.values())
            if rows and numbers * self.examples <= self.limit:
                return {
                    **metrics,
                    ROWS: Rows.of({EXAMPLE_ID: batch[EXAMPLE_ID], **rows, **group}, batch["mask"]),
                }
        return metrics


def group_field(batch: Batch, name: str) -> jax.Array:
    """Return the batch field with the groups, ``[batch]``.

    Raises:
      InputError: there is no such field, or it has more than one value for each example.
    """
    own = {field: x for field, x in batch.items() if field not in ("mask", EXAMPLE_ID, EPOCH)}
    if name not in own:
        raise InputError(f"--by {name}: the examples have the fields {', '.join(sorted(own))}")
    values = own[name]
    if values.size != len(values):
        raise InputError(
            f"--by {name}: it has the shape {list(values.shape[1:])} in each example: it must have one value"
        )
    return values.reshape(len(values))


@functools.singledispatch
def example_rows(report: Any, outputs: Any, batch: Batch, scores: bool) -> dict[str, jax.Array]:
    """Return what is collected of each example of a batch: arrays ``[batch, ...]``; {} for another report.

    Args:
      report: a task report.
      outputs: of the model.
      batch: with the fields that the report reads.
      scores: whether to collect the scores of all classes.
    """
    return {}


@example_rows.register
def _(report: Classification, outputs: Any, batch: Batch, scores: bool) -> dict[str, jax.Array]:
    logits, label, mask = class_scores(report, outputs, batch)
    label, included, _ = count_labels(label, logits.shape[-1], mask, report.ignore)
    logp = jax.nn.log_softmax(_at_least_float32(logits))
    prediction = logits.argmax(-1).astype(jnp.int32)
    confidence = jnp.exp(jnp.take_along_axis(logp, prediction[..., None], -1)[..., 0])
    if label.ndim > 1:
        return _class_counts(label, prediction, confidence, included, logits.shape[-1])
    own = jnp.take_along_axis(logp, label[:, None], -1)
    before = jnp.arange(logits.shape[-1])[None, :] < label[:, None]  # ties are in the order of the classes
    rank = ((logp > own) | ((logp == own) & before)).sum(-1, dtype=jnp.int32)
    rows = {
        "label": jnp.where(included, label, -1),
        "prediction": prediction,
        "probability": confidence,
        "label_logp": own[:, 0],
        "rank": rank,
    }
    return {**rows, "scores": logp} if scores else rows


def _class_counts(
    label: jax.Array, prediction: jax.Array, confidence: jax.Array, included: jax.Array, classes: int
) -> dict[str, jax.Array]:
    """Return counts of each example, by class ``[batch, classes]`` and by bin ``[batch, BINS]``."""
    rows = len(label)
    label, prediction, confidence, included = (
        x.reshape(rows, -1) for x in (label, prediction, confidence, included)
    )

    def count(index: jax.Array, weight: jax.Array, size: int) -> jax.Array:
        one = lambda index, weight: jnp.zeros(size, weight.dtype).at[index].add(weight)  # noqa: E731
        return jax.vmap(one)(index, weight)

    hit = included & (label == prediction)
    # (low, high], as calibration.bin_of
    place = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    return {
        "hits": count(label, hit.astype(jnp.int32), classes),
        "predicted": count(prediction, included.astype(jnp.int32), classes),
        "actual": count(label, included.astype(jnp.int32), classes),
        "bin_count": count(place, included.astype(jnp.int32), BINS),
        "bin_hits": count(place, hit.astype(jnp.int32), BINS),
        "bin_confidence": count(place, jnp.where(included, confidence, 0), BINS),
    }


@example_rows.register
def _(report: Binary, outputs: Any, batch: Batch, scores: bool) -> dict[str, jax.Array]:
    logits, label, included, _ = binary_logits(report, outputs, batch)
    columns = logits.shape[-1] if isinstance(report, MultiLabel) else 1
    shape = (len(logits), logits[0].size // columns, columns)  # questions of an example, and their labels
    label = jnp.where(included, label.astype(jnp.int32), -1)
    return {"label": label.reshape(shape), "logit": _at_least_float32(logits).reshape(shape)}


@example_rows.register
def _(report: Regression, outputs: Any, batch: Batch, scores: bool) -> dict[str, jax.Array]:
    prediction = select_output(outputs, report.output, "report.output")
    target = batch_field(batch, report.target, "target")
    columns = target.shape[-1] if target.ndim > 1 else 1
    shape = (len(target), target[0].size // columns, columns)
    rows = {"target": target, "prediction": prediction}
    return {name: _at_least_float32(x).reshape(shape) for name, x in rows.items()}


@example_rows.register
def _(report: LanguageModel, outputs: Any, batch: Batch, scores: bool) -> dict[str, jax.Array]:
    nll, included, _ = report.token_losses(outputs, batch)
    included &= expand_mask(batch["mask"], included.ndim) > 0
    axes = tuple(range(1, nll.ndim))
    return {"nll": jnp.where(included, nll, 0).sum(axes), "tokens": included.sum(axes, dtype=jnp.int32)}


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
