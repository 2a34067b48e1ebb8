"""Dropout that draws 16 random bits per element."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.core.errors import InputError

LEVELS = 2**16


class Dropout(nn.Module):
    """Set random elements to 0 and scale the others, so that the expectation is the input's.

    Replaces ``flax.linen.Dropout``. An element is kept if its 16 random bits are below ``kept_levels(rate)``,
    and scaled by the inverse of exactly that probability, in float32 or wider. Training on a GPU stores a
    byte per element, where ``flax.linen.Dropout`` may store 32 random bits (docs/decisions/dropout-bits.md).
    The mask depends on the key and the shape only, and is the same on any mesh.

    Attributes:
      rate: probability of 0, in [0, 1), rounded to a multiple of 1/65,536. One that is above 0 is at
        least 1/65,536, and at most 65,535/65,536.
      broadcast_dims: dimensions along which all elements are dropped together.
      deterministic: return the input, as in evaluation.

    Call with any float array; returns one of the same shape and dtype. Draws from the random stream
    ``dropout``.

    Raises:
      InputError: the rate is outside [0, 1).

    >>> dropped = Dropout(0.5).apply({}, jnp.ones(1000), rngs={"dropout": jax.random.key(0)})
    >>> sorted(set(dropped.tolist()))
    [0.0, 2.0]
    """

    rate: float
    broadcast_dims: tuple[int, ...] = ()
    deterministic: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        levels = kept_levels(self.rate)
        if self.deterministic or levels == LEVELS:
            return x
        dims = {dim % x.ndim for dim in self.broadcast_dims}
        shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
        keep = jax.random.bits(self.make_rng("dropout"), shape, jnp.uint16) < jnp.uint16(levels)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scaled = (wide * (LEVELS / levels)).astype(x.dtype)
        return jnp.where(keep, scaled, jnp.zeros((), x.dtype))


def kept_levels(rate: float) -> int:
    """Return how many of the 65,536 values of 16 bits keep an element; 65,536 for a rate of 0 only.

    Raises:
      InputError: ``rate`` is outside [0, 1), or NaN.

    >>> kept_levels(0.5), kept_levels(0), kept_levels(1e-9), kept_levels(0.999999)
    (32768, 65536, 65535, 1)
    """
    if not 0 <= rate < 1:
        raise InputError(f"Dropout(rate={rate}): the rate must be in [0, 1)")
    return LEVELS if rate == 0 else min(max(round((1 - rate) * LEVELS), 1), LEVELS - 1)
