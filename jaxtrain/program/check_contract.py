"""Checks of what a user's loss, model and state promise, before anything is trained."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Metrics, Model
from jaxtrain.data import Source, compose
from jaxtrain.experiment import Experiment
from jaxtrain.metrics import Mean
from jaxtrain.program import check_fields
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID
from jaxtrain.step.gradients import evaluate_loss, no_loss_metric

ROWS = 64  # examples that the loss is tried on, at most
NUMBERS = 2**22  # in the outputs made up for them, at most, but one example for each microbatch
SAME = 1e-4  # relative difference that the order of sums may make


def find_loss_metric(exp: Experiment, model: Model, source: Source) -> str:
    """Return the name of the ``Mean`` among the loss's metrics whose count weights microbatches.

    With these weights the mean of the microbatches' losses must be the loss of the full batch. That is tried
    on some training examples with made-up outputs, so it costs a small program and no model is computed.
    ``"loss"`` is tried first, then the metrics that have the value of the loss.

    Raises:
      InputError: no metric fits, or several that count differently do.
    """
    if exp.accumulate == 1 or exp.step_factory is not None:
        return "loss"
    (value, metrics), parts = _try_loss(exp, model, source)
    means = {name: mean for name, mean in metrics.items() if isinstance(mean, Mean)}
    combined = {name: _combine(name, parts) for name in means}
    if not np.isfinite(value):  # made-up outputs are outside its domain
        combined = dict.fromkeys(means, float(value))
    fits = [name for name in means if np.isclose(combined[name], value, rtol=SAME, equal_nan=True)]
    if "loss" in means:
        if "loss" not in fits:
            raise InputError(
                f"accumulate={exp.accumulate} changes the loss: a full batch has {value:.6g}, and its "
                f"microbatches, weighted by the count of the metric 'loss', {combined['loss']:.6g}: return "
                'the mean that {"loss": Mean.of(values, mask)} reports, or set accumulate=1'
            )
        return "loss"
    same = [name for name in fits if np.isclose(means[name].compute(), value, rtol=SAME, equal_nan=True)]
    if len({float(means[name].count) for name in same}) != 1:
        raise InputError(no_loss_metric(metrics))
    return same[0]


Tried = tuple[Any, Metrics]
"""A loss's value and its metrics, on the host."""


def _try_loss(exp: Experiment, model: Model, source: Source) -> tuple[Tried, list[Tried]]:
    """Compute the loss of a batch, and of each of its microbatches."""
    key, parts = jax.random.key(0), exp.accumulate
    one = _raw(source, np.zeros(1, np.int64))

    def prepare(raw: Batch) -> Batch:
        return compose(*exp.augment, *exp.preprocess)(raw, key)

    def outputs(batch: Batch) -> Any:
        params, extra = model.init(key, batch)
        return model.apply(params, extra, batch, train=False, key=None)[0]

    def loss(outputs: Any, batch: Batch) -> Tried:
        return evaluate_loss(exp.loss, outputs, batch)

    def shapes(rows: int) -> tuple[Any, Batch]:
        raw = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in one.items()}
        batch = check_fields.trace(prepare, raw, what="the batch")
        return jax.eval_shape(outputs, batch), batch

    size = _microbatch(exp, shapes(parts)[0])
    of_all, batch_shapes = shapes(size * parts)
    check_fields.trace(loss, of_all, batch_shapes, what="the loss")
    tried, small = jax.tree.map(made_up, of_all), shapes(size)[0]
    batch = jax.jit(prepare)(_raw(source, np.random.default_rng(0).integers(0, len(source), size * parts)))
    compiled = jax.jit(loss)

    def microbatch(number: int) -> Tried:
        rows = slice(number * size, (number + 1) * size)
        # An output without rows, such as an auxiliary loss, is the same in each.
        own = jax.tree.map(lambda x, part: x if x.shape == part.shape else x[rows], tried, small)
        return compiled(own, jax.tree.map(lambda x: x[rows], batch))

    found: tuple[Tried, list[Tried]] = jax.device_get(
        (compiled(tried, batch), [microbatch(number) for number in range(parts)])
    )
    return found


def _raw(source: Source, ids: np.ndarray) -> Batch:
    """Return raw examples, with the fields that a loader adds in training."""
    return {**source.gather(ids), EXAMPLE_ID: ids.astype(np.int32), EPOCH: np.zeros(len(ids), np.int32)}


def _microbatch(exp: Experiment, outputs: Any) -> int:
    """Return how many examples a microbatch of the trial has.

    Args:
      exp: its ``batch`` and ``accumulate``.
      outputs: shapes of the model's outputs for one example in each microbatch.
    """
    arrays = jax.tree.leaves(outputs, is_leaf=lambda x: hasattr(x, "shape"))  # ChunkedLogits is a leaf
    numbers = sum(math.prod(x.shape) for x in arrays)
    return max(1, min(min(ROWS, exp.batch) // exp.accumulate, NUMBERS // max(1, numbers)))


def _combine(name: str, parts: list[Tried]) -> float:
    """Return the mean of the microbatches' losses, weighted by the count of the metric ``name``."""
    weighted = [(float(metrics[name].count), float(value)) for value, metrics in parts]
    total = sum(count for count, _ in weighted if count > 0)
    return sum(count * value for count, value in weighted if count > 0) / total if total else float("nan")


def sown_notes(model: Model) -> tuple[str, ...]:
    """A warning about what the model sows and nothing reads, such as auxiliary losses.

    Args:
      model: whose ``init`` has been traced.
    """
    names = () if model.dropped is None else model.dropped()
    if not names:
        return ()
    return (
        f"the model sows {', '.join(names)}, which no loss reads: to give them to the loss, set the module's "
        f"sown_outputs = {names!r}, and its outputs are (outputs, sown)",
    )


def made_up(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Return values in (0.1, 0.9), which a loss can take for logits, probabilities or predictions."""
    if not jnp.issubdtype(shape.dtype, jnp.inexact):
        return jnp.zeros(shape.shape, shape.dtype)
    return jax.random.uniform(jax.random.key(1), shape.shape, minval=0.1, maxval=0.9).astype(shape.dtype)
