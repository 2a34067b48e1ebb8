"""Softmax attention, with cuDNN's fused kernel on NVIDIA GPUs that support it, else with XLA's."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.models.attention_choices import add_choice
from jaxtrain.models.plain_operators import are_plain
from jaxtrain.models.target_gpu import target_capability

Attention = Literal["auto", "xla", "cudnn"]
"""``auto`` uses cuDNN's kernel if it supports the shapes, ``xla`` never does, ``cudnn`` always does."""

MIN_CAPABILITY = (8, 0)
"""The lowest compute capability with cuDNN's kernel (Ampere). JAX does not check it, and XLA would fail."""

_weights: contextvars.ContextVar[list[jax.Array] | None] = contextvars.ContextVar(
    "attention_weights", default=None
)


@contextlib.contextmanager
def collect_attention_weights() -> Iterator[list[jax.Array]]:
    """Collect the weights of every attention that this thread traces in the block, in the order of the calls.

    Each is the softmax, ``float32 [batch, heads, length, length]``, by query and key. Kernels do not return
    it, so attention is computed in plain operations here. Open and read it inside the function that is
    traced: the weights are its tracers.

    >>> q = jnp.ones((1, 2, 1, 8))
    >>> with collect_attention_weights() as weights:
    ...     _ = attend(q, q, q, causal=True)
    >>> weights[0].tolist()
    [[[[1.0, 0.0], [0.5, 0.5]]]]
    """
    weights: list[jax.Array] = []
    token = _weights.set(weights)
    try:
        yield weights
    finally:
        _weights.reset(token)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, attention: Attention = "auto"
) -> jax.Array:
    """Compute softmax attention: float ``[batch, length, heads, size]``, like each input.

    Scores are scaled by ``size ** -0.5`` and the softmax is in float32 with both kernels. XLA's stores the
    scores ``[batch, heads, length, length]`` for the backward pass; cuDNN's recomputes them and, if causal,
    computes only half of them (Dao et al., arXiv:2205.14135).

    The kernel is selected while tracing, for the devices that JAX runs on or those of
    ``target_gpu.trace_for``; the program contains one of them.

    Args:
      q: queries.
      k: keys.
      v: values.
      causal: position t attends to positions up to t, instead of all.
      attention: which kernel: ``auto``, ``xla`` or ``cudnn``.

    Raises:
      InputError: ``attention`` is unknown, or it is ``cudnn`` and cuDNN's kernel cannot be used (with the
        reason).

    >>> q = jnp.ones((1, 4, 2, 8))
    >>> attend(q, q, q, causal=True).shape
    (1, 4, 2, 8)
    """
    names = typing.get_args(Attention)
    if attention not in names:
        raise InputError(f"attention is {attention!r}: it must be one of {', '.join(names)}")
    if (collected := _weights.get()) is not None:
        collected.append(weights := _softmax(q, k, causal))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v.astype(weights.dtype)).astype(v.dtype)
    implementation: Literal["xla", "cudnn"] = "xla"
    if attention != "xla" and not are_plain():
        reason = cudnn_refusal(q.shape, q.dtype, causal)
        if reason is None:
            implementation = "cudnn"
        elif attention == "cudnn":
            raise InputError(f"attention=cudnn and cuDNN refuses: {reason}; set model.attention=auto")
        add_choice(q.shape, q.dtype, implementation, reason or "")

    def kernel(*qkv: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(*qkv, is_causal=causal, implementation=implementation)

    if q.dtype != jnp.float16 or implementation == "cudnn":
        return kernel(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cpu=functools.partial(_in_float32, kernel), default=kernel)


def _softmax(q: jax.Array, k: jax.Array, causal: bool) -> jax.Array:
    """Return the attention weights ``[batch, heads, length, length]``, in float32 or wider."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q.astype(wide), k.astype(wide)) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None], scores, -jnp.inf)
    return jax.nn.softmax(scores)


def _in_float32(kernel: Callable[..., jax.Array], *qkv: jax.Array) -> jax.Array:
    """Call ``kernel`` in float32: XLA on CPUs cannot multiply float16 with sums in float32."""
    return kernel(*(array.astype(jnp.float32) for array in qkv)).astype(qkv[0].dtype)


def cudnn_refusal(shape: tuple[int, ...], dtype: Any, causal: bool) -> str | None:
    """Return why cuDNN's kernel does not support ``q`` of this shape and dtype; None if it does.

    >>> cudnn_refusal((1, 4, 2, 8), jnp.float32, True)
    'it takes float16 and bfloat16, and this is float32'
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 and bfloat16, and this is {dtype}"
    lowest = lowest_capability()
    if lowest is None:
        return "JAX runs on no NVIDIA GPU here"
    if lowest < MIN_CAPABILITY:
        return f"it needs compute capability 8.0 or more, and a GPU here has {lowest[0]}.{lowest[1]}"
    return _jax_refusal(tuple(shape), dtype, causal, (lowest, target_capability()))


@functools.lru_cache(maxsize=64)  # called by every block of a model
def _jax_refusal(shape: tuple[int, ...], dtype: Any, causal: bool, _: Any) -> str | None:
    """Return what JAX's own checks say (cuDNN installed, head size, versions), forward and backward."""

    def total(q: jax.Array) -> jax.Array:
        out = jax.nn.dot_product_attention(q, q, q, is_causal=causal, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    try:
        jax.eval_shape(jax.grad(total), jax.ShapeDtypeStruct(shape, dtype))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return first_line(error).rstrip(".")
    return None


def lowest_capability() -> tuple[int, int] | None:
    """Return the lowest compute capability of the GPUs that are traced for; None without NVIDIA GPUs."""
    target = target_capability()
    if target is not None:
        return target
    chosen = getattr(jax.config, "jax_default_device", None)
    if getattr(chosen, "platform", chosen) not in (None, "gpu", "cuda") or jax.default_backend() != "gpu":
        return None
    try:
        capabilities = [
            tuple(int(part) for part in device.compute_capability.split("."))
            for device in jax.local_devices(backend="cuda")
        ]
    except (RuntimeError, ValueError, AttributeError):  # for example an AMD GPU
        return None
    major, minor = min(capabilities)
    return major, minor
