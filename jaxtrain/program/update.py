"""The update of an experiment: its train step with all that its settings ask for, not compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.types import Batch, Metrics, Model, Prepare, State
from jaxtrain.experiment import Experiment
from jaxtrain.optim import LossScale, Schedule
from jaxtrain.optim import rate as optim_rate
from jaxtrain.step import make_train_step
from jaxtrain.step.guard import count_bad_labels, guard_step

Update = Callable[[State, Batch, jax.Array], tuple[State, Metrics]]


def build_train_step(
    exp: Experiment, mesh: Mesh, model: Model, tx: Any, prepare: Prepare, post_update: Any
) -> Update:
    """The train step, guarded from outside: so a factory of the user's own needs to know nothing of it."""
    loss = exp.loss if exp.guard == "off" else count_bad_labels(exp.loss)
    factory = exp.step_factory or make_train_step
    return guard_step(factory(model, loss, tx, prepare, post_update, **_options(exp, mesh)), exp.guard)


def _options(exp: Experiment, mesh: Mesh) -> dict[str, Any]:
    """What the step factory is given beyond its five arguments, where it is asked for."""
    if exp.accumulate == 1:
        return loss_scaling(exp)
    # XLA:CPU runs convolutions in a loop several times slower than outside.
    unroll = mesh.devices.flat[0].platform == "cpu"
    return {"accumulate": exp.accumulate, "unroll": unroll, **loss_scaling(exp)}


def loss_scaling(exp: Experiment) -> dict[str, Any]:
    """The loss scale that float16 needs, for ``make_init`` and the step factory; else nothing."""
    return {"loss_scale": LossScale()} if exp.precision == "float16" else {}


def compiler_options(exp: Experiment, mesh: Mesh) -> dict[str, str]:
    """Compiler options for a step that counts on barriers: guarded, computing again, or in microbatches."""
    counts = exp.guard != "off" or exp.remat != "none" or exp.accumulate > 1
    return sharding.KEEP_BARRIERS if counts and mesh.devices.flat[0].platform == "cpu" else {}


def build_post_update(exp: Experiment, steps: int) -> tuple[Callable[[State], State], ...]:
    """The post-update stages; those whose work depends on the run's length are built for ``steps``."""
    return tuple(stage.build(steps) if hasattr(stage, "build") else stage for stage in exp.post_update)


def learning_rates(exp: Experiment, steps: int) -> np.ndarray | None:
    """Computed once: a schedule called while training would wait behind the steps on the device."""
    lr = getattr(exp.optimizer, "lr", None)
    if not isinstance(lr, float | int | Schedule):
        return None
    rate = optim_rate(lr, steps)
    if not callable(rate):
        return np.full(steps, rate)
    return np.asarray(jax.jit(jax.vmap(rate))(np.arange(steps)))
