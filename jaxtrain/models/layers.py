"""Layers and checks that several models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Names

Activation = Literal["relu", "gelu", "silu", "tanh"]

CONV_AXES: dict[str, Names] = {
    r"norm\d*/": ("channels",),
    r"conv\d*/kernel$": (None, None, None, "channels"),
    r"conv\d*/bias$": ("channels",),
    r"head/kernel$": ("channels", "classes"),
    r"head/bias$": ("classes",),
}
"""Logical axes of a convolutional network with global pooling: convolutions are sharded by output channel."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}


def max_pool(x: jax.Array, size: int = 2) -> jax.Array:
    """Max-pool without overlap: float ``[batch, h, w, c]`` → ``[batch, h // size, w // size, c]``.

    The values are those of ``flax.linen.max_pool(x, (size, size), (size, size))``. They are computed from
    strided slices, because on a CPU the gradient of XLA's ``reduce_window`` is several times slower. Equal
    maxima of a window share its gradient.

    >>> import jax.numpy as jnp
    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    b, h, w, c = x.shape
    rows, columns = h // size, w // size
    windows = x[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, c)
    parts = [windows[:, :, i, :, j] for i in range(size) for j in range(size)]
    while len(parts) > 1:  # as a tree, so that equal elements of a 2×2 window share the gradient equally
        pairs = [_larger(*parts[k : k + 2]) for k in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


@jax.custom_jvp
def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.maximum(a, b)


@_larger.defjvp
def _larger_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return the tangent of the larger one, or the mean of both if they are equal.

    JAX's own rules compare each element with the maximum. XLA may compute an element twice, for the maximum
    and for the comparison, and round it differently; then none is equal, and the gradient is lost or, for
    ``max`` over an axis, 0 / 0. This rule compares two elements: even if they differ in the last bit only,
    the gradient goes to one of them.
    """
    (a, b), (da, db) = primals, tangents
    return jnp.maximum(a, b), jnp.where(a == b, 0.5 * (da + db), jnp.where(a > b, da, db))


def dense_axes(*layers: str) -> dict[str, Names]:
    """Return logical axes of a chain of dense layers, sharded in turn by their outputs and their inputs.

    A last layer that would be sharded by its outputs is replicated, because no layer follows it.

    >>> dense_axes("dense0", "head")["dense0/kernel$"], dense_axes("dense0", "head")["head/kernel$"]
    ((None, 'mlp'), ('mlp', None))
    """
    axes: dict[str, Names] = {}
    for number, layer in enumerate(layers):
        inputs = "mlp" if number % 2 else None
        outputs = None if number % 2 or number == len(layers) - 1 else "mlp"
        axes |= {f"{layer}/kernel$": (inputs, outputs), f"{layer}/bias$": (outputs,)}
    return axes


def check_rates(module: nn.Module) -> None:
    """Raise InputError unless the module's dropout rates and ``bn_momentum`` are in [0, 1)."""
    for name in ("dropout", "channel_dropout", "bn_momentum"):
        rate = getattr(module, name, 0.0)
        if not 0 <= rate < 1:
            raise InputError(f"{type(module).__name__}.{name} is {rate}: it must be in [0, 1)")


def check_image(image: jax.Array, smallest: int, model: str) -> None:
    """Raise InputError unless ``image`` is ``[batch, h, w, c]`` with sides of at least ``smallest`` pixels.

    Linen would apply a convolution to an unbatched image without an error.
    """
    shape = tuple(image.shape)
    if len(shape) == 4 and shape[1] in (1, 3, 4) and min(shape[2:]) > 4:
        raise InputError(
            f"image {shape} looks like [batch, channel, height, width] (NCHW): {model} takes "
            "[batch, height, width, channel]; transpose the source with .transpose(0, 2, 3, 1)"
        )
    if len(shape) != 4:
        fix = ""
        if len(shape) == 3 and shape[2] in (1, 3, 4) and shape[1] > 4:
            fix = "; this looks like one image without a batch axis: add it with image[None]"
        elif len(shape) == 3:
            fix = "; add a channel axis of 1 with image[..., None]"
        raise InputError(f"image has shape {shape}: {model} takes [batch, height, width, channel]{fix}")
    if min(shape[1:3]) < smallest:
        raise InputError(
            f"image {shape} is too small: with these settings {model} needs at least {smallest} pixels a side"
        )
