"""Attention by the fastest way there is: cuDNN's fused kernel on NVIDIA GPUs that have it, else XLA's."""

from __future__ import annotations

import functools
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line

Attention = Literal["auto", "xla", "cudnn"]
"""``auto`` takes cuDNN's kernel where there is one for the shapes, ``xla`` never does, ``cudnn`` insists."""

OLDEST = (8, 0)
"""The compute capability from which cuDNN has the kernel (Ampere); JAX does not ask, and XLA then fails."""


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, attention: Attention = "auto"
) -> jax.Array:
    """Softmax attention: three times ``float [batch, length, heads, size]``, and of that shape.

    Scores are scaled by ``size ** -0.5``, and the softmax is in float32 in either way. XLA's keeps the
    scores ``[batch, heads, length, length]`` for the backward pass; cuDNN's computes them again and, where it
    is causal, only the half that counts (Dao et al., arXiv:2205.14135).

    The choice is made while tracing, for the devices that JAX runs on: a CPU's program shows nothing of it.

    Args:
      q: queries.
      k: keys.
      v: values.
      causal: position t sees those up to t, instead of all.
      attention: whose kernel.

    Raises:
      InputError: ``attention`` is unknown, or ``cudnn`` where cuDNN refuses, with its reason.

    >>> q = jnp.ones((1, 4, 2, 8))
    >>> attend(q, q, q, causal=True).shape
    (1, 4, 2, 8)
    """
    names = typing.get_args(Attention)
    if attention not in names:
        raise InputError(f"attention is {attention!r}: it must be one of {', '.join(names)}")
    implementation: Literal["xla", "cudnn"] = "xla"
    if attention != "xla":
        reason = refusal(q.shape, q.dtype, causal)
        if reason is None:
            implementation = "cudnn"
        elif attention == "cudnn":
            raise InputError(f"attention=cudnn and cuDNN refuses: {reason}; set model.attention=auto")
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=implementation)


def refusal(shape: tuple[int, ...], dtype: Any, causal: bool) -> str | None:
    """Why cuDNN's kernel does not take ``q``, ``k`` and ``v`` of that shape and type; None where it does.

    >>> refusal((1, 4, 2, 8), jnp.float32, True)
    'it takes float16 and bfloat16, and this is float32'
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 and bfloat16, and this is {dtype}"
    found = capability()
    if found is None:
        return "JAX runs on no NVIDIA GPU here"
    if found < OLDEST:
        return f"it needs compute capability 8.0 or more, and a GPU here has {found[0]}.{found[1]}"
    return _jax_refuses(tuple(shape), dtype, causal, found)


@functools.lru_cache(maxsize=64)  # every block of a model asks
def _jax_refuses(shape: tuple[int, ...], dtype: Any, causal: bool, _: tuple[int, int]) -> str | None:
    """What JAX itself checks (cuDNN is there, the size of a head, versions), forward and backward."""

    def total(q: jax.Array) -> jax.Array:
        out = jax.nn.dot_product_attention(q, q, q, is_causal=causal, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    try:
        jax.eval_shape(jax.grad(total), jax.ShapeDtypeStruct(shape, dtype))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return first_line(error).rstrip(".")
    return None


def capability() -> tuple[int, int] | None:
    """The lowest compute capability of the GPUs that JAX runs programs on; None without NVIDIA GPUs."""
    chosen = getattr(jax.config, "jax_default_device", None)
    if getattr(chosen, "platform", chosen) not in (None, "gpu", "cuda") or jax.default_backend() != "gpu":
        return None
    try:
        each = [
            tuple(int(part) for part in device.compute_capability.split("."))
            for device in jax.local_devices(backend="cuda")
        ]
    except (RuntimeError, ValueError, AttributeError):  # an AMD GPU, say
        return None
    major, minor = min(each)
    return major, minor
