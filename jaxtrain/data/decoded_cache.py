"""Examples that took long to decode, kept as arrays for the next run.

A data set of 50,000 small images is decoded again at every start, which takes seconds; its arrays are read in
a fraction of one. They are kept for this user, under a name that tells what files they are of, and checked
when they are read: arrays that are not what was written are decoded once more.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxtrain.core import cache

CAP = 4 * 2**30  # bytes of arrays; the least recently used data sets go first
WORTH = 1.0  # seconds of decoding, from which on arrays are kept
ABOUT = "about.json"

Fields = dict[str, np.ndarray]


def arrays(identity: str, decode: Callable[[], Fields]) -> Fields:
    """``decode()``, or what it gave earlier for the same ``identity``.

    Whatever goes wrong with the kept arrays (no home, no space, damage) is no error: they are decoded then.

    Args:
      identity: hexadecimal digits that stand for the files, and for what is made of them.
      decode: gives the named arrays.
    """
    root = cache.private_folder("decoded")
    if root is None:
        return decode()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return _read(root / identity)
    began = time.perf_counter()
    fields = decode()
    size = sum(array.nbytes for array in fields.values())
    if time.perf_counter() - began > WORTH and size < CAP / 4:
        with contextlib.suppress(OSError, ValueError):
            _write(root, identity, fields)
            _trim(root, CAP)
    return fields


def _read(folder: Path) -> Fields:
    """Raises one of several errors when the arrays are not there or not what was written."""
    about = json.loads((folder / ABOUT).read_text())
    fields = {}
    for number, (name, wanted) in enumerate(about["fields"].items()):
        array = np.load(folder / f"{number}.npy", allow_pickle=False)
        if _sum(array) != wanted:
            raise ValueError(f"{folder}: {name} is damaged")
        fields[name] = array
    os.utime(folder)  # it was used
    return fields


def _write(root: Path, identity: str, fields: Fields) -> None:
    """All of it or nothing: another process may read, or write the same."""
    part = Path(tempfile.mkdtemp(dir=root, prefix=".part-"))
    try:
        sums = {}
        for number, (name, array) in enumerate(fields.items()):
            np.save(part / f"{number}.npy", array, allow_pickle=False)
            sums[name] = _sum(array)
        (part / ABOUT).write_text(json.dumps({"fields": sums}))
        shutil.rmtree(root / identity, ignore_errors=True)  # damaged, or it would have been read
        part.rename(root / identity)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _trim(root: Path, cap: int) -> None:
    """Remove the data sets that were not used for longest, and what killed processes left, above ``cap``."""
    found = []
    for folder in filter(Path.is_dir, root.iterdir()):
        about = folder.stat(follow_symlinks=False)
        size = sum(file.stat().st_size for file in folder.iterdir())
        old = folder.name.startswith(".part-") and time.time() - about.st_mtime > 3600
        found.append((0.0 if old else about.st_mtime, size, folder))
    total = sum(size for _, size, _ in found)
    for used, size, folder in sorted(found):
        if total > cap or not used:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
