"""The gradient of a loss over a batch, in one pass or accumulated over microbatches."""

from __future__ import annotations

import collections
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.core.chunked_logits import full_logits
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Metrics, Model, leaf_paths, split_extra
from jaxtrain.metrics import Mean, merge
from jaxtrain.metrics.mean import check_mergeable
from jaxtrain.step.contract import check_pair
from jaxtrain.step.float32_sums import sum_in_float32

LossFn = Callable[[Any, Batch], tuple[jax.Array, Metrics]]

ReduceDtype = Literal["float32", "compute"]
"""The dtype in which devices add up the gradients of matrices in half-precision products. ``float32``:
the products write float32, so all-reduce and reduce-scatter have float32 operands. ``compute``: both have the
dtype that the model computes in, for half the bytes."""


class Gradient(NamedTuple):
    """The results of one forward and backward pass.

    Attributes:
      loss: a scalar, the mean over the examples.
      grads: its gradient, with the structure and dtypes of the params. For complex parameters it is the
        direction of steepest ascent, as Optax expects it: the conjugate of what ``jax.grad`` returns.
      extra: the state's ``extra`` with the model's statistics updated.
      metrics: those of the loss.
    """

    loss: jax.Array
    grads: Any
    extra: dict[str, Any]
    metrics: Metrics


GradientFn = Callable[[Any, dict[str, Any], Batch, jax.Array, jax.Array | None], Gradient]
"""``(params, extra, batch, key, scale) -> Gradient``. A ``scale`` other than None multiplies the loss before
the backward pass and divides the gradient after it."""


def check_reduce_dtype(grad_reduce_dtype: str) -> None:
    """Raise InputError unless ``grad_reduce_dtype`` is one of the names in ``ReduceDtype``."""
    names = typing.get_args(ReduceDtype)
    if grad_reduce_dtype not in names:
        raise InputError(f"grad_reduce_dtype is {grad_reduce_dtype!r}: it must be one of {', '.join(names)}")


def gradient_of(model: Model, loss_fn: LossFn, grad_reduce_dtype: ReduceDtype = "float32") -> GradientFn:
    """Make the gradient function of ``loss_fn`` over a batch in one pass.

    Sums of half-precision numbers accumulate in float32 (``step.float32_sums``).

    Args:
      model: computes the outputs.
      loss_fn: ``(outputs, batch) -> (loss, metrics)``.
      grad_reduce_dtype: dtype in which devices add up their gradients (``ReduceDtype``).
    """

    def gradient(
        params: Any, extra: dict[str, Any], batch: Batch, key: jax.Array, scale: jax.Array | None
    ) -> Gradient:
        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, dict[str, Any], Metrics]]:
            # The model sees only its statistics, and may return a new dict with nothing but those.
            statistics, others = split_extra(extra)
            result = model.apply(params, statistics, batch, train=True, key=key)
            outputs, updated = check_pair(result, "apply", "(outputs, extra)")
            updated = {**others, **updated}
            loss, metrics = evaluate_loss(loss_fn, outputs, batch)
            return loss if scale is None else loss * scale.astype(loss.dtype), (loss, updated, metrics)

        evaluate = sum_in_float32(
            jax.value_and_grad(objective, has_aux=True), lambda _: (False, grad_reduce_dtype == "float32")
        )
        (_, (loss, updated, metrics)), grads = evaluate(params)
        grads = jax.tree.map(_steepest_ascent, grads)
        if scale is not None:
            grads = jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)
        return Gradient(loss, grads, updated, metrics)

    return gradient


def accumulate_gradients(
    gradient: GradientFn, parts: int, unroll: bool = False, loss_metric: str = "loss"
) -> GradientFn:
    """Make a gradient function that computes ``parts`` microbatches one after another, in the memory of one.

    Each microbatch is weighted by the count of ``metrics[loss_metric]``, the number of values that its loss
    is the mean of, so the result is exact with masked rows and ignored labels; one without any has no weight.
    Statistics pass from one microbatch to the next; microbatch i has the key ``fold_in(key, i)``.

    Args:
      gradient: the function for one microbatch.
      parts: the number of microbatches, at least 2.
      unroll: compile the microbatches without a loop.
      loss_metric: name of the ``Mean`` among the loss's metrics that is the loss.

    Raises:
      InputError: while tracing, for a loss that does not report it, or a batch that does not divide.
    """

    def accumulated(
        params: Any, extra: dict[str, Any], batch: Batch, key: jax.Array, scale: jax.Array | None
    ) -> Gradient:
        rows = split_rows(batch, parts)
        statistics, others = split_extra(extra)

        def microbatch(carry: tuple[Any, Any], i: jax.Array) -> tuple[tuple[Any, Any], Any]:
            if unroll:  # otherwise XLA may start all microbatches and keep the activations of all of them
                carry, i = jax.lax.optimization_barrier((carry, i))
            statistics, total = carry
            part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), rows)
            one = gradient(params, {**others, **statistics}, part, jax.random.fold_in(key, i), scale)
            weight = _weight(one, loss_metric)

            def weighted(x: jax.Array) -> jax.Array:  # the mean of no values may be NaN
                return jnp.where(weight > 0, weight.astype(x.dtype) * x, 0)

            total = jax.tree.map(lambda t, g: t + weighted(g), total, one.grads)
            return (split_extra(one.extra)[0], total), (weight, weighted(one.loss), one.metrics)

        start = statistics, jax.tree.map(jnp.zeros_like, params)
        (statistics, total), (weights, losses, metrics) = jax.lax.scan(
            microbatch, start, jnp.arange(parts), unroll=parts if unroll else 1
        )
        count = jnp.where(weights.sum() > 0, weights.sum(), 1)
        grads = jax.tree.map(lambda t: t / count.astype(t.dtype), total)
        each = [jax.tree.map(lambda x, i=i: x[i], metrics) for i in range(parts)]
        merged = functools.reduce(merge, each)
        return Gradient(losses.sum() / count, grads, {**others, **statistics}, merged)

    return accumulated


def split_rows(batch: Batch, parts: int) -> Batch:
    """Reshape fields ``[batch, ...]`` to ``[batch / parts, parts, ...]``: microbatch i is rows ``i::parts``.

    Neighbouring rows go to different microbatches: a batch is sharded in blocks, so every device then has its
    share of every microbatch and no row moves between devices.

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
                f"accumulate={parts} splits every field of the batch along its axis of {size} examples, and "
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
    """Return ``loss_fn(outputs, batch)``; raise InputError unless it is a scalar with mergeable metrics."""
    result = loss_fn(outputs if getattr(loss_fn, "chunked", False) else full_logits(outputs), batch)
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise InputError(f"{name} must return (loss, metrics): a scalar and a dict of mergeable metrics")
    loss, metrics = result
    if not isinstance(loss, jax.Array | float):
        raise InputError(f"{name} returns a {type(loss).__name__} as its loss: return a float scalar array")
    if jnp.shape(loss) != ():
        raise InputError(f"{name} returns a loss of shape {jnp.shape(loss)}: average it to a scalar")
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise InputError(f"{name} returns a loss of {jnp.result_type(loss)}: it must be a real float")
    check_mergeable(name, metrics)
    return jnp.asarray(loss), dict(metrics)


def evaluation_metrics(loss_fn: LossFn, outputs: Any, batch: Batch) -> Metrics:
    """Return the metrics that ``loss_fn`` reports in evaluations.

    They are those of its method ``eval_metrics(outputs, batch)``, if it has one. A subclass that overrides
    ``__call__`` and not ``eval_metrics`` reports the metrics of its own ``__call__``.
    """
    defining = [cls for cls in type(loss_fn).__mro__ if {"__call__", "eval_metrics"} & vars(cls).keys()]
    if not defining or "eval_metrics" not in vars(defining[0]):
        return evaluate_loss(loss_fn, outputs, batch)[1]
    loss: Any = loss_fn
    metrics = loss.eval_metrics(outputs if getattr(loss, "chunked", False) else full_logits(outputs), batch)
    check_mergeable(f"{type(loss).__name__}.eval_metrics", metrics)
    return dict(metrics)


def _steepest_ascent(grad: jax.Array) -> jax.Array:
    return grad.conj() if jnp.issubdtype(grad.dtype, jnp.complexfloating) else grad


def _weight(microbatch: Gradient, loss_metric: str) -> jax.Array:
    """Return the weight of a microbatch, a scalar of the loss's dtype."""
    mean = microbatch.metrics.get(loss_metric)
    if not isinstance(mean, Mean):
        raise InputError(no_loss_metric(microbatch.metrics))
    return jnp.asarray(mean.count, microbatch.loss.dtype)


def no_loss_metric(metrics: Metrics) -> str:
    """Return the error for a loss whose metrics do not say how many values it is the mean of."""
    return (
        "accumulate weights each microbatch by the number of values that its loss is the mean of, and none "
        f"of the loss's metrics ({', '.join(metrics) or 'there are none'}) is the mean that it returns: "
        'report {"loss": Mean.of(values, mask)} too (jaxtrain.metrics.Mean), or set accumulate=1'
    )
