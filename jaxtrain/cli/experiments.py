"""Load experiments for the commands: by name, with overrides or from a run's record; prepare their data."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxtrain import checkpoint
from jaxtrain.cli import command_line
from jaxtrain.core import redact, safe_names
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import State
from jaxtrain.data import Source, Subset, paths
from jaxtrain.experiment import (
    Experiment,
    code,
    comparable_configs,
    config_text,
    discover,
    find,
    first_difference,
    override,
)
from jaxtrain.monitor import Console
from jaxtrain.sharding import multihost
from jaxtrain.step.factories import without_average
from jaxtrain.train import identity, run_folder, run_record


def load_experiment(
    name: str, settings: Sequence[str], started_in: str | None = None
) -> tuple[str, str, Experiment]:
    """Load an experiment; returns its name, its origin, and the experiment with the overrides applied.

    Relative paths of its data are from here on looked up beside its file and then in ``started_in``, the
    working directory of a run's first start.
    """
    entry = find(name)
    if entry.point is None:  # before it is imported, because it may open its data at once
        paths.set_base_folders(Path(entry.origin).parent, started_in)
    experiment, _ = entry.load()
    paths.set_base_folders(module_file(entry.module()).parent, started_in)
    config_text(experiment)  # registers its secrets: from here on they are redacted, like those of --set
    for setting in settings:
        redact.redact_setting(setting)
    return entry.name, entry.origin, override(experiment, list(settings))


def module_file(module: ModuleType) -> Path:
    """Return the file of an experiment's module."""
    return Path(str(module.__file__))


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """A run that has begun: its folder, its ``config.json``, and its experiment's name and definition."""

    folder: Path
    record: dict[str, Any]
    name: str
    experiment: Experiment
    code: dict[str, str]

    def check_code(self, strict: bool = False) -> None:
        """Print a line if the run's code has changed, or raise InputError if ``strict``."""
        _warn(multihost.on_process_0(lambda: identity.check_code(self.record, self.code, strict), "code"))

    def check_data(self, sources: Mapping[str, Source], split: str, accept: bool) -> None:
        """Compare the data of ``split`` with the run's, and print a line about those of other splits.

        Args:
          sources: from ``assemble``'s ``inspect``; those of the run that are compared.
          split: the one that is evaluated.
          accept: record that changed data were accepted, and continue.

        Raises:
          InputError: they have changed, and ``accept`` is False.
        """
        _warn(paths.notes())
        if "data" not in self.record:
            _warn([identity.NOT_RECORDED])
            return
        known = {"data": {name: parts for name, parts in self.record["data"].items() if name in sources}}
        changed = identity.data_changes(known, identity.describe_data(self.experiment, sources)["data"])
        source = "train" if split == "valid" and self.experiment.holdout else split
        own = [text for text in changed if text.startswith(f"{source}: ")]
        if own and not accept:
            raise identity.refuse(self.folder, own, "evaluate them")
        if own:
            _warn([identity.accepted_note(own)])
            run_folder.RunFolder(self.folder).accept_data("evaluate", own)
        if others := [text for text in changed if text not in own]:
            _warn([f"the data have changed since this run started: {identity.shorten(others)}"])

    def restore(self, weights: str, abstract: State) -> tuple[checkpoint.CheckpointInfo, State]:
        """Read the checkpoint that ``--weights`` names; returns its description and its state.

        Args:
          weights: the value of ``--weights``.
          abstract: shapes, dtypes and shardings of the state.

        Raises:
          InputError, RunError: there is no such checkpoint or average, or it cannot be read.
        """
        which, kind = command_line.parse_weights(weights)
        if kind == "ema" and "ema" not in abstract.extra:
            raise InputError(
                f"--weights {weights}: the run in {self.folder} has no average of its weights (no optim.EMA "
                "in post_update)"
            )
        hint = "use an older one with --weights {step}"
        with checkpoint.open(self.folder, log=command_line.warn, older_hint=hint) as saved:
            chosen = command_line.choose_checkpoint(saved, which, self.folder)
            state = saved.restore(chosen, abstract)
        return chosen, without_average(state) if kind == "params" else state


def _warn(lines: Sequence[str]) -> None:
    for line in lines if multihost.is_process_0() else ():
        command_line.warn(line)


def open_run(args: argparse.Namespace) -> RecordedRun:
    """Open the run of ``--workdir``, with the experiment of ``--experiment`` where that is given.

    Raises:
      InputError, RunError: there is no run, or its experiment is not found or has changed.
    """
    folder = command_line.workdir_path(args.workdir)
    record = run_record.load(folder)
    name, experiment = load_recorded(record, folder, args.experiment)
    from jaxtrain.program.assembly import without_teacher

    digests = code.digests(find(args.experiment or name).module(), experiment)
    return RecordedRun(folder, record, name, without_teacher(experiment), digests)


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
            if origin == "jaxtrain.fit":
                raise InputError("jaxtrain.fit started it: add --experiment FILE, with its EXPERIMENT")
            raise InputError(f"its name is not in run --list: add --experiment {origin}")
        name, _, experiment = load_experiment(target, settings, record.get("started_in"))
    except InputError as error:
        raise InputError(f"the experiment of {folder}, {origin}, cannot be loaded: {error}") from error
    if record.get("overfit") is not None:
        experiment = overfit(experiment, record["overfit"])
    difference = first_difference(*comparable_configs(record["config"], experiment))
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


def ensure_prepared(
    experiment: Experiment, console: Console, note: Callable[[str], None] | None = None
) -> None:
    """Prepare the data sets of ``experiment`` that are missing.

    Args:
      experiment: whose data sets are prepared.
      console: shows progress.
      note: called with a line before a download; None prints it on the console.

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
            (note or console.note)(f"{name} is not prepared: downloading it")
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
