"""Logits that are never there as a whole: features, and the table that they are multiplied with.

For ``[batch, length, vocab]`` with a large vocabulary the logits and their gradient are the largest arrays of
a step by far. A model that returns ``ChunkedLogits`` (``GPT(head_chunk=64)``) leaves the last product to the
loss, which takes some positions of every sequence at a time and computes them again in the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("features", "table"), meta_fields=("chunk", "precision")
)
@dataclasses.dataclass(frozen=True)
class ChunkedLogits:
    """``features @ table.T``, some positions at a time.

    Attributes:
      features: float ``[batch, length, width]``.
      table: float ``[vocab, width]``, such as the embedding of a tied head.
      chunk: how many positions of every sequence at most are multiplied at once. Batch and vocabulary are
        not cut, so a mesh may split both.
      precision: the type that the product reads; sums are in float32 at least, and so are the logits, and
        the gradient of the table from one chunk to the next.

    A loss takes it as it is if it has an attribute ``chunked = True``; any other is given ``whole()``.

    >>> logits = ChunkedLogits.of(jnp.ones((2, 5, 3)), jnp.ones((7, 3)), chunk=2)
    >>> logits.shape, logits.whole().shape
    ((2, 5, 7), (2, 5, 7))
    >>> logits.each(lambda part: part.max(-1)).shape
    (2, 5)
    """

    features: Any
    table: Any
    chunk: int
    precision: str

    @classmethod
    def of(cls, features: jax.Array, table: jax.Array, chunk: int) -> Self:
        """Computed in the type of its parts, whatever they are cast to afterwards (``models.compute_in``)."""
        precision = jnp.promote_types(features.dtype, table.dtype).name
        return cls(features, table, chunk, precision)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(batch, length, vocab)``."""
        return (*self.features.shape[:-1], self.table.shape[0])

    @property
    def ndim(self) -> int:
        """3."""
        return len(self.shape)

    def whole(self) -> jax.Array:
        """The logits, float ``[batch, length, vocab]``."""
        return _product(self.features, self.table, self.precision)

    def each(self, fn: Callable[..., Any], *others: jax.Array) -> Any:
        """``fn(logits, *others)`` of every chunk, put together again; the backward pass computes it again.

        Args:
          fn: takes float ``[batch, n, vocab]`` and the same positions of ``others``; gives a pytree of
            arrays ``[batch, n, ...]``, in which no position may depend on another.
          others: arrays ``[batch, length, ...]``.
        """
        batch, length = self.features.shape[:2]
        count = -(-length // self.chunk)
        size = -(-length // count)  # equal parts, so that little is added to the last

        def cut(x: jax.Array) -> jax.Array:
            added = [(0, 0)] * x.ndim
            added[1] = (0, count * size - length)
            return jnp.moveaxis(jnp.pad(x, added).reshape(batch, count, size, *x.shape[2:]), 1, 0)

        def joined(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x, 0, 1).reshape(batch, count * size, *x.shape[3:])[:, :length]

        # The forward and the backward pass are two loops, between which XLA merges nothing by itself.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def one(features: jax.Array, table: jax.Array, *parts: jax.Array) -> Any:
            return fn(_product(features, table, self.precision), *parts)

        def step(_: None, parts: tuple[jax.Array, ...]) -> tuple[None, Any]:
            return None, one(parts[0], self.table, *parts[1:])

        parts = tuple(map(cut, (self.features, *others)))
        return jax.tree.map(joined, jax.lax.scan(step, None, parts)[1])


def whole(outputs: Any) -> Any:
    """A model's outputs as plain arrays.

    >>> whole(ChunkedLogits.of(jnp.ones((1, 2, 3)), jnp.ones((4, 3)), chunk=1)).shape
    (1, 2, 4)
    """
    return outputs.whole() if isinstance(outputs, ChunkedLogits) else outputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(features: jax.Array, table: jax.Array, precision: str) -> jax.Array:
    """``[batch, n, width]`` and ``[vocab, width]`` → ``[batch, n, vocab]``."""
    return _einsum("bnw,vw->bnv", features, table, precision)


def _einsum(text: str, left: jax.Array, right: jax.Array, precision: str) -> jax.Array:
    wide = jnp.promote_types(precision, jnp.float32)
    return jnp.einsum(text, left.astype(precision), right.astype(precision), preferred_element_type=wide)


def _forward(features: jax.Array, table: jax.Array, precision: str) -> Any:
    return _product(features, table, precision), (features, table)


def _backward(precision: str, kept: Any, gradient: jax.Array) -> Any:
    """JAX's own rule would multiply in float32, because the gradient is: a GPU's slow way."""
    features, table = kept
    to_features = _einsum("bnv,vw->bnw", gradient, table, precision)
    to_table = _einsum("bnv,bnw->vw", gradient, features, precision)
    return to_features.astype(features.dtype), to_table.astype(table.dtype)


_product.defvjp(_forward, _backward)
