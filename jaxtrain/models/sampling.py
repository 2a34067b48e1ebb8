"""Sample text from a language model, token by token."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.chunked_logits import full_logits
from jaxtrain.core.errors import InputError
from jaxtrain.models.adapter import as_model


def generate(
    model: Any,
    params: Any,
    extra: dict[str, Any],
    prompt: Any,
    length: int,
    key: jax.Array,
    *,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Continue ``prompt: int [batch, n]`` by ``length`` tokens; return ``int32 [batch, n + length]``.

    Each new token is drawn from the logits of the last ``context`` tokens. All of it is one compiled program,
    which is cached for calls with the same model and sizes. The same key returns the same text.

    Args:
      model: a Linen module or an ``(init, apply)`` pair that takes ``tokens`` and returns **causal** logits
        ``[batch, length, vocab]``: those at t do not depend on tokens after t.
      params: the model's parameters.
      extra: its statistics; ``{}`` if it has none.
      prompt: tokens in [0, vocab), at least one per row.
      length: number of new tokens, at least 1.
      key: a ``jax.random.key``.
      context: the number of preceding tokens that the model sees, at least 1; at most the model's context.
      temperature: divides the logits, at least 0; 0 selects the most likely token.
      top_k: sample from the ``top_k`` most likely tokens, in [1, vocab]; None: from all.

    Raises:
      InputError: an argument is out of range.

    >>> from jaxtrain.models.gpt import GPT
    >>> net = GPT(vocab=10, context=8, width=8, depth=1, heads=2)
    >>> init = jax.jit(as_model(net).init)
    >>> params, extra = init(jax.random.key(0), {"tokens": np.zeros((1, 8), np.uint8)})
    >>> generate(net, params, extra, np.array([[1, 2]]), 20, jax.random.key(1), context=8).shape
    (1, 22)
    """
    prompt = prompt if isinstance(prompt, jax.Array) else np.asarray(prompt)
    _check(model, prompt, length, context, temperature, top_k)
    return _generate(
        model,
        params,
        extra,
        jnp.asarray(prompt, jnp.int32),
        key,
        temperature,
        length=length,
        context=context,
        greedy=temperature == 0,
        top_k=top_k,
    )


@functools.partial(jax.jit, static_argnames=("model", "length", "context", "greedy", "top_k"))
def _generate(
    model: Any,
    params: Any,
    extra: dict[str, Any],
    prompt: jax.Array,
    key: jax.Array,
    temperature: float,
    *,
    length: int,
    context: int,
    greedy: bool,
    top_k: int | None,
) -> jax.Array:
    apply = as_model(model).apply
    n = prompt.shape[1]
    size = min(context, n + length - 1)  # the last token is never an input

    def step(i: jax.Array, text: jax.Array) -> jax.Array:
        end = n + i
        start = jnp.maximum(end - size, 0)
        # A window that is not full yet ends in zeros. They come after the position whose logits are used, so
        # a causal model does not see them.
        window = jax.lax.dynamic_slice_in_dim(text, start, size, axis=1)
        logits, _ = apply(params, extra, {"tokens": window}, train=False, key=None)
        logits = full_logits(logits)
        if logits.ndim != 3 or logits.shape[:2] != window.shape:
            raise InputError(
                f"the model returns {logits.shape} for tokens {window.shape}: it must return a row per token"
            )
        last = jax.lax.dynamic_index_in_dim(logits, end - start - 1, axis=1, keepdims=False)
        new = _sample(last.astype(jnp.float32), jax.random.fold_in(key, i), temperature, greedy, top_k)
        return jax.lax.dynamic_update_slice_in_dim(text, new[:, None], end, axis=1)

    text = jnp.pad(prompt, ((0, 0), (0, length)))
    return jax.lax.fori_loop(0, length, step, text)


def _sample(
    logits: jax.Array, key: jax.Array, temperature: float, greedy: bool, top_k: int | None
) -> jax.Array:
    """Sample one token per row: float ``[batch, vocab]`` → ``int32 [batch]``."""
    vocab = logits.shape[-1]
    if top_k is not None and top_k > vocab:
        raise InputError(f"top_k={top_k} with a vocabulary of {vocab}: it must be in 1..{vocab}")
    if greedy:
        return logits.argmax(-1).astype(jnp.int32)
    if top_k is None:
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)
    best, tokens = jax.lax.top_k(logits, top_k)
    drawn = jax.random.categorical(key, best / temperature)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)


def _check(model: Any, prompt: Any, length: int, context: int, temperature: float, top_k: int | None) -> None:
    shape, dtype = prompt.shape, prompt.dtype
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(f"prompt is {dtype} of shape {shape}: give integers [batch, n]")
    if min(shape) < 1:
        raise InputError(f"prompt is empty ({shape}): give at least one token to start from")
    if length < 1:
        raise InputError(f"length={length}: it must be at least 1")
    if context < 1:
        raise InputError(f"context={context}: it must be at least 1")
    if not temperature >= 0:
        raise InputError(f"temperature={temperature}: it must be 0 (the most likely token) or above")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k}: it must be in 1..vocab, or None for every token")
    check = as_model(model).check
    if check is not None and not isinstance(prompt, jax.core.Tracer):
        check({"tokens": np.asarray(prompt)}, np.arange(shape[0]))
