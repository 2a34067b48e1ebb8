"""Init, train step and eval step as pure functions of arrays, made by factories and not jitted.

They need nothing else of jaxtrain: a model, a loss and an optax transformation are enough.

>>> import jax, jax.numpy as jnp, optax
>>> from jaxtrain.losses import CrossEntropy
>>> from jaxtrain.models import MLP
>>> from jaxtrain.step.factories import make_init, make_train_step
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
from jaxtrain.step.gradients import LossFn, accumulate_gradients, evaluate_loss, gradient_of
from jaxtrain.step.guard import Policy, count_bad_labels, guard_step

PostUpdate = Callable[[State], State]


def identity(batch: Batch, key: jax.Array | None) -> Batch:
    """The ``prepare`` that does nothing."""
    return batch


def make_init(
    model: Any,
    tx: optax.GradientTransformation,
    prepare: Prepare = identity,
    data_init: Callable[[Any, Batch], Any] | None = None,
    post_update: Sequence[PostUpdate] = (),
    loss_scale: LossScale | None = None,
) -> Callable[[jax.Array, Batch], State]:
    """Pure ``(key, batch) -> State`` at step 0.

    Args:
      model: a Linen module or an ``(init, apply)`` pair.
      tx: any optax transformation.
      prepare: what is done to the batch before the model sees it.
      data_init: ``(params, prepared batch) -> params`` for initialisation from data (whitening).
      post_update: the functions given to the train step; one with an ``init`` method adds its own state.
      loss_scale: the one given to the train step; adds its own state too.
    """
    pair = as_model(model)

    def init(key: jax.Array, batch: Batch) -> State:
        model_key, prepare_key = jax.random.split(key)
        batch = prepare(batch, prepare_key)
        params, extra = pair.init(model_key, batch)
        if not isinstance(extra, dict):
            raise InputError(
                f"the model's init gives a {type(extra).__name__} beside its parameters: return "
                "(params, extra) with a dict of what the model keeps, {} for nothing"
            )
        if data_init is not None:
            changed = data_init(params, batch)
            before: Any = jax.tree.structure(params)
            if jax.tree.structure(changed) != before:
                raise InputError("data_init must return params of the structure it was given")
            params = changed
        if loss_scale is not None:
            extra = {**extra, "loss_scale": loss_scale.init()}
        state = State(jnp.zeros((), jnp.int32), params, extra, tx.init(params))
        for change in post_update:
            if hasattr(change, "init"):
                state = change.init(state)
        return state

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
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """Pure ``(state, batch, key) -> (state, metrics)``: one update.

    The same key is given at every step; what is random folds in ``state.step``, so step k of a resumed
    run draws what step k of an uninterrupted one does.

    Args:
      model: a Linen module or an ``(init, apply)`` pair.
      loss_fn: ``(outputs, batch) -> (scalar, metrics)``; metrics are mergeable (``Mean.of``).
      tx: any optax transformation.
      prepare: ``(batch, key) -> batch``, compiled with the step: cast, normalise, augment.
      post_update: pure ``State -> State`` functions, applied in order (EMA, Lookahead, masks).
      accumulate: microbatches that the prepared batch is cut into, one after another, for the memory of one.
        The gradient is that of the whole batch for a loss that is a mean over examples; what a model takes
        over a batch (BatchNorm) or draws (dropout) is of each microbatch.
      loss_scale: for float16; updates whose gradient overflows are skipped, and ``loss_scale`` and
        ``skipped`` reported. The same must be given to ``make_init``.
      unroll: compile the microbatches one by one instead of as a loop: larger programs, and on a CPU
        convolutions are several times slower in a loop.
      guard: ``"stop"`` and ``"skip"`` leave out an update whose loss, gradient norm or update norm is not
        finite or whose labels are no classes, and report the figures as the metric ``guard``
        (``jaxtrain.step.guard``); with ``"skip"`` such an update counts for nothing in the other metrics, and
        ``skipped`` is reported.

    Raises:
      InputError: while tracing, for a loss that is no scalar, a metric that cannot be merged, or a batch that
        does not divide by ``accumulate``.
    """
    if accumulate < 1:
        raise InputError(f"accumulate is {accumulate}: it must be at least 1")
    gradient = gradient_of(as_model(model), loss_fn if guard == "off" else count_bad_labels(loss_fn))
    if accumulate > 1:
        gradient = accumulate_gradients(gradient, accumulate, unroll)

    def train_step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        prepare_key, model_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = prepare(batch, prepare_key)
        scale = None if loss_scale is None else state.extra["loss_scale"]["scale"]
        loss, grads, extra, metrics = gradient(state.params, state.extra, batch, model_key, scale)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
        metrics = {"loss": Mean.of(loss), **metrics, "grad_norm": Mean.of(norm)}
        old, state = state, State(state.step + 1, params, extra, opt_state)
        if loss_scale is not None:
            state, scaling = loss_scale.guard(old, state, grads, norm)
            metrics |= scaling
        for change in post_update:
            state = change(state)
        return state, metrics

    return guard_step(train_step, guard)


def scan_steps(
    train_step: Callable[[State, Batch, jax.Array], tuple[State, Any]],
) -> Callable[..., tuple[State, Any]]:
    """Pure ``(state, batches, key, shared={}) -> (state, metrics)``: several updates as one program.

    For steps so short that starting each of them costs more than computing it. On CPUs convolutions run
    several times slower inside than outside.

    Args:
      train_step: pure ``(state, batch, key) -> (state, metrics)``, as from ``make_train_step``.

    Returns:
      A function of a state; of ``batches``, the fields ``[updates, batch, ...]``; of the key that every
      update is given; and of ``shared``, fields that are the same in all of them. Its metrics have a leading
      axis of updates.

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
        params, extra = eval_state(state)
        outputs, _ = pair.apply(params, split_extra(extra)[0], batch, train=False, key=None)
        _, metrics = evaluate_loss(loss_fn, outputs, batch)
        return {**metrics, **(metrics_fn(full_logits(outputs), batch) if metrics_fn else {})}

    return eval_step


def eval_state(state: State) -> tuple[Any, dict[str, Any]]:
    """The params and statistics that evaluation uses: the averaged ones where the state holds them."""
    if "ema" not in state.extra:
        return state.params, state.extra
    averaged = dict(state.extra["ema"])
    return averaged.pop("params"), {**state.extra, **averaged}
