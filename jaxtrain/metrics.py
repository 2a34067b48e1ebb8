"""Metrics that merge exactly: sums and counts on the device, divided only when they are read.

So results do not depend on how examples are split into batches: ragged last batches, padding, gradient
accumulation and sharding need no weighting.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean, stored as ``total`` and ``count``.

    >>> a = Mean.of(jnp.array([1.0, 2.0]))
    >>> b = Mean.of(jnp.array([6.0, 9.0]), mask=jnp.array([True, False]))
    >>> a.merge(b).compute()
    3.0
    """

    total: Any
    count: Any

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array | None = None) -> Self:
        """Return the mean of ``values: float [batch, ...]`` over the rows where ``mask: [batch]`` is true.

        Masked values may be anything, even NaN: they are dropped, not multiplied by 0.
        """
        values = jnp.asarray(values, jnp.float32) if values.dtype != jnp.float64 else values
        if mask is None:
            return cls(values.sum(), jnp.asarray(values.size, values.dtype))
        included = jnp.broadcast_to(_expand(mask, values.ndim) > 0, values.shape)
        return cls(jnp.where(included, values, 0).sum(), included.sum(dtype=values.dtype))

    def merge(self, other: Self) -> Self:
        """Return the mean over both."""
        return type(self)(self.total + other.total, self.count + other.count)

    def compute(self) -> float:
        """Return the mean as a Python float; NaN if nothing was counted."""
        return float(self.total) / float(self.count) if float(self.count) else float("nan")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RootMean(Mean):
    """The square root of a mean; for squared errors the RMSE over all batches.

    >>> RootMean.of(jnp.array([9.0])).merge(RootMean.of(jnp.array([25.0, 14.0]))).compute()
    4.0
    """

    def compute(self) -> float:
        """Return the root as a Python float; NaN if nothing was counted."""
        return math.sqrt(super().compute())


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Counts of (true class, predicted class): int32 ``[classes, classes]``."""

    counts: Any

    @classmethod
    def of(cls, logits: jax.Array, label: jax.Array, mask: jax.Array | None = None) -> Self:
        """Count the predictions of one batch.

        Args:
          logits: float ``[batch, ..., classes]``.
          label: int ``[batch, ...]`` in ``[0, classes)``.
          mask: bool ``[batch]`` or ``[batch, ...]``; where it is false, logits and label are ignored.
        """
        classes = logits.shape[-1]
        # Segmentation masks are often uint8, in which the product would overflow.
        cell = label.reshape(-1).astype(jnp.int32) * classes + logits.argmax(-1).reshape(-1)
        weight = jnp.ones(cell.shape, jnp.int32)
        if mask is not None:
            included = jnp.broadcast_to(_expand(mask, label.ndim) > 0, label.shape)
            weight = included.reshape(-1).astype(jnp.int32)
        counts = jnp.zeros(classes * classes, jnp.int32).at[cell].add(weight)
        return cls(counts.reshape(classes, classes))

    def merge(self, other: Self) -> Self:
        """Return the sum of both."""
        if isinstance(self.counts, np.ndarray):  # on the host, where int32 would overflow at 2^31 pixels
            return type(self)(np.add(self.counts, other.counts, dtype=np.int64))
        return type(self)(self.counts + other.counts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfusionMatrix(_Counts):
    """Counts of (true class, predicted class), and precision, recall, F1 and IoU computed from them.

    >>> cm = ConfusionMatrix.of(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0]))
    >>> cm.compute()["recall"].tolist()
    [0.5, 0.0]
    """

    def compute(self) -> dict[str, Any]:
        """Return ``precision``, ``recall``, ``f1`` and ``iou`` per class, ``accuracy`` and ``mean_iou``.

        The first four are float ``[classes]`` and 0 where undefined; ``iou`` is intersection over union, hits
        divided by the examples that are of the class or predicted as it. ``accuracy`` is over all examples;
        ``mean_iou`` is the mean over the classes that occur as label or prediction, 0 if none does.
        """
        counts = np.asarray(self.counts, np.float64)
        hits, predicted, true = np.diag(counts), counts.sum(0), counts.sum(1)
        precision, recall = _ratio(hits, predicted), _ratio(hits, true)
        union = predicted + true - hits
        iou = _ratio(hits, union)
        return {
            "accuracy": float(_ratio(hits.sum(), counts.sum())),
            "precision": precision,
            "recall": recall,
            "f1": _ratio(2 * precision * recall, precision + recall),
            "iou": iou,
            "mean_iou": float(_ratio(iou.sum(), (union > 0).sum())),
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanIoU(_Counts):
    """The mean intersection over union as one number, to report during training.

    It is computed from the counts of all batches together; it is not a mean of batch results.

    >>> MeanIoU.of(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0])).compute()
    0.25
    """

    def compute(self) -> float:
        """Return the ``mean_iou`` of ``ConfusionMatrix``."""
        mean_iou: float = ConfusionMatrix(self.counts).compute()["mean_iou"]
        return mean_iou


def merge(left: Mapping[str, Any] | None, right: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two dicts of metrics by name; ``left=None`` stands for no metrics yet."""
    return dict(right) if left is None else {name: left[name].merge(right[name]) for name in right}


def _expand(mask: jax.Array, ndim: int) -> jax.Array:
    """Return ``mask`` with trailing axes of size 1, up to ``ndim`` axes."""
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def _ratio(top: Any, bottom: Any) -> Any:
    """Return ``top / bottom`` in float64, and 0 where ``bottom`` is 0."""
    top, bottom = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
