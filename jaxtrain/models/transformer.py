"""The pre-norm transformer block that ViT and GPT share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Names
from jaxtrain.models.attention import Attention, attend
from jaxtrain.models.dropout import Dropout

BLOCK_AXES: dict[str, Names] = {
    "qkv/kernel$": ("embed", None, "heads", None),
    "qkv/bias$": (None, "heads", None),
    "project/kernel$": ("heads", None, "embed"),
    "project/bias$": ("embed",),
    "expand/kernel$": ("embed", "mlp"),
    "expand/bias$": ("mlp",),
    "contract/kernel$": ("mlp", "embed"),
    "contract/bias$": ("embed",),
    r"norm\d*/": ("embed",),
}
"""Logical axes of a block's parameters: attention is sharded by heads, the MLP by its hidden layer."""


class Block(nn.Module):
    """Pre-norm transformer block, as in GPT-2: self-attention and a GELU MLP, each in a residual branch.

    Input and output are ``float [batch, length, width]``, of any length.

    Attributes:
      heads: attention heads; must divide the width.
      mlp: hidden size of the MLP as a multiple of the width.
      dropout: dropout rate on both residual branches, in [0, 1); active only in training.
      causal: a position attends to itself and earlier ones, instead of all.
      rotary: use rotary position embeddings (``rotate``).
      std: initial standard deviation of the kernels that read the residual stream; 0 is Xavier uniform.
      residual_std: initial standard deviation of the kernels that write to it; 0 is Xavier uniform.
      attention: which kernel computes attention (``models.attention``).

    >>> x = jnp.ones((2, 5, 8))
    >>> out, variables = jax.jit(Block(heads=2, causal=True).init_with_output)(jax.random.key(0), x)
    >>> out.shape
    (2, 5, 8)
    """

    heads: int
    mlp: int = 4
    dropout: float = 0.0
    causal: bool = False
    rotary: bool = False
    std: float = 0.0
    residual_std: float = 0.0
    attention: Attention = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        width = x.shape[-1]
        drop = Dropout(self.dropout, deterministic=not train)
        read, write = _kernels(self.std), _kernels(self.residual_std)

        h = nn.LayerNorm(name="norm0")(x)
        # The heads are a dimension of the kernels, so that they can be sharded. Flax passes the initialisers
        # the 2-D shape of the equivalent matrix product.
        features = (3, self.heads, width // self.heads)
        h = nn.DenseGeneral(features, kernel_init=_three_kernels(read), name="qkv")(h)
        h = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=write, name="project")(self._attend(h))
        x = x + drop(h)

        h = nn.LayerNorm(name="norm1")(x)
        h = nn.gelu(nn.Dense(self.mlp * width, kernel_init=read, name="expand")(h))
        h = nn.Dense(width, kernel_init=write, name="contract")(h)
        return x + drop(h)

    def _attend(self, qkv: jax.Array) -> jax.Array:
        """Apply attention: ``[batch, length, 3, heads, size]`` → ``[batch, length, heads, size]``."""
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.rotary:
            q, k = rotate(q), rotate(k)
        # Initialisation runs in float32, which cuDNN does not support; its outputs are discarded anyway.
        return attend(q, k, v, self.causal, "xla" if self.is_initializing() else self.attention)


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Apply rotary position embeddings to ``float [batch, length, heads, size]``; ``size`` must be even.

    Coordinates i and ``i + size / 2`` are rotated together by ``position * base ** (-2 i / size)``, so the
    product of a query and a key depends only on their distance (Su et al., arXiv:2104.09864).

    >>> q = jnp.ones((1, 4, 1, 2))
    >>> scores = jnp.einsum("bqhd,bkhd->qk", rotate(q), rotate(q))
    >>> bool(jnp.allclose(scores[1, 0], scores[3, 2]))
    True
    """
    length, half = x.shape[1], x.shape[-1] // 2
    # In float32, cast at the end: a bfloat16 angle at position 300 would be wrong by a radian, and the
    # fused multiplication costs nothing.
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
    angle = (jnp.arange(length, dtype=dtype)[:, None] * frequency[None])[None, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    rotated = jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)
    return rotated.astype(x.dtype)


def check_heads(model: str, width: int, heads: int, rotary: bool = False) -> None:
    """Raise InputError unless ``heads`` divides ``width``, into even parts if ``rotary``."""
    if min(width, heads) < 1 or width % heads:
        raise InputError(
            f"{model}(width={width}, heads={heads}): heads must divide width; set model.width to a "
            "multiple of model.heads"
        )
    if rotary and width // heads % 2:
        raise InputError(
            f"{model}(width={width}, heads={heads}): rotary positions need an even head size, and it is "
            f"{width // heads}; set model.heads so that width / heads is even"
        )


def _kernels(std: float) -> nn.initializers.Initializer:
    return nn.initializers.normal(std) if std else nn.initializers.xavier_uniform()


def _three_kernels(init: nn.initializers.Initializer) -> nn.initializers.Initializer:
    """Initialise query, key and value kernels one by one: combined, Xavier would see 3 times the outputs."""

    def fused(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        single = (shape[0], shape[1] // 3)
        return jnp.concatenate([init(k, single, dtype) for k in jax.random.split(key, 3)], axis=1)

    return fused
