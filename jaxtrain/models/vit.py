"""A vision transformer."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Names
from jaxtrain.models.attention import Attention
from jaxtrain.models.dropout import Dropout
from jaxtrain.models.layers import check_image, check_rates
from jaxtrain.models.remat import Remat, remat_block
from jaxtrain.models.transformer import BLOCK_AXES, Block, check_heads


class ViT(nn.Module):
    """Vision transformer with global average pooling and no class token; the defaults are ViT-S/16.

    Patches, position embedding, pre-norm blocks, LayerNorm, mean over patches, and a head initialised to zero
    (Dosovitskiy et al., arXiv:2010.11929, simplified as in Beyer et al., arXiv:2205.01580).

    Attributes:
      patch: side of a patch in pixels; image height and width must be multiples of it.
      width: size of the residual stream; for ``sincos`` a multiple of 4.
      depth: number of blocks, at least 1.
      heads: attention heads; must divide ``width``.
      mlp: hidden size of a block's MLP as a multiple of ``width``.
      classes: number of classes, the size of the output.
      dropout: dropout rate after the positions and on every residual branch, in [0, 1); active only in
        training.
      positions: ``sincos``, fixed, for any image size; or ``learned``, for one image size.
      attention: which kernel computes attention, as in ``GPT``.

    Call with ``image: float [batch, height, width, channel]``; returns logits ``[batch, classes]``.

    Raises:
      InputError: the image has another layout or does not divide into patches, or sizes do not fit together.

    >>> net = ViT(patch=4, width=8, depth=1, heads=2, classes=5)
    >>> logits, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), jnp.ones((4, 8, 12, 3)))
    >>> logits.shape
    (4, 5)
    """

    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp: int = 4
    classes: int = 1000
    dropout: float = 0.0
    positions: Literal["sincos", "learned"] = "sincos"
    attention: Attention = "auto"

    logical_axes: ClassVar[dict[str, Names]] = {
        "patches/kernel$": (None, None, None, "embed"),
        "patches/bias$": ("embed",),
        "position_table$": (None, "embed"),
        "head/kernel$": ("embed", "classes"),
        "head/bias$": ("classes",),
        **BLOCK_AXES,
    }

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False, remat: Remat = "none") -> jax.Array:
        check_rates(self)
        self._check(image)
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, side, padding="VALID", name="patches")(image)
        batch, rows, columns, _ = x.shape
        x = x.reshape(batch, rows * columns, self.width)
        if self.positions == "learned":
            init = nn.initializers.normal(0.02)
            table = self.param("position_table", init, (rows * columns, self.width))
        else:
            table = sincos(rows, columns, self.width)
        x = Dropout(self.dropout, deterministic=not train)(x + table[None].astype(x.dtype))
        layer = remat_block(Block, remat)
        for number in range(self.depth):
            block = layer(self.heads, self.mlp, self.dropout, attention=self.attention, name=f"block{number}")
            x = block(x, train)
        x = nn.LayerNorm(name="norm")(x).mean(1)
        return nn.Dense(self.classes, kernel_init=nn.initializers.zeros, name="head")(x)

    def _check(self, image: jax.Array) -> None:
        if min(self.patch, self.depth, self.mlp) < 1:
            raise InputError(
                f"ViT(patch={self.patch}, depth={self.depth}, mlp={self.mlp}): all must be at least 1"
            )
        check_heads("ViT", self.width, self.heads)
        if self.positions == "sincos" and self.width % 4:
            raise InputError(
                f"ViT(width={self.width}): sincos positions need a width that is a multiple of 4; set "
                "model.width, or model.positions=learned"
            )
        check_image(image, 1, "ViT")
        if image.shape[1] % self.patch or image.shape[2] % self.patch:
            raise InputError(
                f"image {tuple(image.shape)}: height and width must be multiples of ViT's patch of "
                f"{self.patch} pixels; resize the images or set model.patch"
            )


def sincos(rows: int, columns: int, width: int) -> jax.Array:
    """Return fixed 2-D position embeddings ``float32 [rows * columns, width]``, row by row.

    ``width`` must be a multiple of 4: a quarter each for sine and cosine of the column, then of the row, at
    frequencies that decrease geometrically from 1 to 1/10000 (arXiv:2205.01580).

    >>> sincos(2, 3, 4).tolist()[0]
    [0.0, 1.0, 0.0, 1.0]
    """
    frequency = 10_000.0 ** -jnp.linspace(0, 1, width // 4)
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    angles = [axis[:, None] * frequency[None] for axis in (column, row)]
    return jnp.concatenate([wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=1)
