"""Metrics that merge exactly: sums and counts on the device, an average only when read.

Ragged last batches, padding, gradient accumulation and sharding all merge without weighting tricks,
because nothing is divided before everything has been added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
    def of(cls, values: jax.Array, mask: jax.Array | None = None) -> Mean:
        """The mean of ``values: float [batch, ...]``; rows where ``mask: [batch]`` is false are left out.

        A masked-out value may be anything, NaN included: it is never multiplied, only dropped.
        """
        values = jnp.asarray(values, jnp.float32) if values.dtype != jnp.float64 else values
        if mask is None:
            return cls(values.sum(), jnp.asarray(values.size, values.dtype))
        kept = jnp.broadcast_to(_expand(mask, values.ndim) > 0, values.shape)
        return cls(jnp.where(kept, values, 0).sum(), kept.sum(dtype=values.dtype))

    def merge(self, other: Mean) -> Mean:
        """The mean over both."""
        return Mean(self.total + other.total, self.count + other.count)

    def compute(self) -> float:
        """The average as a Python float; NaN when nothing was counted."""
        return float(self.total) / float(self.count) if float(self.count) else float("nan")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfusionMatrix:
    """Counts of (true class, predicted class): int32 ``[classes, classes]``.

    >>> cm = ConfusionMatrix.of(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0]))
    >>> cm.compute()["recall"].tolist()
    [0.5, 0.0]
    """

    counts: Any

    @classmethod
    def of(cls, logits: jax.Array, label: jax.Array, mask: jax.Array | None = None) -> ConfusionMatrix:
        """From ``logits: float [batch, classes]`` and ``label: int [batch]``; masked rows are left out."""
        classes = logits.shape[-1]
        cell = label.reshape(-1) * classes + logits.argmax(-1).reshape(-1)
        kept = jnp.ones(cell.shape, jnp.int32)
        if mask is not None:
            kept = jnp.broadcast_to(_expand(mask, label.ndim) > 0, label.shape).reshape(-1).astype(jnp.int32)
        counts = jnp.zeros(classes * classes, jnp.int32).at[cell].add(kept)
        return cls(counts.reshape(classes, classes))

    def merge(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """The counts of both."""
        return ConfusionMatrix(self.counts + other.counts)

    def compute(self) -> dict[str, Any]:
        """``accuracy``, a float; ``precision``, ``recall``, ``f1``: float ``[classes]``, 0 if undefined."""
        counts = np.asarray(self.counts, np.float64)
        hit = np.diag(counts)
        precision = _ratio(hit, counts.sum(0))
        recall = _ratio(hit, counts.sum(1))
        return {
            "accuracy": float(_ratio(hit.sum(), counts.sum())),
            "precision": precision,
            "recall": recall,
            "f1": _ratio(2 * precision * recall, precision + recall),
        }


def merge(left: Mapping[str, Any] | None, right: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two dicts of metrics by name; ``left=None`` is the empty start."""
    return dict(right) if left is None else {name: left[name].merge(right[name]) for name in right}


def _expand(mask: jax.Array, ndim: int) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def _ratio(top: Any, bottom: Any) -> Any:
    top, bottom = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
