"""Experiments for the verbs: by name, with overrides, or as a run recorded them; and their data prepared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.core import redact, safe_names
from jaxtrain.core.errors import InputError
from jaxtrain.data import Subset
from jaxtrain.experiment import Experiment, config_text, discover, find, first_difference, override
from jaxtrain.monitor import Console
from jaxtrain.sharding import multihost


def load_experiment(name: str, settings: Sequence[str]) -> tuple[str, str, Experiment]:
    """Name, origin and the experiment with its overrides applied."""
    entry = find(name)
    experiment, _ = entry.load()
    config_text(experiment)  # from here on its secrets are known, and those of the settings, and masked
    for setting in settings:
        redact.redact_setting(setting)
    return entry.name, entry.origin, override(experiment, list(settings))


def load_recorded(
    record: dict[str, Any], folder: Path, experiment_file: str | None = None
) -> tuple[str, Experiment]:
    """The experiment that a run's ``config.json`` tells of, loaded again and compared with the record.

    A record names no file to run: its name is looked for among the experiments that ``run --list`` shows.

    Args:
      record: the run's ``config.json``.
      folder: the run's, for messages.
      experiment_file: what the user gives as ``--experiment``, for a file that is not listed.

    Raises:
      InputError: the experiment is not found, or says something else by now.
    """
    origin = record["origin"]
    named = experiment_file or safe_names.check(
        record["name"], f"{folder}: experiment", "give --experiment PATH"
    )
    settings = [pair for pair in record["overrides"] if redact.MARK not in pair]
    try:
        if experiment_file is None and all(entry.name != named for entry in discover()):
            raise InputError(f"a file is run only where it is named: add --experiment {origin}")
        name, _, experiment = load_experiment(named, settings)
    except InputError as error:
        raise InputError(f"the experiment of {folder}, {origin}, cannot be loaded: {error}") from error
    if record.get("overfit") is not None:
        experiment = overfit(experiment, record["overfit"])
    difference = first_difference(record["config"], config_text(experiment))
    if difference is not None:
        path, was, now = difference
        if len(settings) < len(record["overrides"]):
            raise InputError(
                f"{path} was {was} in the run in {folder} and is {now}: a secret that was given by --set is "
                "not recorded; let the file read it from an environment variable"
            )
        raise InputError(
            f"{named} has changed since the run in {folder}: {path} was {was} and is {now}; "
            "restore the file to evaluate this run, or name another with --experiment"
        )
    return name, experiment


def overfit(experiment: Experiment, n: int) -> Experiment:
    """Train on the first ``n`` examples without augmentation, 200 steps, and test on the same."""
    if not 0 < n <= len(experiment.train):
        raise InputError(f"--overfit {n}: give a number of examples in 1..{len(experiment.train)}")
    fixed = Subset(experiment.train, np.arange(n))
    return dataclasses.replace(
        experiment,
        train=fixed,
        test=fixed,
        valid=None,
        holdout=0,
        augment=(),
        drop_remainder=False,
        epochs=200 * experiment.batch / n,
        eval_every=None,
        save_every=200 * experiment.batch / n,
    )


def class_names(experiment: Experiment) -> tuple[str, ...] | None:
    """Names of the classes, where the data set knows them."""
    names: tuple[str, ...] | None = getattr(experiment.train, "class_names", None)
    return names


def ensure_prepared(experiment: Experiment, console: Console) -> None:
    """Prepare the data sets of ``experiment`` that are not there yet, where that needs no help."""
    from jaxtrain.data.prepare import prepare

    for source in (experiment.train, experiment.valid, experiment.test):
        ready = getattr(source, "prepared", None)
        if ready is not None and not ready():
            name, folder = getattr(source, "name"), getattr(source, "data_dir")  # noqa: B009
            if multihost.process_count() > 1:  # they would write over each other, or wait for one and give up
                raise InputError(
                    f"{name} is not prepared: run python -m jaxtrain prepare {name} on each host first"
                )
            console.note(f"{name} is not prepared yet: fetching it")
            with_progress(console, lambda p: prepare(name, data_dir=folder, progress=p))  # noqa: B023


def with_progress(console: Console, work: Callable[[Callable[[str, int, int], None]], Any]) -> Any:
    """Run ``work(progress)``, showing ``progress(label, done, total)`` as one bar for each label."""
    import contextlib

    with contextlib.ExitStack() as stack:
        bars: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in bars:
                bars[label] = stack.enter_context(console.task(label, total))
            bars[label](done)

        return work(progress)
