"""A decoder-only transformer language model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxtrain.core.chunked_logits import ChunkedLogits
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Names
from jaxtrain.models.attention import Attention
from jaxtrain.models.dropout import Dropout
from jaxtrain.models.layers import check_rates
from jaxtrain.models.remat import Remat, remat_block
from jaxtrain.models.transformer import BLOCK_AXES, Block, check_heads

STD = 0.02


class GPT(nn.Module):
    """Decoder-only transformer: pre-norm, causal attention, GELU, tied head, GPT-2's initialisation.

    Kernels and embeddings are initialised with a standard deviation of 0.02, those that write to the residual
    stream with 0.02 / sqrt(2 depth) (Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners").

    Attributes:
      vocab: number of different tokens; 256 for bytes.
      context: largest sequence length.
      width: size of the residual stream.
      depth: number of blocks, at least 1.
      heads: attention heads; must divide ``width``, and ``width / heads`` must be even for ``rotary``.
      mlp: hidden size of a block's MLP as a multiple of ``width``.
      dropout: dropout rate after the embedding and on every residual branch, in [0, 1); active only in
        training.
      positions: ``rotary`` (Su et al., arXiv:2104.09864) or ``learned``, a vector for each position.
      attention: which kernel computes attention: ``auto`` uses cuDNN's if the GPU supports it for this
        precision and head size, ``xla`` uses XLA's, ``cudnn`` raises InputError if cuDNN's cannot be used.
      head_chunk: number of positions of a sequence that head and loss process at a time, at least 1. Saves
        memory with a large ``vocab``, because the logits are never stored all at once; costs one more product
        with the head in the backward pass. None: all positions at once.

    Call with ``tokens: int or uint8 [batch, length]`` in [0, vocab), ``length <= context``; returns logits
    ``[batch, length, vocab]``. Those at position t predict token t + 1 from the tokens up to t. With
    ``head_chunk`` they are a ``jaxtrain.core.chunked_logits.ChunkedLogits``.

    Raises:
      InputError: a sequence is too long, tokens are not integers, or sizes do not fit together.

    >>> net = GPT(vocab=10, context=8, width=8, depth=1, heads=2)
    >>> logits, variables = jax.jit(net.init_with_output)(jax.random.key(0), jnp.ones((4, 5), jnp.uint8))
    >>> logits.shape
    (4, 5, 10)
    """

    vocab: int = 256
    context: int = 256
    width: int = 384
    depth: int = 6
    heads: int = 6
    mlp: int = 4
    dropout: float = 0.2
    positions: Literal["rotary", "learned"] = "rotary"
    attention: Attention = "auto"
    head_chunk: int | None = None

    logical_axes: ClassVar[dict[str, Names]] = {
        "embed/embedding$": ("vocab", "embed"),  # the head too, transposed
        "position_table$": (None, "embed"),
        **BLOCK_AXES,
    }

    @nn.compact
    def __call__(
        self, tokens: jax.Array, train: bool = False, remat: Remat = "none"
    ) -> jax.Array | ChunkedLogits:
        check_rates(self)
        self._check_sizes(tokens)
        init = nn.initializers.normal(STD)
        embed = nn.Embed(self.vocab, self.width, embedding_init=init, name="embed")
        x = embed(tokens)
        if self.positions == "learned":
            table = self.param("position_table", init, (self.context, self.width))
            x = x + table[None, : tokens.shape[1]].astype(x.dtype)
        x = Dropout(self.dropout, deterministic=not train)(x)
        layer = remat_block(Block, remat)
        for number in range(self.depth):
            block = layer(
                self.heads,
                self.mlp,
                self.dropout,
                causal=True,
                rotary=self.positions == "rotary",
                std=STD,
                residual_std=STD / math.sqrt(2 * self.depth),
                attention=self.attention,
                name=f"block{number}",
            )
            x = block(x, train)
        x = nn.LayerNorm(name="norm")(x)
        # The head is the embedding's transpose (Press and Wolf, arXiv:1608.05859): on bytes of source text
        # (0.8 M parameters, 400 steps of 1,024 tokens) validation loss 2.455 and 2.453 against 2.509 and
        # 2.477 with a separate head, n = 2 seeds.
        if self.head_chunk is not None:
            return ChunkedLogits.of(x, embed.embedding, self.head_chunk)
        return embed.attend(x)

    @nn.nowrap
    def check(self, batch: Mapping[str, Any], ids: np.ndarray) -> None:
        """Raise InputError if a raw token is outside the vocabulary, naming the example.

        XLA raises no error: an index out of range gives NaN, and a negative one counts from the end.

        Args:
          batch: with ``tokens: int [batch, length]``.
          ids: int ``[batch]``, the positions of the examples in the source, for the message.

        >>> GPT(vocab=65).check({"tokens": np.array([[3, 70]])}, np.array([12]))
        Traceback (most recent call last):
            ...
        jaxtrain.core.errors.InputError: token 70 of example 12 is outside the vocabulary of 65, 0..64 (1
        such): set model.vocab=71 or more, or fix the tokens
        """
        if "tokens" not in batch:
            return
        tokens = np.asarray(batch["tokens"])
        if not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"field 'tokens' is {tokens.dtype}: tokens must be integers")
        bad = (tokens < 0) | (tokens >= self.vocab)
        if bad.any():
            row, largest = int(np.argwhere(bad)[0][0]), int(tokens.max())
            advice = f"set model.vocab={largest + 1} or more, or fix" if largest >= self.vocab else "fix"
            raise InputError(
                f"token {tokens[bad][0]} of example {ids[row]} is outside the vocabulary of {self.vocab}, "
                f"0..{self.vocab - 1} ({int(bad.sum())} such): {advice} the tokens"
            )

    @nn.nowrap
    def update_flops(self, batch: Mapping[str, Any]) -> float | None:
        """Return the FLOPs of an update: ``6 N`` per token, plus attention.

        N is the number of parameters that multiply tokens: the kernels of the blocks,
        ``(4 + 2 mlp) width ** 2`` each, and the tied head, ``vocab width``. The embedding lookup is not a
        product, and biases and LayerNorm are left out. Attention multiplies queries with keys and scores with
        values: ``2 width`` FLOPs each per pair of positions, and twice that in the backward pass. There are
        ``length (length + 1) / 2`` causal pairs (as in PaLM, arXiv:2204.02311, appendix B, which counts all
        pairs):

          flops = tokens (6 N + 6 depth width (length + 1))

        These are model FLOPs, not those of the compiled program: XLA's attention also computes the masked
        pairs, and remat and ``head_chunk`` recompute some values.

        Args:
          batch: with ``tokens: [batch, length]``; only the shape is used. Without it the result is None.

        >>> GPT(vocab=64, width=32, depth=1, mlp=4).update_flops({"tokens": np.zeros((1, 1))}) / 6
        14400.0
        """
        tokens = batch.get("tokens")
        if tokens is None or len(tokens.shape) != 2:
            return None
        count, length = tokens.shape
        multiplied = self.depth * (4 + 2 * self.mlp) * self.width**2 + self.vocab * self.width
        attention = self.depth * self.width * (length + 1)
        return float(6 * count * length * (multiplied + attention))

    def _check_sizes(self, tokens: jax.Array) -> None:
        if min(self.vocab, self.context, self.depth, self.mlp) < 1:
            raise InputError(
                f"GPT(vocab={self.vocab}, context={self.context}, depth={self.depth}, mlp={self.mlp}): "
                "all must be at least 1"
            )
        if self.head_chunk is not None and self.head_chunk < 1:
            raise InputError(
                f"GPT.head_chunk is {self.head_chunk}: it must be at least 1, or None for no chunks"
            )
        check_heads("GPT", self.width, self.heads, rotary=self.positions == "rotary")
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise InputError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}: GPT takes integers [batch, length]"
            )
        length = tokens.shape[1]
        if length > self.context:
            raise InputError(
                f"tokens {tuple(tokens.shape)}: sequences of {length} are {length - self.context} longer "
                f"than GPT's context of {self.context}; cut them or set model.context={length}"
            )
