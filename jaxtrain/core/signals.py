"""Stop a run on SIGINT or SIGTERM, and end a run that hangs.

After the first signal the loop saves and exits; the second one ends the process. Python runs a signal's
handler only when the main thread returns from what it waits for, such as a device or a disk. So a separate
thread reads the signals too (``signal.set_wakeup_fd``) and ends the process when the main thread does not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

GRACE = 30.0
"""Seconds from the first signal to the end of the process at most: SLURM's default (KillWait)."""
GRACE_SECOND = 1.0  # the same, from the second signal
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Delay SIGINT to the end of the block: inside JAX's import it would be a crash."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stopped(Exception):
    """The run has stopped after a signal and has saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


class SecondSignal(KeyboardInterrupt):
    """A second signal: the run ends immediately, with exit code 128 + the number of the first."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.exit_code = 128 + signum


class Request:
    """A request to stop; ``signum`` is None until a signal arrives."""

    signum: int | None = None


@contextlib.contextmanager
def on_signals(grace: float | None = GRACE) -> Iterator[Request]:
    """Turn SIGINT and SIGTERM into a request to stop, within the block.

    A second signal raises ``SecondSignal``, a KeyboardInterrupt. If the block has not ended ``grace`` seconds
    after the first signal, or one second after the second, the process exits with 128 + the first signal's
    number, whatever it is doing. Outside the main thread signals cannot be caught and no request arrives.

    Args:
      grace: seconds, above 0; None never ends the process, as in a notebook.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if request.signum is not None:
            raise SecondSignal(request.signum)
        request.signum = signum

    before: dict[int, Any] = {s: signal.signal(s, handle) for s in STOP_SIGNALS}
    try:
        with _deadline(grace) if grace is not None else contextlib.nullcontext():
            yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _deadline(grace: float) -> Iterator[None]:
    """End the process when a signal has come and the block does not end in time."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_end_in_time, args=(reader, grace), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        os.close(writer)  # which ends the thread
        thread.join()
        os.close(reader)


def _end_in_time(reader: int, grace: float) -> None:
    """Read signal numbers until the pipe is closed; end the process at the deadline."""
    received: list[int] = []
    deadline = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], left)[0]:
            what = "interrupted at once" if len(received) > 1 else f"not stopped within {grace:g} s, so ended"
            _end(f"jaxtrain: {what}; the last complete checkpoint is kept", 128 + received[0])
        numbers = os.read(reader, 64)
        if not numbers:
            return
        for number in numbers:
            if number in STOP_SIGNALS:
                received.append(number)
                limit = time.monotonic() + (grace if len(received) == 1 else GRACE_SECOND)
                deadline = limit if deadline is None else min(deadline, limit)


_last_beat = 0.0  # time of the last heartbeat, by the monotonic clock


def heartbeat() -> None:
    """Report progress to ``watchdog``: a step, or a batch of an evaluation. Costs about 0.1 µs."""
    global _last_beat  # noqa: PLW0603 - a process has one heartbeat
    _last_beat = time.monotonic()


@contextlib.contextmanager
def watchdog(seconds: float | None, file: Path) -> Iterator[None]:
    """End the process with exit code 3 when ``heartbeat`` is not called for ``seconds`` within the block.

    Before that it writes the stacks of all threads to ``file``, which show what the run was waiting for.

    Args:
      seconds: longer than the first step with its compilation, and than a save; None disables the watchdog.
      file: written only when the watchdog ends the process.
    """
    if seconds is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(
        target=_end_when_silent, args=(seconds, file, stop), name="watchdog", daemon=True
    )
    heartbeat()
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _end_when_silent(seconds: float, file: Path, stop: threading.Event) -> None:
    while not stop.wait(min(1.0, seconds / 4)):
        if time.monotonic() - _last_beat <= seconds:
            continue
        where = f"the stacks of its threads are in {file}"
        try:
            with file.open("w") as target:
                faulthandler.dump_traceback(target, all_threads=True)
        except OSError as error:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            where = f"{file} cannot be written ({error.strerror}), so the stacks are above"
        _end(f"jaxtrain: no progress for {seconds:g} s, so the run has been ended; {where}", 3)


def _end(line: str, code: int) -> None:
    """Print ``line`` and end the process now, without any cleanup."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(code)
