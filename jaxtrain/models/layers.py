"""Layers and checks that several models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Names

Activation = Literal["relu", "gelu", "silu", "tanh"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}


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


def conv_axes(convs: int) -> dict[str, Names]:
    """Return logical axes of a network with blocks of ``convs`` convolutions ``conv0``, ``conv1`` and so on.

    Convolutions are sharded in pairs, the first by its output channels and the second by its input channels,
    so that a pair communicates once in each direction: the sum of the second one's outputs, the sum of the
    first one's input gradients. What is between them stays where it is computed, a BatchNorm too. All other
    convolutions are replicated: the gathers of their activations would move more than a pair does
    (docs/decisions/convolutions-in-pairs.md).

    Args:
      convs: length of the chain, at least 1; a last one without a partner is replicated. Names may have a
        prefix (``stage0_conv0``); the norm of ``conv0`` is ``norm0`` or ``conv0_norm``.

    >>> axes = conv_axes(3)
    >>> [axes.get(f"conv{i}/kernel$") for i in range(3)]
    [(None, None, None, 'channels'), (None, None, 'channels', None), None]
    """
    axes: dict[str, Names] = {}
    for first in range(0, convs - 1, 2):
        axes |= {
            f"conv{first}/kernel$": (None, None, None, "channels"),
            f"conv{first}/bias$": ("channels",),
            f"(norm{first}|conv{first}_norm)/": ("channels",),
            f"conv{first + 1}/kernel$": (None, None, "channels", None),
        }
    replicated: dict[str, Names] = {
        r"norm\d*/": (None,),
        r"conv\d*/kernel$": (None,) * 4,
        r"conv\d*/bias$": (None,),
        "head/kernel$": (None, "classes"),
        "head/bias$": ("classes",),
    }
    return axes | replicated


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
