"""Checks of what a user's loss, model and state promise, before anything is trained."""

from __future__ import annotations

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

ROWS = 8  # examples that the loss is tried on
SAME = 1e-4  # relative difference up to which a mean is taken for the loss


def find_loss_metric(exp: Experiment, model: Model, source: Source) -> str:
    """Return the name of the ``Mean`` among the loss's metrics that is the loss, for ``accumulate``.

    It is ``"loss"`` where the loss reports that. Any other name is found by value, on a few training examples
    and made-up outputs, so it costs a small program and no model is computed.

    Raises:
      InputError: no metric is the loss, or several that count differently are.
    """
    if exp.accumulate == 1 or exp.step_factory is not None:
        return "loss"
    ids = np.arange(min(ROWS, len(source)))
    raw = {**source.gather(ids), EXAMPLE_ID: ids.astype(np.int32), EPOCH: np.zeros(len(ids), np.int32)}

    def loss(raw: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        batch = compose(*exp.augment, *exp.preprocess)(raw, key)
        shapes = jax.eval_shape(lambda key: _outputs(model, key, batch), key)
        return evaluate_loss(exp.loss, jax.tree.map(_made_up, shapes), batch)

    _, metrics = check_fields.trace(loss, raw, jax.random.key(0), what="the loss")
    if isinstance(metrics.get("loss"), Mean):
        return "loss"
    value, metrics = jax.device_get(jax.jit(loss)(raw, jax.random.key(0)))
    means = {name: mean for name, mean in metrics.items() if isinstance(mean, Mean) and mean.count}
    same = [name for name, mean in means.items() if np.isclose(mean.total / mean.count, value, rtol=SAME)]
    if len({float(means[name].count) for name in same}) != 1:
        raise InputError(no_loss_metric(metrics))
    return same[0]


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


def _outputs(model: Model, key: jax.Array, batch: Batch) -> Any:
    params, extra = model.init(key, batch)
    return model.apply(params, extra, batch, train=False, key=None)[0]


def _made_up(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Values in (0.1, 0.9), which a loss can take for logits, for probabilities and for predictions."""
    if not jnp.issubdtype(shape.dtype, jnp.inexact):
        return jnp.zeros(shape.shape, shape.dtype)
    return jax.random.uniform(jax.random.key(1), shape.shape, minval=0.1, maxval=0.9).astype(shape.dtype)
