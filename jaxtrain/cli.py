"""What the verbs share: arguments, one-line errors, exit codes, and data sets prepared on the way."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxtrain import cache, names, redact
from jaxtrain.data import Subset
from jaxtrain.errors import InputError, RunError
from jaxtrain.experiment import Experiment, config_text, discover, find, first_difference, override
from jaxtrain.recorder import Console
from jaxtrain.sharding import processes
from jaxtrain.stop import Stopped, Twice


def main(
    run: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    """Parse, run, and turn what goes wrong into one line and an exit code.

    0 done, 1 a bug (with its traceback), 2 bad input, 3 the run failed, 130 / 143 stopped by a signal.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    setattr(parser, "error", functools.partial(_refuse, parser))  # noqa: B010 - mypy minds a method
    with redact.streams():
        args = parser.parse_args(argv)
        with contextlib.nullcontext() if args.debug else _hushed():
            return _ended(run, parser, args)


def _ended(
    run: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, args: argparse.Namespace
) -> int:
    """The exit code of ``run(args)``, however it ends."""
    try:
        cache.compiled(warn)
        return run(args)
    except (InputError, RunError, Stopped) as error:
        if args.debug:
            traceback.print_exc()
        if processes.is_first() or not isinstance(error, Stopped):
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        # A save that was cut off leaves coroutines behind, of which Python would warn.
        warnings.simplefilter("ignore", RuntimeWarning)
        print(f"{parser.prog}: interrupted at once; the last checkpoint is kept", file=sys.stderr)
        return interrupt.exit_code if isinstance(interrupt, Twice) else 130
    except Exception as error:
        if processes.count() == 1:
            traceback.print_exc()  # here, and not by Python later: a secret in it is masked
            return 1
        lost = processes.lost(error)  # not our fault, then; else a bug, which the others must not wait for
        if lost is None or args.debug:
            traceback.print_exc()
        if lost is not None:
            print(f"{parser.prog}: {lost}", file=sys.stderr)
        return 1 if lost is None else lost.exit_code


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep what Orbax's threads print about a failed save or read to ``--debug``: it is told in one line."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, before = [logger.level for logger in loggers], sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # callbacks that come after their save failed
            before(unraisable)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """One line, where argparse would print its usage first."""
    print(f"{parser.prog}: {message} (--help tells more)", file=sys.stderr)
    sys.exit(2)


def leave(code: int) -> NoReturn:
    """End the process with ``code``; after a signal or a failure at once, whatever threads still do.

    Those of a failed save print tracebacks when Python ends around them; Orbax's wait for ever for a save
    that an interrupt has cut off, and JAX for other processes.
    """
    if code > 128 or (code == RunError.exit_code and processes.count() == 1):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    processes.leave(code)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The flags ``--checkpoint``, for ``choose_checkpoint``, and ``--experiment``, for ``recorded``."""
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="best|latest|STEP",
        help="default: the best on the validation set, or the latest where there is none",
    )
    parser.add_argument(
        "--experiment",
        metavar="PATH",
        help="the file that the run was made from, where it is none of those that run --list shows",
    )


def choose_checkpoint(saved: Any, which: str, folder: Path) -> Any:
    """The kept checkpoint that ``--checkpoint`` names.

    Raises:
      InputError: there is none, or none of that name.
    """
    steps = saved.steps()
    if not steps:
        raise InputError(f"{folder} has no checkpoint yet")
    if which in ("best", "latest"):
        return (saved.best() if which == "best" else None) or saved.latest()
    for one in steps:
        if which.isdigit() and one.step == int(which):
            return one
    kept = ", ".join(str(one.step) for one in steps)
    raise InputError(f"--checkpoint {which}: give best, latest or a kept step ({kept})")


def warn(line: str) -> None:
    """A line that whoever runs the command should read, before there is a console."""
    print(line, file=sys.stderr, flush=True)


def load(name: str, settings: Sequence[str]) -> tuple[str, str, Experiment]:
    """Name, origin and the experiment with its overrides applied."""
    entry = find(name)
    experiment, _ = entry.load()
    config_text(experiment)  # from here on its secrets are known, and those of the settings, and masked
    for setting in settings:
        redact.setting(setting)
    return entry.name, entry.origin, override(experiment, list(settings))


def recorded(
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
    named = experiment_file or names.check(record["name"], f"{folder}: experiment", "give --experiment PATH")
    settings = [pair for pair in record["overrides"] if redact.MARK not in pair]
    try:
        if experiment_file is None and all(entry.name != named for entry in discover()):
            raise InputError(f"a file is run only where it is named: add --experiment {origin}")
        name, _, experiment = load(named, settings)
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
        remainder="wrap",
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
            if processes.count() > 1:  # they would write over each other, or wait for one and give up
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


def run_folder(text: str) -> Path:
    """``--workdir`` as a path.

    Raises:
      InputError: it is a file.
    """
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise InputError(f"--workdir {text} is a file: give a folder")
    return path
