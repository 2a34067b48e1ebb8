"""Means and totals that merge exactly: sums and counts on the device, divided only when they are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError


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
        included = jnp.broadcast_to(expand_mask(mask, values.ndim) > 0, values.shape)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perplexity(Mean):
    """The exponential of a mean; of cross-entropies in nats, the perplexity over all tokens.

    >>> round(Perplexity.of(jnp.log(jnp.array([2.0, 8.0]))).compute(), 4)
    4.0
    """

    def compute(self) -> float:
        """Return the perplexity as a Python float, infinity above 1.8e308; NaN if nothing was counted."""
        with np.errstate(over="ignore"):
            return float(np.exp(super().compute()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bits(Mean):
    """A mean in bits, of values in nats: divided by log 2.

    >>> round(Bits.of(jnp.log(jnp.array([2.0, 8.0]))).compute(), 4)
    2.0
    """

    def compute(self) -> float:
        """Return the mean in bits as a Python float; NaN if nothing was counted."""
        return super().compute() / math.log(2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Total:
    """A count that is summed over batches.

    >>> Total(3).merge(Total(4)).compute()
    7.0
    """

    total: Any

    def merge(self, other: Self) -> Self:
        """Return the sum of both."""
        return type(self)(self.total + other.total)

    def compute(self) -> float:
        """Return the count as a Python float."""
        return float(self.total)


def merge(left: Mapping[str, Any] | None, right: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two dicts of metrics by name; ``left=None`` means no metrics yet."""
    return dict(right) if left is None else {name: left[name].merge(right[name]) for name in right}


def check_mergeable(owner: str, metrics: Any) -> None:
    """Raise InputError unless ``metrics`` is a dict of metrics; ``owner`` returned it."""
    if not isinstance(metrics, Mapping):
        raise InputError(f"{owner} must return a dict of mergeable metrics, not a {type(metrics).__name__}")
    for name, metric in metrics.items():
        if not (hasattr(metric, "merge") and hasattr(metric, "compute")):
            raise InputError(
                f"{owner} returns the metric {name!r} as a bare {_kind(metric)}, which cannot be "
                "merged over batches: return jaxtrain.metrics.Mean.of(values, batch.get('mask'))"
            )
        for leaf in jax.tree.leaves(metric):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
                raise InputError(
                    f"{owner} returns the metric {name!r} with a {type(leaf).__name__} in it: a metric is "
                    "a pytree of arrays, such as a class with @jax.tree_util.register_dataclass"
                )


def _kind(metric: Any) -> str:
    return "array" if isinstance(metric, jax.Array) else type(metric).__name__


def expand_mask(mask: jax.Array, ndim: int) -> jax.Array:
    """Return ``mask`` with trailing axes of size 1, up to ``ndim`` axes."""
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))
