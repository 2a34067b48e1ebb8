"""Stopping on request: the first signal asks, the loop saves and leaves; the second ends at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Stopped(Exception):
    """The run was asked to stop and has saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


class Request:
    """Whether a signal has asked for a stop; ``signum`` is None until then."""

    signum: int | None = None


@contextlib.contextmanager
def on_signals() -> Iterator[Request]:
    """Turn SIGINT and SIGTERM into a request, until the block is left.

    A second signal raises KeyboardInterrupt. Outside the main thread signals cannot be caught and the
    request never comes.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if request.signum is not None:
            raise KeyboardInterrupt
        request.signum = signum

    before: dict[int, Any] = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
