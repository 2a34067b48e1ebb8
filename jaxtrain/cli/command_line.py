"""Shared parts of the commands: the parser, one-line errors, exit codes and the checkpoint flags."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from jaxtrain.core import redact
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.signals import SecondSignal, Stopped, interrupts_blocked


class Parser(argparse.ArgumentParser):
    """The parser of a command: takes no abbreviated flags and reports an error in one line.

    Args:
      prog: the name of the command in messages, such as ``"jaxtrain plan"``.
      summary: what it does, in one line.
    """

    def __init__(self, prog: str, summary: str) -> None:
        super().__init__(prog=prog, description=summary, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Print one line, where argparse would print the usage first, and exit with 2."""
        print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def main(
    run: Callable[[argparse.Namespace], int],
    parser: Parser,
    argv: Sequence[str] | None,
    needs_jax: Callable[[argparse.Namespace], bool] = lambda args: True,
) -> int:
    """Parse the arguments, call ``run(args)``, and turn an error into one line and an exit code.

    Exit codes: 0 done, 1 a bug (with its traceback), 2 bad input, 3 the run failed, 130 / 143 stopped by
    SIGINT / SIGTERM, 141 the reader of the output has closed the pipe.

    Args:
      run: does the work and returns the exit code.
      parser: of the command.
      argv: the arguments; None takes those of the process.
      needs_jax: whether ``run`` compiles anything. If not, JAX is not imported here.
    """
    _reopen_closed_files()
    with redact.redact_output():
        try:
            args = parser.parse_args(argv)
        except RunError as error:  # stdout cannot be written
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return error.exit_code
        with contextlib.nullcontext() if args.debug else _quiet_orbax():
            return _exit_code(run, parser, args, needs_jax(args))


def _exit_code(
    run: Callable[[argparse.Namespace], int],
    parser: Parser,
    args: argparse.Namespace,
    needs_jax: bool,
) -> int:
    """Call ``run(args)`` and return the exit code, however it ends."""
    try:
        if needs_jax:
            from jaxtrain.core import cache, cuda_plugin

            with interrupts_blocked(), cuda_plugin.quiet_without_driver():
                import jax  # noqa: F401
            cache.enable_compilation_cache(warn)
        code = run(args)
        sys.stdout.flush()
        return code
    except (InputError, RunError, Stopped) as error:
        if args.debug:
            traceback.print_exc()
        if not isinstance(error, Stopped) or _multihost().is_process_0():
            print(f"{parser.prog}: {error}", file=sys.stderr)
        if isinstance(error, Stopped):
            _multihost().leave()
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        # A save that was cut off leaves coroutines behind, and Python would warn about them.
        warnings.simplefilter("ignore", RuntimeWarning)
        second = isinstance(interrupt, SecondSignal)  # of a run, which was saving
        kept = " at once; the last checkpoint is intact" if second else ""
        print(f"{parser.prog}: interrupted{kept}", file=sys.stderr)
        return interrupt.exit_code if isinstance(interrupt, SecondSignal) else 130
    except Exception as error:
        return _report(error, parser.prog, args.debug)


def _report(error: Exception, prog: str, debug: bool) -> int:
    """Print an unexpected error and return the exit code."""
    multihost = _multihost()
    if multihost.process_count() == 1:
        if isinstance(error, BrokenPipeError) and _output_pipe_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still buffered
            print(f"{prog}: output pipe closed", file=sys.stderr)
            return 128 + signal.SIGPIPE
        traceback.print_exc()  # here and not later by Python: secrets in it are redacted
        return 1
    # Either another process was lost, or this is a bug and the others must not wait for this process.
    lost = multihost.lost_process_error(error)
    if lost is None or debug:
        traceback.print_exc()
    if lost is None:
        return 1
    print(f"{prog}: {lost}", file=sys.stderr)
    code: int = lost.exit_code
    return code


def _reopen_closed_files() -> None:
    """Open /dev/null where stdin, stdout or stderr is closed: the next file would take its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def _output_pipe_closed() -> bool:
    """Return whether the reader of stdout has exited, as ``head`` does once it has its lines."""
    poll = select.poll()
    poll.register(1, 0)  # errors are always reported
    return any(events & select.POLLERR for _, events in poll.poll(0))


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silence what Orbax's threads print about a failed save or read; the command prints one line."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, before = [logger.level for logger in loggers], sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # from callbacks that run after a failed save
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


def exit_process(code: int) -> NoReturn:
    """End the process with ``code``; after a signal or a failure without waiting for threads.

    The threads of a failed save print tracebacks while Python shuts down. Orbax's threads wait forever for
    a save that an interrupt has cut off, and JAX waits for other processes.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # reported already; Python would try again, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if "jaxtrain.sharding.multihost" not in sys.modules:  # no thread or process was started
        sys.exit(code)
    multihost = _multihost()
    trackers = sys.modules.get("jaxtrain.monitor.trackers")
    if trackers is not None and trackers.abandoned() and multihost.process_count() == 1:
        os._exit(code)  # W&B's library would wait here for a server that does not answer
    if code > 128 or (code == RunError.exit_code and multihost.process_count() == 1):
        os._exit(code)
    sys.exit(multihost.exit_process(code))


def _multihost() -> ModuleType:
    from jaxtrain.sharding import multihost  # here: --help and --list do not import JAX

    return multihost


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add ``INPUT ...``, what ``artifact.examples.Reader`` reads."""
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="images, folders of images, .npy arrays, .csv tables with the model's inputs as columns, .txt "
        "files with a text per line, or - for such lines on stdin",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add ``--weights``, for ``parse_weights``, and ``--experiment``, for ``load_recorded``."""
    parser.add_argument(
        "--weights",
        "--checkpoint",
        default="best",
        metavar="best|latest|STEP|ema|params",
        help="which checkpoint, and with a comma which of its weights: the average (ema) or the parameters "
        "(params), as in latest,params; default: the best on the validation set, or the latest without one, "
        "and the average where the run has one",
    )
    parser.add_argument(
        "--experiment",
        metavar="PATH",
        help="the file of the run's experiment, if run --list does not show it",
    )


def parse_weights(text: str) -> tuple[str, str | None]:
    """Return the checkpoint and the kind of weights, ``ema`` or ``params``, that ``--weights`` names.

    Raises:
      InputError: it names two checkpoints or two kinds of weights.

    >>> parse_weights("latest,params"), parse_weights("ema"), parse_weights("400")
    (('latest', 'params'), ('best', 'ema'), ('400', None))
    """
    parts = text.split(",")
    kinds = [part for part in parts if part in ("ema", "params")]
    which = [part for part in parts if part not in kinds]
    if len(kinds) > 1 or len(which) > 1:
        raise InputError(f"--weights {text}: give one of best, latest or a step, and one of ema or params")
    return which[0] if which else "best", kinds[0] if kinds else None


def choose_checkpoint(saved: Any, which: str, folder: Path) -> Any:
    """Return the checkpoint that ``--weights`` names.

    Raises:
      InputError: the run has no checkpoint, or none of that name.
    """
    steps = saved.steps()
    if not steps:
        raise InputError(f"{folder} has no checkpoint yet")
    if which in ("best", "latest"):
        return (saved.best() if which == "best" else None) or saved.latest()
    for one in steps:
        if which.isdigit() and one.step == int(which):
            return one
    available = ", ".join(str(one.step) for one in steps)
    raise InputError(f"--weights {which}: give best, latest or a saved step ({available}), ema or params")


def warn(line: str) -> None:
    """Print a warning to stderr, before there is a console."""
    print(line, file=sys.stderr, flush=True)


def workdir_path(text: str) -> Path:
    """Return ``--workdir`` as a path.

    Raises:
      InputError: it is a file.
    """
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise InputError(f"--workdir {text} is a file: give a folder")
    return path
