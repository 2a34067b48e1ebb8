"""Read files of a run's folder that anyone may have written: bounded, regular files only, through no link."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 2**26
"""Largest JSON file that is read, in bytes."""


class Content(NamedTuple):
    """What a file contains, and when it was written."""

    data: bytes
    modified: float


def read(path: str | Path, limit: int = LIMIT, tail: bool = False) -> Content | None:
    """Return the content of a file; None where there is none, or no regular file, or it cannot be read.

    Args:
      path: the file. It is not opened where it is a link or a pipe.
      limit: bytes; a larger file gives None.
      tail: of a larger file, return the last ``limit`` bytes.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode) or (found.st_size > limit and not tail):
            return None
        size = min(found.st_size, limit)
        return Content(os.pread(number, size, found.st_size - size), found.st_mtime)
    except OSError:
        return None
    finally:
        os.close(number)


def parse(data: bytes) -> dict[str, Any] | None:
    """Return the JSON object in ``data``; None where it is none.

    >>> parse(b'{"step": 1}'), parse(b"[1]"), parse(b"{")
    ({'step': 1}, None, None)
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
