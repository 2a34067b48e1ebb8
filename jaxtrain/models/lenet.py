"""The classic convolutional network: convolutions, flatten, dense layers."""

from __future__ import annotations

from typing import Literal

import jax
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Names
from jaxtrain.models.cpu_conv import conv
from jaxtrain.models.dropout import Dropout
from jaxtrain.models.layers import (
    ACTIVATIONS,
    Activation,
    check_image,
    check_rates,
    conv_axes,
    dense_axes,
)
from jaxtrain.models.pooling import max_pool


class ConvNet(nn.Module):
    """Convolutions, each followed by an activation, then dense layers (LeCun et al. 1998).

    The example below is LeNet-5 in its modern form.

    Attributes:
      widths: output channels of each convolution.
      kernel: kernel size of every convolution, in pixels.
      padding: ``"SAME"`` keeps the size, ``"VALID"`` removes ``kernel - 1`` pixels per side length.
      pool: window of the max-pooling after each convolution, in pixels; 1 is no pooling.
      hidden: sizes of the dense layers before the head.
      classes: number of classes, the size of the output.
      channel_dropout: rate in [0, 1) at which entire channels of the last convolution are dropped in
        training (Tompson et al. 2015, arXiv:1411.4280).
      dropout: dropout rate in [0, 1) after every hidden dense layer; active only in training.
      activation: ``relu``, ``gelu``, ``silu`` or ``tanh``.

    Call with ``image: float [batch, height, width, channel]``; returns logits ``[batch, classes]``.

    >>> import jax.numpy as jnp
    >>> lenet = ConvNet(widths=(6, 16), kernel=5, padding="VALID", hidden=(120, 84))
    >>> params = jax.eval_shape(lenet.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    >>> sum(p.size for p in jax.tree.leaves(params))
    62006
    """

    widths: tuple[int, ...] = (32, 64)
    kernel: int = 3
    padding: Literal["SAME", "VALID"] = "SAME"
    pool: int = 2
    hidden: tuple[int, ...] = ()
    classes: int = 10
    channel_dropout: float = 0.0
    dropout: float = 0.0
    activation: Activation = "relu"

    @property
    def logical_axes(self) -> dict[str, Names]:
        """Axis names of the parameters, for ``sharding.place``."""
        dense = dense_axes(*(f"dense{layer}" for layer in range(len(self.hidden))), "head")
        return conv_axes(len(self.widths)) | dense

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        check_rates(self)
        if not self.widths or min(*self.widths, *self.hidden, self.kernel, self.pool, self.classes) < 1:
            raise InputError(f"{self._name()}: widths, hidden, kernel, pool and classes must be at least 1")
        check_image(image, self._smallest(), "ConvNet")
        act, x = ACTIVATIONS[self.activation], image
        for layer, width in enumerate(self.widths):
            x = conv(width, self.kernel, padding=self.padding, name=f"conv{layer}")(x)
            # Pool first: less work, and for a monotonic activation (relu, tanh) the same values.
            x = act(max_pool(x, self.pool) if self.pool > 1 else x)
        x = Dropout(self.channel_dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = x.reshape(x.shape[0], -1)
        for layer, width in enumerate(self.hidden):
            x = act(nn.Dense(width, name=f"dense{layer}")(x))
            x = Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, name="head")(x)

    def _smallest(self) -> int:
        """Return the smallest image side that leaves one pixel after the last pooling."""
        side = 1
        for _ in self.widths:
            side = side * self.pool + (self.kernel - 1 if self.padding == "VALID" else 0)
        return side

    def _name(self) -> str:
        return f"ConvNet(widths={self.widths}, hidden={self.hidden}, kernel={self.kernel}, pool={self.pool})"
