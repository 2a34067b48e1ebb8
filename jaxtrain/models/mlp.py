"""A multi-layer perceptron."""

from __future__ import annotations

import jax
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Names
from jaxtrain.models.dropout import Dropout
from jaxtrain.models.layers import ACTIVATIONS, Activation, check_rates, dense_axes


class MLP(nn.Module):
    """Dense layers with activations in between; the input is flattened to ``[batch, features]``.

    Attributes:
      widths: sizes of the hidden layers; ``()`` is a linear model.
      classes: number of classes, the size of the output.
      dropout: dropout rate after every hidden layer, in [0, 1); active only in training.
      activation: ``relu``, ``gelu``, ``silu`` or ``tanh``.

    Call with any float ``[batch, ...]``; returns ``[batch, classes]``.

    >>> import jax.numpy as jnp
    >>> variables = MLP(widths=(8,), classes=3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    >>> variables["params"]["head"]["kernel"].shape
    (8, 3)
    """

    widths: tuple[int, ...] = (128,)
    classes: int = 10
    dropout: float = 0.0
    activation: Activation = "relu"

    @property
    def logical_axes(self) -> dict[str, Names]:
        """Axis names of the parameters, for ``sharding.place``."""
        return dense_axes(*(f"dense{layer}" for layer in range(len(self.widths))), "head")

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        check_rates(self)
        if min(self.widths, default=1) < 1:
            raise InputError(f"MLP(widths={self.widths}): all must be at least 1")
        x = image.reshape(image.shape[0], -1)
        for layer, width in enumerate(self.widths):
            x = ACTIVATIONS[self.activation](nn.Dense(width, name=f"dense{layer}")(x))
            x = Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, name="head")(x)
