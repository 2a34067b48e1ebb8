"""Metrics that merge exactly: sums and counts on the device, an average only when read.

Ragged last batches, padding, gradient accumulation and sharding all merge without weighting tricks,
because nothing is divided before everything has been added.
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
    """A weighted mean as its sum and its weight.

    >>> a = Mean.of(jnp.array([1.0, 2.0]))
    >>> b = Mean.of(jnp.array([6.0, 9.0]), mask=jnp.array([True, False]))
    >>> a.merge(b).compute()
    3.0
    """

    total: Any
    count: Any

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array | None = None) -> Self:
        """The mean of ``values: float [batch, ...]``; rows where ``mask: [batch]`` is false are left out.

        A masked-out value may be anything, NaN included: it is never multiplied, only dropped.
        """
        values = jnp.asarray(values, jnp.float32) if values.dtype != jnp.float64 else values
        if mask is None:
            return cls(values.sum(), jnp.asarray(values.size, values.dtype))
        kept = jnp.broadcast_to(_expand(mask, values.ndim) > 0, values.shape)
        return cls(jnp.where(kept, values, 0).sum(), kept.sum(dtype=values.dtype))

    def merge(self, other: Self) -> Self:
        """The mean over both."""
        return type(self)(self.total + other.total, self.count + other.count)

    def compute(self) -> float:
        """The average as a Python float; NaN when nothing was counted."""
        return float(self.total) / float(self.count) if float(self.count) else float("nan")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RootMean(Mean):
    """The square root of a weighted mean: of squared errors, their RMSE over all batches.

    >>> RootMean.of(jnp.array([9.0])).merge(RootMean.of(jnp.array([25.0, 14.0]))).compute()
    4.0
    """

    def compute(self) -> float:
        """The root as a Python float; NaN when nothing was counted."""
        return math.sqrt(super().compute())


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Counts of (true class, predicted class): int32 ``[classes, classes]``."""

    counts: Any

    @classmethod
    def of(cls, logits: jax.Array, label: jax.Array, mask: jax.Array | None = None) -> Self:
        """From ``logits: float [batch, ..., classes]`` and ``label: int [batch, ...]``.

        Rows where ``mask: [batch]`` is false are left out, whatever they hold.
        """
        classes = logits.shape[-1]
        # Class maps are often uint8, which the product would overflow.
        cell = label.reshape(-1).astype(jnp.int32) * classes + logits.argmax(-1).reshape(-1)
        kept = jnp.ones(cell.shape, jnp.int32)
        if mask is not None:
            kept = jnp.broadcast_to(_expand(mask, label.ndim) > 0, label.shape).reshape(-1).astype(jnp.int32)
        counts = jnp.zeros(classes * classes, jnp.int32).at[cell].add(kept)
        return cls(counts.reshape(classes, classes))

    def merge(self, other: Self) -> Self:
        """The counts of both."""
        if isinstance(self.counts, np.ndarray):  # on the host: int32 would end at 2^31 pixels
            return type(self)(np.add(self.counts, other.counts, dtype=np.int64))
        return type(self)(self.counts + other.counts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfusionMatrix(_Counts):
    """Counts of (true class, predicted class), for every figure that follows from them.

    >>> cm = ConfusionMatrix.of(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0]))
    >>> cm.compute()["recall"].tolist()
    [0.5, 0.0]
    """

    def compute(self) -> dict[str, Any]:
        """The figures of each class as float ``[classes]``, and two of all, as floats.

        ``precision``, ``recall``, ``f1`` and ``iou`` (intersection over union: the hits among all that
        are of the class or taken for it) are 0 where undefined. ``accuracy`` is over all examples;
        ``mean_iou`` the mean over the classes that occur in truth or prediction, 0 when none does.
        """
        counts = np.asarray(self.counts, np.float64)
        hit, guessed, true = np.diag(counts), counts.sum(0), counts.sum(1)
        precision, recall = _ratio(hit, guessed), _ratio(hit, true)
        union = guessed + true - hit
        iou = _ratio(hit, union)
        return {
            "accuracy": float(_ratio(hit.sum(), counts.sum())),
            "precision": precision,
            "recall": recall,
            "f1": _ratio(2 * precision * recall, precision + recall),
            "iou": iou,
            "mean_iou": float(_ratio(iou.sum(), (union > 0).sum())),
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanIoU(_Counts):
    """The mean intersection over union as one number, so that it can stand beside a loss.

    It is of the counts of all batches together, not the mean of every batch's own.

    >>> MeanIoU.of(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0])).compute()
    0.25
    """

    def compute(self) -> float:
        """The ``mean_iou`` of ``ConfusionMatrix``."""
        figure: float = ConfusionMatrix(self.counts).compute()["mean_iou"]
        return figure


def merge(left: Mapping[str, Any] | None, right: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two dicts of metrics by name; ``left=None`` is the empty start."""
    return dict(right) if left is None else {name: left[name].merge(right[name]) for name in right}


def _expand(mask: jax.Array, ndim: int) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def _ratio(top: Any, bottom: Any) -> Any:
    top, bottom = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
