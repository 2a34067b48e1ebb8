"""Text from a language model, token by token."""

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
    """``prompt: int [batch, n]`` and ``length`` more tokens: ``int32 [batch, n + length]``.

    Every new token is drawn from the logits of the last ``context`` tokens, in one compiled program, which
    is kept for the next call of the same model and sizes. A function of its arguments: the same key gives
    the same text.

    Args:
      model: a Linen module or an ``(init, apply)`` pair that takes ``tokens`` and gives **causal** logits
        ``[batch, length, vocab]``: those at t do not depend on tokens after t.
      params: the model's parameters.
      extra: its statistics, ``{}`` for none.
      prompt: at least one token each, in [0, vocab).
      length: number of new tokens, at least 1.
      key: a ``jax.random.key``.
      context: the most tokens the model looks back on; older ones slide out of its window.
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: draw among the ``top_k`` most likely tokens, in [1, vocab]; all when None.

    Raises:
      InputError: an argument outside its range.

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
    size = min(context, n + length - 1)  # the last token is never read

    def step(i: jax.Array, text: jax.Array) -> jax.Array:
        end = n + i
        start = jnp.maximum(end - size, 0)
        # A window that is not full yet ends in zeros, after the position that is read: a causal
        # model does not see them.
        window = jax.lax.dynamic_slice_in_dim(text, start, size, axis=1)
        logits, _ = apply(params, extra, {"tokens": window}, train=False, key=None)
        logits = full_logits(logits)
        if logits.ndim != 3 or logits.shape[:2] != window.shape:
            raise InputError(
                f"the model gives {logits.shape} for tokens {window.shape}: one row a token is needed"
            )
        last = jax.lax.dynamic_index_in_dim(logits, end - start - 1, axis=1, keepdims=False)
        new = _choose(last.astype(jnp.float32), jax.random.fold_in(key, i), temperature, greedy, top_k)
        return jax.lax.dynamic_update_slice_in_dim(text, new[:, None], end, axis=1)

    text = jnp.pad(prompt, ((0, 0), (0, length)))
    return jax.lax.fori_loop(0, length, step, text)


def _choose(
    logits: jax.Array, key: jax.Array, temperature: float, greedy: bool, top_k: int | None
) -> jax.Array:
    """``[batch, vocab]`` → ``int32 [batch]``."""
    vocab = logits.shape[-1]
    if top_k is not None and top_k > vocab:
        raise InputError(f"top_k={top_k} of a vocabulary of {vocab}: it must be in 1..{vocab}")
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
        raise InputError(f"length={length}: at least 1 new token")
    if context < 1:
        raise InputError(f"context={context}: at least 1 token")
    if not temperature >= 0:
        raise InputError(f"temperature={temperature}: it must be 0 (the most likely token) or above")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k}: it must be in 1..vocab, or None for every token")
    check = as_model(model).check
    if check is not None and not isinstance(prompt, jax.core.Tracer):
        check({"tokens": np.asarray(prompt)}, np.arange(shape[0]))
