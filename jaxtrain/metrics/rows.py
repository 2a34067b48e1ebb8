"""What an evaluation keeps of each example: arrays with a row per example, collected over batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.metrics.mean import expand_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Arrays of the examples of all batches, in the order of the batches, each example once.

    For figures that no sums give, such as the area under a ROC curve. It merges exactly like sums do, but its
    memory grows with the number of examples: bound it before use.

    Attributes:
      parts: a dict of arrays ``[batch, ...]`` for each batch, with ``included: bool [batch]``.

    >>> first = Rows.of({"score": jnp.array([1.0, 2.0])})
    >>> last = Rows.of({"score": jnp.array([3.0, 9.0])}, mask=jnp.array([True, False]))
    >>> jax.tree.map(np.asarray, first.merge(last)).compute()["score"].tolist()
    [1.0, 2.0, 3.0]
    """

    parts: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, fields: Mapping[str, jax.Array], mask: jax.Array | None = None) -> Self:
        """Keep the rows of one batch.

        Args:
          fields: arrays ``[batch, ...]`` by name; none may be called ``included``.
          mask: bool ``[batch]``; rows where it is false are dropped, and may hold anything.
        """
        rows = len(next(iter(fields.values())))
        included = jnp.ones(rows, bool) if mask is None else mask > 0
        kept = {name: jnp.where(expand_mask(included, x.ndim), x, 0) for name, x in fields.items()}
        return cls(({**kept, "included": included},))

    def merge(self, other: Self) -> Self:
        """Return the rows of both, those of ``other`` last."""
        return type(self)((*self.parts, *other.parts))

    def compute(self) -> dict[str, np.ndarray]:
        """Return the arrays ``[examples, ...]`` by name."""
        included = [np.asarray(part["included"]) > 0 for part in self.parts]
        return {
            name: np.concatenate([part[name][rows] for part, rows in zip(self.parts, included, strict=True)])
            for name in self.parts[0]
            if name != "included"
        }
