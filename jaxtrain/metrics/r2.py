"""The coefficient of determination, from sums that merge without loss of precision."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.metrics.mean import expand_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class R2:
    """R², the share of the target's variance that predictions explain, averaged over the outputs.

    The figure of ``sklearn.metrics.r2_score``: 1 for perfect predictions, 0 for the mean of the targets. An
    output whose target is constant has 1 if every prediction is right, else 0.

    Targets are summed relative to ``shift``, close to their mean: sums of the squares of large targets would
    lose their variance in float32.

    Attributes:
      count: targets that count, float ``[outputs]``.
      shift: subtracted from the targets, float ``[outputs]``.
      total: sum of ``target - shift``, float ``[outputs]``.
      squares: sum of ``(target - shift)**2``, float ``[outputs]``.
      residual: sum of ``(prediction - target)**2``, float ``[outputs]``.

    >>> R2.of(jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 2.0, 3.0])).compute()
    0.5
    """

    count: Any
    shift: Any
    total: Any
    squares: Any
    residual: Any

    @classmethod
    def of(cls, prediction: jax.Array, target: jax.Array, mask: jax.Array | None = None) -> Self:
        """Return R² of one batch.

        Args:
          prediction: float ``[batch]`` or ``[batch, ..., outputs]``.
          target: likewise, of the same shape.
          mask: bool ``[batch]`` or ``[batch, ...]``; where it is false, nothing is counted.
        """
        dtype = jnp.promote_types(jnp.promote_types(prediction.dtype, target.dtype), jnp.float32)
        mask = jnp.ones(target.shape[:1], bool) if mask is None else mask
        included = jnp.broadcast_to(expand_mask(mask, target.ndim) > 0, target.shape)
        outputs = target.shape[-1] if target.ndim > 1 else 1
        prediction, target = (
            jnp.where(included, x.astype(dtype), 0).reshape(-1, outputs) for x in (prediction, target)
        )
        included = included.reshape(-1, outputs)
        count = included.sum(0, dtype=dtype)
        low = jnp.where(included, target, jnp.inf).min(0)
        high = jnp.where(included, target, -jnp.inf).max(0)
        mean = target.sum(0) / jnp.maximum(count, 1)
        shift = jnp.where(low == high, low, mean)  # exact where the target is constant
        moved = jnp.where(included, target - shift[None], 0)
        residual = ((prediction - target) ** 2).sum(0)
        return cls(count, shift, moved.sum(0), (moved**2).sum(0), residual)

    def merge(self, other: Self) -> Self:
        """Return R² over both; exact in float64 on the host."""
        numpy: Any = np if isinstance(self.count, np.ndarray) else jnp
        shift = numpy.where(self.count > 0, self.shift, other.shift)
        mine, theirs = self._moved(shift), other._moved(shift)
        return type(self)(
            self.count + other.count, shift, *(a + b for a, b in zip(mine, theirs, strict=True))
        )

    def _moved(self, shift: Any) -> tuple[Any, Any, Any]:
        """Return total, squares and residual with another shift."""
        by = self.shift - shift
        squares = self.squares + by * (2 * self.total + self.count * by)
        return self.total + self.count * by, squares, self.residual

    def compute(self) -> float:
        """Return R² as a Python float; NaN with fewer than two targets."""
        count, total, squares, residual = (
            np.asarray(x, np.float64) for x in (self.count, self.total, self.squares, self.residual)
        )
        if not count.size or count.min() < 2:
            return float("nan")
        variation = np.maximum(squares - total**2 / count, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            constant = np.where(residual == 0, 1.0, np.where(np.isnan(residual), np.nan, 0.0))
            each = np.where(variation > 0, 1 - residual / variation, constant)
        return float(each.mean())
