"""A trial of an experiment: two steps, an evaluation, a save and a restore, in a temporary folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import temporary_folder
from jaxtrain.data import Order, Subset, holdout
from jaxtrain.experiment import Experiment
from jaxtrain.monitor import Console
from jaxtrain.program import assemble
from jaxtrain.sharding import multihost
from jaxtrain.train.loop import fit


def smoke_test(name: str, experiment: Experiment, mesh: Mesh, console: Console) -> None:
    """Train two steps, evaluate and save; then the same again, which must restore and change nothing.

    Raises:
      InputError: several processes; a batch more than twice the training set.
      RunError: the restored state evaluates otherwise than the saved one.
    """
    if multihost.process_count() > 1:
        raise InputError("--smoke is for one process: leave --processes out, or use --simulate-devices")
    short = _shortened(experiment)
    with temporary_folder("jaxtrain-smoke-") as folder:
        programs = [assemble(short, mesh) for _ in range(2)]
        for note in programs[0].notes:
            console.note(note)
        first, second = (fit(program, Path(folder), console, name) for program in programs)
        for program in programs:
            program.close()
    console.end()
    if second["resumed_from"] != 2 or first["test"] != second["test"]:
        raise RunError(f"smoke test of {name}: restored {second} after {first}")
    console.note(f"smoke test of {name} passed: 2 steps, evaluation, save, restore, same evaluation")


def _shortened(experiment: Experiment) -> Experiment:
    """Two updates of ``experiment``, on its first examples."""
    batch, n = experiment.batch, len(experiment.train)
    Order(experiment.seed, n, batch, experiment.drop_remainder).steps(
        experiment.epochs
    )  # raises as the run would
    if experiment.holdout:
        holdout(n, experiment.holdout)
    if batch > 2 * n:
        raise InputError(f"batch {batch} is more than twice the training set of {n} examples")
    test = Subset(experiment.test, np.arange(min(len(experiment.test), batch + 1)))
    has_valid = experiment.valid is not None or experiment.holdout > 0
    return dataclasses.replace(
        experiment,
        train=Subset(experiment.train, np.arange(2 * batch) % n),
        test=test,
        valid=test if has_valid else None,
        holdout=0,
        epochs=1,
        log_every=1,
    )
