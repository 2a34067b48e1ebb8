"""Files: paths that users write, temporary folders, and atomic writes.

After an atomic write a file has its old content or its new content, also after a kill or a power cut.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import InputError


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a user's path as an absolute one; a leading ``~`` is the home folder.

    Raises:
      InputError: there is no home folder, or the current folder was deleted.

    >>> user_path("/data/./table.csv")
    PosixPath('/data/table.csv')
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise InputError(f"{path}: this user has no home folder: set HOME, or write the full path") from error
    except OSError as error:
        raise InputError(f"{path}: the current folder was deleted: change to another") from error


def temporary_folder(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """Make a temporary folder, to be used in a ``with`` statement.

    Raises:
      InputError: no folder for temporary files can be written.
    """
    try:
        return tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:
        raise InputError(
            f"no temporary folder can be made in {os.environ.get('TMPDIR', '/tmp')} ({error.strerror}): set "
            "TMPDIR to a folder that can be written"
        ) from error


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
