"""May the run's folder be written? Asked before data is fetched or read, which can take minutes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from jaxtrain.errors import InputError


def check_folder(folder: Path) -> None:
    """Raise InputError unless ``folder`` can be made, or written where it is; leaves nothing behind.

    It is tried out: permission bits say nothing to root, and nothing of quotas or of read-only disks. The
    folder of a finished run need not be writable.

    >>> check_folder(Path("runs"))
    """
    where = ""
    try:
        if folder.is_file():
            raise InputError(f"{folder} is a file: give a folder")
        if (folder / "result.json").exists():
            return
        there = nearest(folder)
        where = "" if there == folder.absolute() else f" in {there}"
        with tempfile.TemporaryFile(dir=there):  # without a name, where the file system can
            pass
    except OSError as error:  # also for a folder that cannot be looked into
        raise InputError(
            f"{folder} cannot be written ({error.strerror}){where}: choose another --workdir"
        ) from error


def nearest(folder: Path) -> Path:
    """``folder``, or the closest of its parents that is there.

    >>> nearest(Path("/nothing/of/the/kind"))
    PosixPath('/')
    """
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
