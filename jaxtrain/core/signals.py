"""Stopping: on request, when a request takes too long, and when nothing moves any more.

The first signal asks, the loop saves and leaves; the second ends at once. Python runs a signal's handler only
when the main thread comes back from whatever it waits for, a device or a disk. So a thread of its own reads
the signals too (``signal.set_wakeup_fd``) and ends the process when the main thread does not.
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
"""Seconds from the first signal to the end, at most: what SLURM gives a job by default (KillWait)."""
AT_ONCE = 1.0  # seconds that the main thread has to leave by itself after the second signal
ASKING = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run was asked to stop and has saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


class SecondSignal(KeyboardInterrupt):
    """A second signal: the run ends at once, with 128 + the number of the first."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.exit_code = 128 + signum


class Request:
    """Whether a signal has asked for a stop; ``signum`` is None until then."""

    signum: int | None = None


@contextlib.contextmanager
def on_signals(grace: float = GRACE) -> Iterator[Request]:
    """Turn SIGINT and SIGTERM into a request, until the block is left.

    A second signal raises ``SecondSignal``, a KeyboardInterrupt. When the block is not left ``grace`` seconds
    after the first signal, or a second after the second, the process ends with 128 + the first one's number,
    whatever it is doing. Outside the main thread signals cannot be caught and the request never comes.

    Args:
      grace: seconds, above 0.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if request.signum is not None:
            raise SecondSignal(request.signum)
        request.signum = signum

    before: dict[int, Any] = {s: signal.signal(s, handle) for s in ASKING}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_end_in_time, args=(reader, grace), name="signals", daemon=True)
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(woken)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(writer)  # which ends the thread
        thread.join()
        os.close(reader)


def _end_in_time(reader: int, grace: float) -> None:
    """Reads the numbers of signals until the other end is closed; ends the process when it must."""
    asked: list[int] = []
    deadline = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], left)[0]:
            what = "interrupted at once" if len(asked) > 1 else f"not stopped within {grace:g} s, so ended"
            _end(f"jaxtrain: {what}; the last complete checkpoint is kept", 128 + asked[0])
        numbers = os.read(reader, 64)
        if not numbers:
            return
        for number in numbers:
            if number in ASKING:
                asked.append(number)
                limit = time.monotonic() + (grace if len(asked) == 1 else AT_ONCE)
                deadline = limit if deadline is None else min(deadline, limit)


_moved = 0.0  # when something last moved, by the monotonic clock


def heartbeat() -> None:
    """Say that something has moved: a step or a batch of an evaluation. Costs about 0.1 µs."""
    global _moved  # noqa: PLW0603 - a process has one pulse
    _moved = time.monotonic()


@contextlib.contextmanager
def watchdog(seconds: float | None, file: Path) -> Iterator[None]:
    """End the process with exit code 3 when ``heartbeat`` is not called for ``seconds``, in this block.

    Before that the stacks of all threads go to ``file``, so that one can see what it was waiting for.

    Args:
      seconds: longer than the first step takes with its compilation, and than a save; None is no watchdog.
      file: is written only then.
    """
    if seconds is None:
        yield
        return
    left = threading.Event()
    thread = threading.Thread(target=_watch, args=(seconds, file, left), name="watchdog", daemon=True)
    heartbeat()
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def _watch(seconds: float, file: Path, left: threading.Event) -> None:
    while not left.wait(min(1.0, seconds / 4)):
        if time.monotonic() - _moved <= seconds:
            continue
        where = f"the stacks of its threads are in {file}"
        try:
            with file.open("w") as target:
                faulthandler.dump_traceback(target, all_threads=True)
        except OSError as error:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            where = f"{file} cannot be written ({error.strerror}), so the stacks are above"
        _end(f"jaxtrain: nothing has moved for {seconds:g} s, so the run has been ended; {where}", 3)


def _end(line: str, code: int) -> None:
    """End the process now; no other thread is asked."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(code)
