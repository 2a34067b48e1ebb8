"""Init, train step and eval step as pure functions of arrays, made by factories and not jitted.

They need nothing else of jaxtrain: a model, a loss and an optax transformation are enough.

>>> import jax, jax.numpy as jnp, optax
>>> from jaxtrain.losses import CrossEntropy
>>> from jaxtrain.models import MLP
>>> from jaxtrain.step import make_init, make_train_step
>>> model, tx = MLP(widths=(16,), classes=2), optax.adam(1e-2)
>>> batch = {"image": jnp.eye(8), "label": jnp.arange(8) % 2}
>>> state = jax.jit(make_init(model, tx))(jax.random.key(0), batch)
>>> train_step = jax.jit(make_train_step(model, CrossEntropy(), tx), donate_argnums=0)
>>> for _ in range(100):
...     state, metrics = train_step(state, batch, jax.random.key(1))
>>> metrics["accuracy"].compute()
1.0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.errors import InputError
from jaxtrain.metrics import Mean
from jaxtrain.models import as_model
from jaxtrain.types import Batch, Metrics, Prepare, State

After = Callable[[State], State]
LossFn = Callable[[Any, Batch], tuple[jax.Array, Metrics]]


def identity(batch: Batch, key: jax.Array | None) -> Batch:
    """The ``prepare`` that does nothing."""
    return batch


def make_init(
    model: Any,
    tx: optax.GradientTransformation,
    prepare: Prepare = identity,
    data_init: Callable[[Any, Batch], Any] | None = None,
    after: Sequence[After] = (),
) -> Callable[[jax.Array, Batch], State]:
    """Pure ``(key, batch) -> State`` at step 0.

    Args:
      model: a Linen module or an ``(init, apply)`` pair.
      tx: any optax transformation.
      prepare: what is done to the batch before the model sees it.
      data_init: ``(params, prepared batch) -> params`` for initialisation from data (whitening).
      after: the functions given to the train step; one with an ``init`` method adds its own state.
    """
    pair = as_model(model)

    def init(key: jax.Array, batch: Batch) -> State:
        model_key, prepare_key = jax.random.split(key)
        batch = prepare(batch, prepare_key)
        params, extra = pair.init(model_key, batch)
        if data_init is not None:
            changed = data_init(params, batch)
            before: Any = jax.tree.structure(params)
            if jax.tree.structure(changed) != before:
                raise InputError("data_init must return params of the structure it was given")
            params = changed
        state = State(jnp.zeros((), jnp.int32), params, extra, tx.init(params))
        for change in after:
            if hasattr(change, "init"):
                state = change.init(state)
        return state

    return init


def make_train_step(
    model: Any,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    prepare: Prepare = identity,
    after: Sequence[After] = (),
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """Pure ``(state, batch, key) -> (state, metrics)``: one update.

    The same key is given at every step; what is random folds in ``state.step``, so step k of a resumed
    run draws what step k of an uninterrupted one does.

    Args:
      model: a Linen module or an ``(init, apply)`` pair.
      loss_fn: ``(outputs, batch) -> (scalar, metrics)``; metrics are mergeable (``Mean.of``).
      tx: any optax transformation.
      prepare: ``(batch, key) -> batch``, compiled with the step: cast, normalise, augment.
      after: pure ``State -> State`` functions applied in order after the update (EMA, Lookahead, masks).

    Raises:
      InputError: while tracing, for a loss that is no scalar or a metric that cannot be merged.
    """
    pair = as_model(model)

    def train_step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        prepare_key, model_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = prepare(batch, prepare_key)

        def objective(params: Any) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
            outputs, extra = pair.apply(params, state.extra, batch, train=True, key=model_key)
            loss, metrics = _loss(loss_fn, outputs, batch)
            return loss, (extra, metrics)

        (loss, (extra, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": Mean.of(loss), **metrics, "grad_norm": Mean.of(optax.tree.norm(grads))}
        state = State(state.step + 1, params, extra, opt_state)
        for change in after:
            state = change(state)
        return state, metrics

    return train_step


def make_eval_step(
    model: Any,
    loss_fn: LossFn,
    prepare: Prepare = identity,
    metrics_fn: Callable[[Any, Batch], Metrics] | None = None,
) -> Callable[[State, Batch], Metrics]:
    """Pure ``(state, batch) -> metrics`` with the averaged weights where the state holds them.

    Args:
      model: a Linen module or an ``(init, apply)`` pair.
      loss_fn: as for the train step; rows where ``batch["mask"]`` is false must count for nothing.
      prepare: ``(batch, None) -> batch``: the train step's without what is random.
      metrics_fn: ``(outputs, batch) -> metrics``, reported beside the loss's own.
    """
    pair = as_model(model)

    def eval_step(state: State, batch: Batch) -> Metrics:
        batch = prepare(batch, None)
        params, extra = evaluated(state)
        outputs, _ = pair.apply(params, extra, batch, train=False, key=None)
        _, metrics = _loss(loss_fn, outputs, batch)
        return {**metrics, **(metrics_fn(outputs, batch) if metrics_fn else {})}

    return eval_step


def evaluated(state: State) -> tuple[Any, dict[str, Any]]:
    """The params and statistics that evaluation uses: the averaged ones where the state holds them."""
    if "ema" not in state.extra:
        return state.params, state.extra
    averaged = dict(state.extra["ema"])
    return averaged.pop("params"), {**state.extra, **averaged}


def _loss(loss_fn: LossFn, outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
    result = loss_fn(outputs, batch)
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
