"""Layers the models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
from flax import linen as nn

from jaxtrain.errors import InputError

Activation = Literal["relu", "gelu", "silu", "tanh"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}


def max_pool(x: jax.Array, size: int = 2) -> jax.Array:
    """Non-overlapping max-pooling: float ``[batch, h, w, c]`` → ``[batch, h // size, w // size, c]``.

    The same values as ``flax.linen.max_pool(x, (size, size), (size, size))``, by reshape and max: on a
    CPU the gradient of XLA's ``reduce_window`` is several times slower. Where a window holds its maximum
    twice the gradient is shared instead of going to the first.

    >>> import jax.numpy as jnp
    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    b, h, w, c = x.shape
    rows, columns = h // size, w // size
    x = x[:, : rows * size, : columns * size]
    return x.reshape(b, rows, size, columns, size, c).max((2, 4))


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
