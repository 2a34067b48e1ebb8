"""The lock that a run holds on its folder while it trains (``.lock``)."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

FILE = ".lock"


def is_locked(folder: str | Path) -> bool:
    """Return whether a process of this machine, or of a network disk with locks, trains in the folder now.

    The lock is tried for an instant and nothing is written. A run that starts in that instant tries again.
    """
    number = _open(folder, os.O_RDONLY)
    if number is None:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # a disk without locks
        return False
    finally:
        os.close(number)


@contextlib.contextmanager
def hold(folder: str | Path) -> Iterator[str | None]:
    """Keep runs out of the folder in this block; yields why that is not possible, or None where it is."""
    number = _open(folder, os.O_RDWR | os.O_CREAT)
    if number is None:
        yield "its .lock cannot be opened"
        return
    try:
        reason = None
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            reason = "it is in use by a run"
        except OSError as error:
            reason = f"its disk has no locks ({error.strerror})"
        yield reason
    finally:
        os.close(number)


def _open(folder: str | Path, flags: int) -> int | None:
    try:
        return os.open(f"{folder}/{FILE}", flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError:
        return None
