"""Logits computed in chunks, so that the array ``[batch, length, vocab]`` is never in memory.

With a large vocabulary the logits and their gradient are by far the largest arrays of a step. A model that
returns ``ChunkedLogits`` (``GPT(head_chunk=64)``) leaves the last matrix product to the loss, which computes
it for some positions of every sequence at a time, and again in the backward pass.
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
    """``features @ table.T``, computed for some positions at a time.

    Attributes:
      features: float ``[batch, length, width]``.
      table: float ``[vocab, width]``, such as the embedding of a tied head.
      chunk: the largest number of positions of each sequence in a chunk. Batch and vocabulary are not cut,
        so a mesh may split both.
      precision: dtype of the product's inputs. Sums and logits are in float32 at least, and so is the
        gradient of the table, which is summed over the chunks.

    A loss with an attribute ``chunked = True`` receives this object; any other loss receives ``full()``.

    >>> logits = ChunkedLogits.of(jnp.ones((2, 5, 3)), jnp.ones((7, 3)), chunk=2)
    >>> logits.shape, logits.full().shape
    ((2, 5, 7), (2, 5, 7))
    >>> logits.map_chunks(lambda part: part.max(-1)).shape
    (2, 5)
    """

    features: Any
    table: Any
    chunk: int
    precision: str

    @classmethod
    def of(cls, features: jax.Array, table: jax.Array, chunk: int) -> Self:
        """Create it with the present dtype of its parts; a later cast (``models.compute_in``) keeps that."""
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

    def full(self) -> jax.Array:
        """Compute all logits: float ``[batch, length, vocab]``."""
        return _product(self.features, self.table, self.precision)

    def map_chunks(self, fn: Callable[..., Any], *others: jax.Array) -> Any:
        """Apply ``fn(logits, *others)`` to each chunk and concatenate; the backward pass recomputes it.

        Args:
          fn: takes float ``[batch, n, vocab]`` and the same positions of ``others``; returns a pytree of
            arrays ``[batch, n, ...]``, in which no position may depend on another.
          others: arrays ``[batch, length, ...]``.
        """
        batch, length = self.features.shape[:2]
        count = -(-length // self.chunk)
        size = -(-length // count)  # equal chunks, so that the last needs little padding

        def split(x: jax.Array) -> jax.Array:
            padding = [(0, 0)] * x.ndim
            padding[1] = (0, count * size - length)
            return jnp.moveaxis(jnp.pad(x, padding).reshape(batch, count, size, *x.shape[2:]), 1, 0)

        def join(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x, 0, 1).reshape(batch, count * size, *x.shape[3:])[:, :length]

        # prevent_cse=False: forward and backward pass are two loops, and XLA merges nothing across loops.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def chunk(features: jax.Array, table: jax.Array, *parts: jax.Array) -> Any:
            return fn(_product(features, table, self.precision), *parts)

        def step(_: None, parts: tuple[jax.Array, ...]) -> tuple[None, Any]:
            return None, chunk(parts[0], self.table, *parts[1:])

        parts = tuple(map(split, (self.features, *others)))
        return jax.tree.map(join, jax.lax.scan(step, None, parts)[1])


def full_logits(outputs: Any) -> Any:
    """Return a model's outputs with ``ChunkedLogits`` computed in full.

    >>> full_logits(ChunkedLogits.of(jnp.ones((1, 2, 3)), jnp.ones((4, 3)), chunk=1)).shape
    (1, 2, 4)
    """
    return outputs.full() if isinstance(outputs, ChunkedLogits) else outputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(features: jax.Array, table: jax.Array, precision: str) -> jax.Array:
    """``[batch, n, width]`` and ``[vocab, width]`` → ``[batch, n, vocab]``."""
    return _einsum("bnw,vw->bnv", features, table, precision)


def _einsum(text: str, left: jax.Array, right: jax.Array, precision: str) -> jax.Array:
    wide = jnp.promote_types(precision, jnp.float32)
    return jnp.einsum(text, left.astype(precision), right.astype(precision), preferred_element_type=wide)


def _forward(features: jax.Array, table: jax.Array, precision: str) -> Any:
    return _product(features, table, precision), (features, table)


def _backward(precision: str, saved: Any, gradient: jax.Array) -> Any:
    """Cast the gradient to ``precision``; JAX's own rule multiplies in float32, which is slow on a GPU."""
    features, table = saved
    to_features = _einsum("bnv,vw->bnw", gradient, table, precision)
    to_table = _einsum("bnv,bnw->vw", gradient, features, precision)
    return to_features.astype(features.dtype), to_table.astype(table.dtype)


_product.defvjp(_forward, _backward)
