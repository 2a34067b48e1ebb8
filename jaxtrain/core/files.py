"""Atomic writes: a file has its old content or its new content, also after a kill or a power cut."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` as JSON, atomically."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, sync it to the disk and rename it.

    Raises:
      OSError: the file cannot be written; ``path`` has its old content, and the temporary file is removed.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write the same file
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
