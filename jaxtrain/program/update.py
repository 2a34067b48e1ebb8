"""The train step of an experiment with all its settings, not compiled yet."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Batch, Metrics, Model, Prepare, State
from jaxtrain.experiment import Experiment
from jaxtrain.metrics.mean import check_mergeable
from jaxtrain.optim import LossScale, Schedule
from jaxtrain.optim import rate as optim_rate
from jaxtrain.step import make_train_step
from jaxtrain.step.contract import check_state_unchanged
from jaxtrain.step.float32_sums import sum_in_float32
from jaxtrain.step.guard import count_bad_labels, guard_step
from jaxtrain.step.merged_norm import merged_norm

Update = Callable[[State, Batch, jax.Array], tuple[State, Metrics]]


def build_train_step(
    exp: Experiment,
    mesh: Mesh,
    model: Model,
    tx: Any,
    prepare: Prepare,
    post_update: Any,
    loss_metric: str = "loss",
    shardings: Any = None,
) -> Update:
    """Build the step with ``exp.step_factory`` and guard it from outside, so a factory needs no guard.

    ``shardings`` are those of the parameters; None: they are not sharded.
    """
    loss = exp.loss if exp.guard == "off" else count_bad_labels(exp.loss)
    factory = exp.step_factory or make_train_step
    options = _factory_options(exp, mesh)
    if loss_metric != "loss":
        options |= {"loss_metric": loss_metric}
    arguments = (model, loss, tx, prepare, post_update)
    if exp.step_factory is not None:
        _check_factory(factory, arguments, options)
    step = _checked(factory(*arguments, **options))
    if exp.step_factory is not None:  # make_train_step does it itself
        step = sum_in_float32(step)
    if mesh.devices.flat[0].platform == "cpu":
        return guard_step(step, exp.guard)
    return guard_step(step, exp.guard, norm=functools.partial(merged_norm, shardings=shardings))


def _check_factory(factory: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raise InputError unless a user's step factory takes these arguments."""
    name = getattr(factory, "__name__", type(factory).__name__)
    try:
        inspect.signature(factory).bind(*arguments, **options)
    except ValueError:  # a function without a signature, written in C
        return
    except TypeError as error:
        wanted = ", ".join(["model, loss_fn, tx, prepare, post_update", *(f"{key}=" for key in options)])
        raise InputError(
            f"step_factory: this experiment calls {name}({wanted}), and {name} does not take these: {error}; "
            "give it the arguments that jaxtrain.step.make_train_step has"
        ) from error


def _checked(step: Update) -> Update:
    """``step``, of any factory, with its contract checked while it is traced."""

    @functools.wraps(step)
    def checked(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        result = step(state, batch, key)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise InputError("the step that step_factory makes must return (state, metrics)")
        check_mergeable("the step that step_factory makes", result[1])
        check_state_unchanged(state, result[0])
        return result

    return checked


def build_optimizer(exp: Experiment, steps: int) -> optax.GradientTransformation:
    """``exp.optimizer.build(steps)``; raises InputError unless that is an Optax transformation."""
    name = type(exp.optimizer).__name__
    try:
        tx = exp.optimizer.build(steps)
    except (InputError, RunError):
        raise
    except Exception as error:  # a user's own optimizer
        raise InputError(
            f"optimizer: {name}.build({steps}) failed: {type(error).__name__}: {first_line(error)[:300]} "
            "(--debug shows where)"
        ) from error
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise InputError(
            f"optimizer: {name}.build({steps}) returns a {type(tx).__name__}: return an Optax "
            "transformation, such as optax.sgd(0.1)"
        )
    transformation: optax.GradientTransformation = tx
    return transformation


def _factory_options(exp: Experiment, mesh: Mesh) -> dict[str, Any]:
    """Keyword arguments of the step factory: only those in use, so that a factory may lack the others."""
    options = loss_scaling(exp)
    if exp.grad_reduce_dtype != "float32":
        options["grad_reduce_dtype"] = exp.grad_reduce_dtype
    if exp.accumulate > 1:
        # XLA:CPU runs convolutions several times slower inside a loop.
        options |= {"accumulate": exp.accumulate, "unroll": mesh.devices.flat[0].platform == "cpu"}
    return options


def loss_scaling(exp: Experiment) -> dict[str, Any]:
    """Keyword arguments of ``make_init`` and the step factory: a loss scale for float16, else none."""
    return {"loss_scale": LossScale()} if exp.precision == "float16" else {}


def compiler_options(exp: Experiment, mesh: Mesh, abstract: State) -> dict[str, str]:
    """Return the compiler options of the train step.

    On CPUs they keep the barriers of guard, remat and microbatches, on several GPUs they make the collectives
    smaller than XLA's default (``sharding.combine_thresholds``).
    """
    platform = mesh.devices.flat[0].platform
    has_barriers = exp.guard != "off" or exp.remat != "none" or exp.accumulate > 1
    if platform == "cpu" and has_barriers:
        return sharding.KEEP_BARRIERS
    if platform == "gpu":
        params = jax.tree.leaves(abstract.params)
        return sharding.combine_thresholds(mesh, sum(x.size * x.dtype.itemsize for x in params))
    return {}


def build_post_update(exp: Experiment, steps: int) -> tuple[Callable[[State], State], ...]:
    """The post-update stages; those that depend on the length of the run are built for ``steps``."""
    return tuple(stage.build(steps) if hasattr(stage, "build") else stage for stage in exp.post_update)


def learning_rates(exp: Experiment, steps: int) -> np.ndarray | None:
    """The learning rate of every update, or None without an ``lr``.

    Computed in advance: a schedule that is called during training waits behind the steps on the device.
    """
    lr = getattr(exp.optimizer, "lr", None)
    if not isinstance(lr, float | int | Schedule):
        return None
    rate = optim_rate(lr, steps)
    if not callable(rate):
        return np.full(steps, rate)
    return np.asarray(jax.jit(jax.vmap(rate))(np.arange(steps)))
