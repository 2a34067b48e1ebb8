"""The gradient of a loss over a batch: at once, or in microbatches one after another."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.core.chunked_logits import full_logits
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Metrics, Model, leaf_paths, split_extra
from jaxtrain.metrics import Mean, merge

LossFn = Callable[[Any, Batch], tuple[jax.Array, Metrics]]


class Gradient(NamedTuple):
    """What one pass over a batch gives.

    Attributes:
      loss: a scalar, the mean over the examples.
      grads: its gradient, of the structure and types of the params.
      extra: the state's ``extra`` with the model's statistics updated.
      metrics: those of the loss.
    """

    loss: jax.Array
    grads: Any
    extra: dict[str, Any]
    metrics: Metrics


GradientFn = Callable[[Any, dict[str, Any], Batch, jax.Array, jax.Array | None], Gradient]
"""``(params, extra, batch, key, scale)``; where ``scale`` is given the loss is multiplied by it before it is
differentiated, and the gradient divided by it again."""


def gradient_of(model: Model, loss_fn: LossFn) -> GradientFn:
    """The gradient of ``loss_fn`` over the whole batch."""

    def gradient(
        params: Any, extra: dict[str, Any], batch: Batch, key: jax.Array, scale: jax.Array | None
    ) -> Gradient:
        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, dict[str, Any], Metrics]]:
            # A pair of functions may give back a dict of its own making, without what is not the model's.
            own, others = split_extra(extra)
            outputs, updated = model.apply(params, own, batch, train=True, key=key)
            updated = {**others, **updated}
            loss, metrics = evaluate_loss(loss_fn, outputs, batch)
            return loss if scale is None else loss * scale.astype(loss.dtype), (loss, updated, metrics)

        (_, (loss, updated, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        if scale is not None:
            grads = jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)
        return Gradient(loss, grads, updated, metrics)

    return gradient


def accumulate_gradients(gradient: GradientFn, parts: int, unroll: bool = False) -> GradientFn:
    """``gradient`` over ``parts`` microbatches, one after another: the memory of one, the result of all.

    Each counts by its share of the examples, which is the count of ``metrics["loss"]`` where the loss reports
    a ``Mean`` of that name, so that masked rows and weights change nothing; else all count alike. Statistics
    go from one microbatch to the next; microbatch i has the key ``fold_in(key, i)``.

    Args:
      gradient: of one microbatch.
      parts: how many, at least 2.
      unroll: no loop in the compiled program.
    """

    def run(
        params: Any, extra: dict[str, Any], batch: Batch, key: jax.Array, scale: jax.Array | None
    ) -> Gradient:
        rows = split_rows(batch, parts)
        own, fixed = split_extra(extra)

        def one(carry: tuple[Any, Any], i: jax.Array) -> tuple[tuple[Any, Any], Any]:
            if unroll:  # or XLA is free to begin with all of them, and to keep the activations of all
                carry, i = jax.lax.optimization_barrier((carry, i))
            stats, total = carry
            part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), rows)
            found = gradient(params, {**fixed, **stats}, part, jax.random.fold_in(key, i), scale)
            share = _count(found)
            total = jax.tree.map(lambda t, g: t + share.astype(g.dtype) * g, total, found.grads)
            return (split_extra(found.extra)[0], total), (share, share * found.loss, found.metrics)

        start = own, jax.tree.map(jnp.zeros_like, params)
        (stats, total), (shares, losses, metrics) = jax.lax.scan(
            one, start, jnp.arange(parts), unroll=parts if unroll else 1
        )
        count = jnp.where(shares.sum() > 0, shares.sum(), 1)
        grads = jax.tree.map(lambda t: t / count.astype(t.dtype), total)
        each = [jax.tree.map(lambda x, i=i: x[i], metrics) for i in range(parts)]
        return Gradient(losses.sum() / count, grads, {**fixed, **stats}, functools.reduce(merge, each))

    return run


def split_rows(batch: Batch, parts: int) -> Batch:
    """Every field ``[batch, ...]`` as ``[batch / parts, parts, ...]``: microbatch i is rows ``i::parts``.

    Neighbouring rows go to different microbatches, so that each device of a batch that is split in blocks
    has its share of every microbatch, and none is sent.

    Raises:
      InputError: a field without one row for each example, or a batch that does not divide.

    >>> split_rows({"x": jnp.arange(6)}, 2)["x"][:, 0].tolist()
    [0, 2, 4]
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in leaf_paths(batch).items()}
    counts = collections.Counter(shape[0] for shape in shapes.values() if shape)
    size = counts.most_common(1)[0][0] if counts else 0
    for path, shape in shapes.items():
        if shape[:1] != (size,):
            raise InputError(
                f"accumulate={parts} cuts every field of the batch along its axis of {size} examples, and "
                f"{path!r} has shape {list(shape)}: give it a row for each example, or set accumulate=1"
            )
    if size % parts:
        fits = " or ".join(str(n * parts) for n in (size // parts, size // parts + 1) if n)
        raise InputError(
            f"batch {size} does not divide into accumulate={parts} microbatches: use batch={fits}, or "
            "another accumulate"
        )
    return jax.tree.map(lambda x: x.reshape(size // parts, parts, *x.shape[1:]), batch)


def evaluate_loss(loss_fn: LossFn, outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
    """``loss_fn(outputs, batch)``, or InputError where that is no scalar with mergeable metrics."""
    result = loss_fn(outputs if getattr(loss_fn, "chunked", False) else full_logits(outputs), batch)
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise InputError(f"{name} must return (loss, metrics): a scalar and a dict of mergeable metrics")
    loss, metrics = result
    if jnp.shape(loss) != ():
        raise InputError(f"{name} gives a loss of shape {jnp.shape(loss)}: average it to a scalar")
    for key, metric in metrics.items():
        if not (hasattr(metric, "merge") and hasattr(metric, "compute")):
            raise InputError(
                f"{name} gives the metric {key!r} as a bare {type(metric).__name__}, which cannot be "
                "merged over batches: return jaxtrain.metrics.Mean.of(values, batch.get('mask'))"
            )
    return loss, dict(metrics)


def _count(found: Gradient) -> jax.Array:
    """How much the microbatch counts, a scalar of the loss's type."""
    mean = found.metrics.get("loss")
    return jnp.asarray(mean.count if isinstance(mean, Mean) else 1, found.loss.dtype)
