"""What the verbs share: arguments, one-line errors, exit codes, and data sets prepared on the way."""

from __future__ import annotations

import argparse
import contextlib
import functools
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

from jaxtrain.cli import huge_pages
from jaxtrain.core import redact
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.signals import SecondSignal, Stopped


def main(
    run: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    compiles: Callable[[argparse.Namespace], bool] = lambda args: True,
) -> int:
    """Parse, run, and turn what goes wrong into one line and an exit code.

    Nothing of JAX is imported here before ``run``, except where it ``compiles`` something.

    0 done, 1 a bug (with its traceback), 2 bad input, 3 the run failed, 130 / 143 stopped by a signal, 141
    nobody reads the output any more.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    setattr(parser, "error", functools.partial(_refuse, parser))  # noqa: B010 - mypy minds a method
    with redact.redact_output():
        args = parser.parse_args(argv)
        if needs_jax := compiles(args):
            huge_pages.ask()
        with contextlib.nullcontext() if args.debug else _quiet_orbax():
            return _exit_code(run, parser, args, needs_jax)


def _exit_code(
    run: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    compiles: bool,
) -> int:
    """The exit code of ``run(args)``, however it ends."""
    try:
        if compiles:
            from jaxtrain.core import cache

            with _interrupts_blocked():
                import jax  # noqa: F401
            cache.enable_compilation_cache(warn)
        return run(args)
    except (InputError, RunError, Stopped) as error:
        if args.debug:
            traceback.print_exc()
        if not isinstance(error, Stopped) or _multihost().is_process_0():
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        # A save that was cut off leaves coroutines behind, of which Python would warn.
        warnings.simplefilter("ignore", RuntimeWarning)
        print(f"{parser.prog}: interrupted at once; the last checkpoint is kept", file=sys.stderr)
        return interrupt.exit_code if isinstance(interrupt, SecondSignal) else 130
    except Exception as error:
        multihost = _multihost()
        if isinstance(error, BrokenPipeError) and multihost.process_count() == 1 and _output_pipe_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is buffered
            print(f"{parser.prog}: nobody reads the output any more", file=sys.stderr)
            return 128 + signal.SIGPIPE
        if multihost.process_count() == 1:
            traceback.print_exc()  # here, and not by Python later: a secret in it is masked
            return 1
        lost = multihost.lost_process_error(
            error
        )  # not our fault, then; else a bug, which the others must not wait for
        if lost is None or args.debug:
            traceback.print_exc()
        if lost is not None:
            print(f"{parser.prog}: {lost}", file=sys.stderr)
        return 1 if lost is None else lost.exit_code


def _output_pipe_closed() -> bool:
    """Has whoever read the output gone, as ``head`` does when it has seen enough?"""
    poll = select.poll()
    poll.register(1, 0)  # errors are told unasked
    return any(events & select.POLLERR for _, events in poll.poll(0))


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """An interrupt waits for the end of this block: within JAX's import it would be a crash."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
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


def exit_process(code: int) -> NoReturn:
    """End the process with ``code``; after a signal or a failure at once, whatever threads still do.

    Those of a failed save print tracebacks when Python ends around them; Orbax's wait for ever for a save
    that an interrupt has cut off, and JAX for other processes.
    """
    if "jaxtrain.sharding.multihost" not in sys.modules:  # nothing was started that could be waited for
        sys.exit(code)
    multihost = _multihost()
    if code > 128 or (code == RunError.exit_code and multihost.process_count() == 1):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(multihost.exit_process(code))


def _multihost() -> ModuleType:
    from jaxtrain.sharding import multihost  # here: --help and --list do not wait for JAX

    return multihost


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


def workdir_path(text: str) -> Path:
    """``--workdir`` as a path.

    Raises:
      InputError: it is a file.
    """
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise InputError(f"--workdir {text} is a file: give a folder")
    return path
