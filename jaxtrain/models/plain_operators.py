"""Trace models with JAX's own operators in place of those that are faster in training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

# Part of the key of JAX's caches: what was traced outside a block is traced anew in one.
_plain = jax.make_user_context(False)


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Trace models for another runtime: one operator for each convolution, max-pool and attention.

    In the block ``max_pool`` is ``flax.linen.max_pool``, ``cpu_conv.convolve`` is
    ``lax.conv_general_dilated``, and attention is XLA's. The values are the same; for training the default
    is faster. It has an effect while a function is traced, not while a compiled one runs.

    >>> import jax, jax.numpy as jnp
    >>> from jaxtrain.models import max_pool
    >>> with plain_operators():
    ...     jaxpr = jax.make_jaxpr(max_pool)(jnp.ones((1, 4, 4, 1)))
    >>> [eqn.primitive.name for eqn in jaxpr.eqns]
    ['reduce_window_max']
    """
    with _plain(True):
        yield


def are_plain() -> bool:
    """Whether this is in a ``plain_operators`` block."""
    return bool(_plain.value)
