"""May a run be continued with another number of steps? Only if its updates do not depend on the number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import State
from jaxtrain.experiment import Experiment
from jaxtrain.program import Program
from jaxtrain.program.update import build_post_update


def check_length(program: Program, known: Mapping[str, Any], folder: Path, extend: bool) -> None:
    """Check that a run may continue with the steps that the program has.

    Args:
      program: the run as it would continue.
      known: its ``config.json``.
      folder: the run's folder, for messages.
      extend: allow a schedule that depends on the length.

    Raises:
      InputError: the run would be shorter, or its updates depend on its length and ``extend`` is False.
    """
    now, epochs = program.steps, float(program.experiment.epochs)
    was = float(known["config"]["epochs"])
    before = known.get("steps") or math.ceil(now * was / epochs)
    if before == now and was == epochs:
        return
    if before > now:
        raise InputError(
            f"{folder} holds a run of {before} steps and the data now give {now}: a run cannot be "
            "shortened; start a fresh run with --new"
        )
    if not extend and depends_on_length(program.experiment, program.abstract_state, before, now):
        what = "epochs" if was != epochs else "steps"
        old, new = (f"{was:g}", f"{epochs:g}") if was != epochs else (before, now)
        raise InputError(
            f"{folder} holds another run: {what} is {old} there and {new} here; its schedule depends on the "
            f"number of {what}: --extend resumes it with the longer schedule"
        )


def depends_on_length(experiment: Experiment, abstract: State, one: int, other: int) -> bool:
    """Return whether the updates of runs of ``one`` and of ``other`` steps are different programs.

    Nothing is compiled: optimizer and post-update stages are built for both and lowered, and the texts
    compared. Programs that differ and compute the same count as different.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract)
    try:
        return _lowered(experiment, shapes, one) != _lowered(experiment, shapes, other)
    except Exception:  # an update that only a step factory of the user's own can call
        return True


def _lowered(experiment: Experiment, state: State, steps: int) -> str:
    tx, stages = experiment.optimizer.build(steps), build_post_update(experiment, steps)

    def update(grads: Any, state: State) -> Any:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        results = [updates, opt_state, tx.init(state.params)]
        for stage in stages:
            state = stage(state)
        return results, state

    return jax.jit(update).lower(state.params, state).as_text()
