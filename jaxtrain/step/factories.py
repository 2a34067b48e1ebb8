"""Factories of the init, train and eval steps: pure functions of arrays, which the caller jits.

A model, a loss and an optax transformation are all that they need.

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

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.core.chunked_logits import full_logits
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Metrics, Prepare, State, split_extra
from jaxtrain.metrics import Mean
from jaxtrain.models import as_model
from jaxtrain.optim import LossScale
from jaxtrain.step.contract import check_names, check_state_unchanged, check_trainable, without_weak_types
from jaxtrain.step.gradients import (
    LossFn,
    ReduceDtype,
    accumulate_gradients,
    check_reduce_dtype,
    evaluation_metrics,
    gradient_of,
)
from jaxtrain.step.guard import Policy, count_bad_labels, guard_step

PostUpdate = Callable[[State], State]


def identity(batch: Batch, key: jax.Array | None) -> Batch:
    """Return the batch unchanged: the default ``prepare``."""
    return batch


def make_init(
    model: Any,
    tx: optax.GradientTransformation,
    prepare: Prepare = identity,
    data_init: Callable[[Any, Batch], Any] | None = None,
    post_update: Sequence[PostUpdate] = (),
    loss_scale: LossScale | None = None,
) -> Callable[[jax.Array, Batch], State]:
    """Make the pure function ``(key, batch) -> State`` that returns the state of step 0.

    Args:
      model: a Linen module or an ``(init, apply)`` pair.
      tx: any optax transformation.
      prepare: ``(batch, key) -> batch``, the preprocessing that comes before the model.
      data_init: ``(params, prepared batch) -> params`` for initialisation from data (whitening).
      post_update: as for ``make_train_step``; a function with an ``init`` method adds its state.
      loss_scale: as for ``make_train_step``; adds its state too.

    Raises:
      InputError: while tracing, for an ``init`` that does not return ``(params, extra)``, an ``extra`` with a
        name that the state uses (``ema``, ``lookahead``, ``masks``, ``loss_scale``), or a ``data_init`` that
        changes the structure of the parameters.
    """
    pair = as_model(model)

    def init(key: jax.Array, batch: Batch) -> State:
        model_key, prepare_key = jax.random.split(key)
        batch = prepare(batch, prepare_key)
        params, extra = pair.init(model_key, batch)
        if not isinstance(extra, dict):
            raise InputError(
                f"the model's init returns a {type(extra).__name__} after its parameters: return "
                "(params, extra) with a dict of the model's statistics, {} for none"
            )
        check_names(extra)
        if data_init is not None:
            structure: Any = jax.tree.structure(params)
            params = data_init(params, batch)
            if jax.tree.structure(params) != structure:
                raise InputError("data_init must return params of the structure that it received")
        if loss_scale is not None:
            extra = {**extra, "loss_scale": loss_scale.init()}
        state = State(jnp.zeros((), jnp.int32), params, extra, tx.init(params))
        for stage in post_update:
            if hasattr(stage, "init"):
                state = stage.init(state)
        return without_weak_types(state)

    return init


def make_train_step(
    model: Any,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    prepare: Prepare = identity,
    post_update: Sequence[PostUpdate] = (),
    accumulate: int = 1,
    loss_scale: LossScale | None = None,
    unroll: bool = False,
    guard: Policy = "off",
    loss_metric: str = "loss",
    grad_reduce_dtype: ReduceDtype = "float32",
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """Make the pure function ``(state, batch, key) -> (state, metrics)`` of one update.

    Pass the same key at every step: the step folds ``state.step`` into it, so step k of a resumed run draws
    the same random numbers as step k of an uninterrupted one.

    Args:
      model: a Linen module or an ``(init, apply)`` pair.
      loss_fn: ``(outputs, batch) -> (scalar, metrics)``; metrics are mergeable (``Mean.of``).
      tx: any optax transformation.
      prepare: ``(batch, key) -> batch``, compiled with the step: cast, normalise, augment.
      post_update: pure ``State -> State`` functions, applied in order (EMA, Lookahead, masks).
      accumulate: number of microbatches that the prepared batch is split into, computed one after another
        in the memory of one, and weighted by the count of ``metrics[loss_metric]``. For a loss that is a mean
        the gradient is that of the full batch; BatchNorm statistics and dropout are those of each microbatch.
      loss_scale: for float16: skips updates whose gradient overflows, and reports ``loss_scale`` and
        ``skipped``. ``make_init`` needs the same one.
      unroll: unroll the loop over microbatches: the program is larger, but on CPUs convolutions are several
        times slower inside a loop.
      guard: ``"stop"`` and ``"skip"`` do not apply an update whose loss, gradient norm or update norm is not
        finite or whose labels are out of range, and report these figures as the metric ``guard``
        (``jaxtrain.step.guard``). With ``"skip"`` the other metrics of such an update are dropped, and
        ``skipped`` is reported.
      loss_metric: with ``accumulate``, the name of the ``Mean`` among the loss's metrics that is the loss.
      grad_reduce_dtype: dtype in which devices add up the gradients of a model that computes in half
        precision: ``"float32"``, or ``"compute"``, the dtype of the model's activations.

    Raises:
      InputError: while tracing, for a loss that is not a scalar, a metric that cannot be merged, integer
        parameters, a state that an update gives another shape or dtype, or a batch that does not divide by
        ``accumulate``.
    """
    if accumulate < 1:
        raise InputError(f"accumulate is {accumulate}: it must be at least 1")
    check_reduce_dtype(grad_reduce_dtype)
    loss_fn = loss_fn if guard == "off" else count_bad_labels(loss_fn)
    gradient = gradient_of(as_model(model), loss_fn, grad_reduce_dtype)
    if accumulate > 1:
        gradient = accumulate_gradients(gradient, accumulate, unroll, loss_metric)

    def train_step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        prepare_key, model_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = prepare(batch, prepare_key)
        scale = None if loss_scale is None else state.extra["loss_scale"]["scale"]
        check_trainable(state.params)
        loss, grads, extra, metrics = gradient(state.params, state.extra, batch, model_key, scale)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        metrics = {"loss": Mean.of(loss), **metrics, "grad_norm": Mean.of(grad_norm)}
        old, state = state, State(state.step + 1, params, extra, opt_state)
        for stage in post_update:
            state = stage(state)
        check_state_unchanged(old, state)
        if loss_scale is not None:  # last: a skipped update moves no average either
            state, scale_metrics = loss_scale.guard(old, state, grads, grad_norm)
            metrics |= scale_metrics
        return without_weak_types(state), metrics

    return guard_step(train_step, guard)


def scan_steps(
    train_step: Callable[[State, Batch, jax.Array], tuple[State, Any]],
) -> Callable[..., tuple[State, Any]]:
    """Make the pure function ``(state, batches, key, shared={}) -> (state, metrics)`` of several updates.

    For steps so short that dispatching each of them costs more than computing it. On CPUs convolutions are
    several times slower inside the scan.

    Args:
      train_step: pure ``(state, batch, key) -> (state, metrics)``, as from ``make_train_step``.

    Returns:
      A function of a state; of ``batches``, fields ``[updates, batch, ...]``; of the key that every update
      gets; and of ``shared``, fields that all updates have in common. Its metrics have a leading axis of
      updates.

    >>> import optax
    >>> from jaxtrain.losses import MSE
    >>> model = (lambda key, batch: (jnp.zeros((1, 1)), {}),
    ...          lambda params, extra, batch, **mode: (params * batch["x"], extra))
    >>> tx = optax.sgd(0.1)
    >>> steps = jax.jit(scan_steps(make_train_step(model, MSE(), tx)))
    >>> batches = {"x": jnp.ones((3, 4, 1)), "target": jnp.ones((3, 4, 1))}
    >>> state, metrics = steps(make_init(model, tx)(jax.random.key(0), batches), batches, jax.random.key(0))
    >>> int(state.step), metrics["loss"].total.shape
    (3, (3,))
    """

    def train_steps(
        state: State, batches: Batch, key: jax.Array, shared: Batch | None = None
    ) -> tuple[State, Any]:
        def update(state: State, batch: Batch) -> tuple[State, Any]:
            return train_step(state, {**(shared or {}), **batch}, key)

        return jax.lax.scan(update, state, batches)

    return train_steps


def make_eval_step(
    model: Any,
    loss_fn: LossFn,
    prepare: Prepare = identity,
    metrics_fn: Callable[[Any, Batch], Metrics] | None = None,
) -> Callable[[State, Batch], Metrics]:
    """Make the pure function ``(state, batch) -> metrics``; it uses the EMA weights if the state has them.

    Args:
      model: a Linen module or an ``(init, apply)`` pair.
      loss_fn: as for the train step; must ignore rows where ``batch["mask"]`` is false. Where it has a method
        ``eval_metrics(outputs, batch) -> metrics``, these are reported instead of its own.
      prepare: ``(batch, None) -> batch``, the train step's ``prepare`` without its random stages.
      metrics_fn: ``(outputs, batch) -> metrics``, reported in addition to the loss's own. It gets logits in
        full, or as ``ChunkedLogits`` where its attribute ``chunked`` is true.
    """
    pair = as_model(model)

    def eval_step(state: State, batch: Batch) -> Metrics:
        batch = prepare(batch, None)
        params, extra = eval_state(state)
        outputs, _ = pair.apply(params, split_extra(extra)[0], batch, train=False, key=None)
        metrics = evaluation_metrics(loss_fn, outputs, batch)
        if metrics_fn is None:
            return metrics
        chunked = getattr(metrics_fn, "chunked", False)
        return {**metrics, **metrics_fn(outputs if chunked else full_logits(outputs), batch)}

    return eval_step


def without_average(state: State) -> State:
    """Return ``state`` with its own parameters and statistics in place of their average.

    ``eval_state`` then returns these. Structure and dtypes stay, so a compiled step takes the state.
    """
    if "ema" not in state.extra:
        return state
    own = {**state.extra, "params": state.params}

    def as_average(mean: jax.Array, x: jax.Array) -> jax.Array:
        return x if x.dtype == mean.dtype else x.astype(mean.dtype)

    average = {
        name: tree if name == "updates" else jax.tree.map(as_average, tree, own[name])
        for name, tree in state.extra["ema"].items()
    }
    return state.replace(extra={**state.extra, "ema": average})


def eval_state(state: State) -> tuple[Any, dict[str, Any]]:
    """Return the parameters and statistics to evaluate with: the EMA's if the state has them.

    They have the dtypes of the state's own: the average of half-precision floats is float32.
    """
    if "ema" not in state.extra:
        return state.params, state.extra
    own = {**state.extra, "params": state.params}
    averaged = {
        name: jax.tree.map(
            lambda mean, x: mean if mean.dtype == x.dtype else mean.astype(x.dtype), tree, own[name]
        )
        for name, tree in state.extra["ema"].items()
        if name != "updates"
    }
    return averaged.pop("params"), {**state.extra, **averaged}
