"""Layers the models share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.errors import InputError

Activation = Literal["relu", "gelu", "silu", "tanh"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, size: int = 2) -> jax.Array:
    """Non-overlapping max-pooling: float ``[batch, h, w, c]`` → ``[batch, h // size, w // size, c]``.

    The same values as ``flax.linen.max_pool(x, (size, size), (size, size))``, by reshape and max: on a
    CPU the gradient of XLA's ``reduce_window`` is several times slower. Where a window holds its maximum
    twice the gradient is shared instead of going to the first.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    return _windows(x, size).max((2, 4))


@max_pool.defjvp
def _max_pool_jvp(
    size: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """JAX's own rule for a maximum, but for the 1: its quotient of 0 / 0 is NaN.

    XLA may compute ``x`` once for the maximum and once more for the comparison and round it otherwise, so
    that a window holds no value that equals its maximum.
    """
    windows, out = _windows(primals[0], size), max_pool(primals[0], size)
    hit = (windows == out[:, :, None, :, None]).astype(out.dtype)
    total = (_windows(tangents[0], size) * hit).sum((2, 4))
    return out, total / jnp.maximum(hit.sum((2, 4)), 1)


def _windows(x: jax.Array, size: int) -> jax.Array:
    """``[batch, h, w, c]`` → ``[batch, h // size, size, w // size, size, c]``."""
    # The gradient compares x with its maximum. Without the barrier XLA may compute x once for each side, and
    # where the two differ in the last bit no element is the maximum and the gradient is infinite.
    x = jax.lax.optimization_barrier(x)
    b, h, w, c = x.shape
    rows, columns = h // size, w // size
    return x[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, c)


def check_image(image: jax.Array, smallest: int, model: str) -> None:
    """Raise InputError unless ``image`` is ``[batch, h, w, c]`` of at least ``smallest`` pixels a side.

    Linen would run an unbatched image through a convolution without a word.
    """
    shape = tuple(image.shape)
    if len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] not in (1, 3, 4) and shape[2] > 4:
        raise InputError(
            f"image {shape} looks like [batch, channel, height, width] (NCHW): {model} takes "
            "[batch, height, width, channel]; transpose the source with .transpose(0, 2, 3, 1)"
        )
    if len(shape) != 4:
        raise InputError(
            f"image has shape {shape}: {model} takes [batch, height, width, channel]"
            + (" (add a channel axis of 1)" if len(shape) == 3 else "")
        )
    if min(shape[1:3]) < smallest:
        raise InputError(
            f"image {shape} is too small: {model} halves its sides and needs at least {smallest} pixels"
        )
