"""Load experiments for the commands: by name, with overrides or from a run's record; prepare their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.core import redact, safe_names
from jaxtrain.core.errors import InputError
from jaxtrain.data import Subset
from jaxtrain.experiment import Experiment, config_text, deciding, discover, find, first_difference, override
from jaxtrain.monitor import Console
from jaxtrain.sharding import multihost


def load_experiment(name: str, settings: Sequence[str]) -> tuple[str, str, Experiment]:
    """Load an experiment; returns its name, its origin, and the experiment with the overrides applied."""
    entry = find(name)
    experiment, _ = entry.load()
    config_text(experiment)  # registers its secrets: from here on they are redacted, like those of --set
    for setting in settings:
        redact.redact_setting(setting)
    return entry.name, entry.origin, override(experiment, list(settings))


def load_recorded(
    record: dict[str, Any], folder: Path, experiment_file: str | None = None
) -> tuple[str, Experiment]:
    """Load the experiment of a run's ``config.json`` again, and compare it with the record.

    Never imports the file that a record names: the name must be one that ``run --list`` shows.

    Args:
      record: the run's ``config.json``.
      folder: of the run, for messages.
      experiment_file: the value of ``--experiment``, for a file that is not listed.

    Raises:
      InputError: the experiment is not found, or has changed since.
    """
    origin = record["origin"]
    target = experiment_file or safe_names.check(
        record["name"], f"{folder}: experiment", "give --experiment PATH"
    )
    settings = [pair for pair in record["overrides"] if redact.MARK not in pair]
    try:
        if experiment_file is None and all(entry.name != target for entry in discover()):
            raise InputError(f"its name is not in run --list: add --experiment {origin}")
        name, _, experiment = load_experiment(target, settings)
    except InputError as error:
        raise InputError(f"the experiment of {folder}, {origin}, cannot be loaded: {error}") from error
    if record.get("overfit") is not None:
        experiment = overfit(experiment, record["overfit"])
    difference = first_difference(*deciding(record["config"], experiment))
    if difference is not None:
        path, before, now = difference
        if len(settings) < len(record["overrides"]):
            raise InputError(
                f"{path} was {before} in the run in {folder} and is {now}: secrets passed with --set are not "
                "recorded; read them from an environment variable in the file"
            )
        raise InputError(
            f"{target} has changed since the run in {folder}: {path} was {before} and is {now}; "
            "restore the file to evaluate this run, or give another with --experiment"
        )
    return name, experiment


def overfit(experiment: Experiment, n: int) -> Experiment:
    """Return the experiment that trains on the first ``n`` examples, 200 steps without augmentation.

    It is tested on the same examples.
    """
    if not 0 < n <= len(experiment.train):
        raise InputError(f"--overfit {n}: give a number of examples in 1..{len(experiment.train)}")
    subset = Subset(experiment.train, np.arange(n))
    return dataclasses.replace(
        experiment,
        train=subset,
        test=subset,
        valid=None,
        holdout=0,
        augment=(),
        drop_remainder=False,
        epochs=200 * experiment.batch / n,
        eval_every=None,
        save_every=200 * experiment.batch / n,
    )


def class_names(experiment: Experiment) -> tuple[str, ...] | None:
    """Return the names of the classes, or None if the data set has none."""
    names: tuple[str, ...] | None = getattr(experiment.train, "class_names", None)
    return names


def ensure_prepared(experiment: Experiment, console: Console) -> None:
    """Prepare the data sets of ``experiment`` that are missing.

    Raises:
      InputError: one is missing and there are several processes, or it cannot be downloaded.
    """
    from jaxtrain.data.prepare import prepare

    for source in (experiment.train, experiment.valid, experiment.test):
        ready = getattr(source, "prepared", None)
        if ready is not None and not ready():
            name, folder = getattr(source, "name"), getattr(source, "data_dir")  # noqa: B009
            if multihost.process_count() > 1:  # they would overwrite each other, or time out waiting for one
                raise InputError(
                    f"{name} is not prepared: run python -m jaxtrain prepare {name} on each host first"
                )
            console.note(f"{name} is not prepared: downloading it")
            with_progress(console, lambda p: prepare(name, data_dir=folder, progress=p))  # noqa: B023


def with_progress(console: Console, work: Callable[[Callable[[str, int, int], None]], Any]) -> Any:
    """Run ``work(progress)``; ``progress(label, done, total)`` shows one progress bar per label."""
    import contextlib

    with contextlib.ExitStack() as stack:
        bars: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in bars:
                bars[label] = stack.enter_context(console.task(label, total))
            bars[label](done)

        return work(progress)
