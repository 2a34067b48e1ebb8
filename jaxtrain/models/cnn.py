"""A plain convolutional network for small images."""

from __future__ import annotations

import jax
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Names
from jaxtrain.models.batch_norm import BatchNorm
from jaxtrain.models.cpu_conv import conv
from jaxtrain.models.dropout import Dropout
from jaxtrain.models.layers import (
    ACTIVATIONS,
    Activation,
    check_image,
    check_rates,
    conv_axes,
)
from jaxtrain.models.pooling import max_pool


class CNN(nn.Module):
    """Stages of conv 3×3 → max-pool 2 → BatchNorm → activation, then global average pooling and a dense head.

    Further convolutions of a stage work at the pooled size. Convolutions before a BatchNorm have no bias,
    which BatchNorm would cancel. BatchNorm statistics are over ``bn_groups`` slices of the
    global batch.

    Attributes:
      widths: output channels of each stage; image sides must be at least ``2 ** len(widths)``.
      convs: convolutions in a stage, at least 1.
      classes: number of classes, the size of the output.
      residual: add a stage's first activation to its last; no effect if ``convs`` is 1.
      batch_norm: use BatchNorm after every convolution; without it convolutions have biases.
      bn_momentum: decay rate of BatchNorm's running statistics, in [0, 1).
      bn_groups: slices of the batch that have BatchNorm statistics of their own, at least 1
        (``models.BatchNorm``); 1 is the global batch.
      dropout: dropout rate before the head, in [0, 1); active only in training.
      activation: ``relu``, ``gelu``, ``silu`` or ``tanh``.

    Call with ``image: float [batch, height, width, channel]``; returns logits ``[batch, classes]``.

    >>> import jax.numpy as jnp
    >>> net = CNN(widths=(8, 16), classes=5)
    >>> variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    >>> jax.jit(net.apply)(variables, jnp.zeros((4, 8, 8, 3))).shape
    (4, 5)
    """

    widths: tuple[int, ...] = (32, 96, 192)
    convs: int = 2
    classes: int = 10
    residual: bool = True
    batch_norm: bool = True
    bn_momentum: float = 0.9
    bn_groups: int = 1
    dropout: float = 0.0
    activation: Activation = "relu"

    @property
    def logical_axes(self) -> dict[str, Names]:
        """Axis names of the parameters, for ``sharding.place``."""
        return conv_axes(self.convs)

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        check_rates(self)
        if self.convs < 1 or not self.widths or min(self.widths) < 1:
            raise InputError(f"CNN(widths={self.widths}, convs={self.convs}): all must be at least 1")
        check_image(image, 2 ** len(self.widths), "CNN")
        x = image
        for stage, width in enumerate(self.widths):
            x = first = self._conv(x, width, train, f"stage{stage}_conv0", pool=True)
            for number in range(1, self.convs):
                x = self._conv(x, width, train, f"stage{stage}_conv{number}")
            if self.residual and self.convs > 1:
                x = x + first
        x = Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.classes, name="head")(x)

    def _conv(self, x: jax.Array, width: int, train: bool, name: str, pool: bool = False) -> jax.Array:
        x = conv(width, 3, use_bias=not self.batch_norm, name=name)(x)
        if pool:
            x = max_pool(x)
        if self.batch_norm:
            norm = BatchNorm(
                use_running_average=not train,
                momentum=self.bn_momentum,
                groups=self.bn_groups,
                name=f"{name}_norm",
            )
            x = norm(x)
        return ACTIVATIONS[self.activation](x)
