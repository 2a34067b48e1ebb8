"""Files: paths that users write, temporary folders, JSON that every parser reads, and atomic writes.

After an atomic write a file has its old content or its new content, also after a kill or a power cut.
"""

from __future__ import annotations

import json
import math
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


def to_json(data: Any, indent: int | None = None) -> str:
    """Return ``data`` as JSON. NaN and infinity, which JSON lacks, become null, and arrays lists.

    >>> to_json({"loss": float("nan"), "accuracy": 0.5})
    '{"loss": null, "accuracy": 0.5}'
    """
    return json.dumps(as_json(data), indent=indent, allow_nan=False, default=str)


def not_finite(data: Any, path: str = "") -> list[str]:
    """Return the paths of the numbers that ``to_json`` writes as null.

    >>> not_finite({"test": {"loss": float("nan"), "accuracy": 0.5}})
    ['test.loss']
    """
    data = _as_python(data)
    if isinstance(data, Mapping):
        items = [(f"{path}.{name}" if path else str(name), value) for name, value in data.items()]
        return [found for where, value in items for found in not_finite(value, where)]
    if isinstance(data, list | tuple):
        return [path] if any(not_finite(value, path) for value in data) else []
    return [path] if isinstance(data, float) and not math.isfinite(data) else []


def null_line(what: str, names: list[str]) -> str:
    """Return the line that says which numbers ``to_json`` wrote as null.

    >>> null_line("result.json", ["test.loss"])
    'test.loss is not finite: written as null in result.json, since JSON has no NaN'
    """
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    verb = "is" if len(names) == 1 else "are"
    return f"{shown} {verb} not finite: written as null in {what}, since JSON has no NaN"


def as_json(data: Any) -> Any:
    """Return ``data`` with null (None) for NaN and infinity, and lists for arrays and tuples.

    >>> as_json({"loss": float("nan"), "steps": (1, 2)})
    {'loss': None, 'steps': [1, 2]}
    """
    data = _as_python(data)
    if isinstance(data, Mapping):
        return {str(name): as_json(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [as_json(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _as_python(data: Any) -> Any:
    """Return an array or a NumPy number as Python lists and numbers."""
    return data.tolist() if hasattr(data, "tolist") else data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` as JSON, atomically; numbers that are not finite become null."""
    write_text(path, to_json(data, indent=1) + "\n")


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
