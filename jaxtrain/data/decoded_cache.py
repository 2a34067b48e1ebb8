"""A disk cache of decoded examples, for the next run.

Decoding a data set of 50,000 small images takes seconds at every start; loading its arrays takes a fraction
of a second. The cache belongs to the user and is keyed by a fingerprint of the data files. Checksums are
verified on loading, and damaged arrays are decoded again.
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

MAX_BYTES = 4 * 2**30  # of all cached arrays; the least recently used data sets are removed first
MIN_SECONDS = 1.0  # faster decoding is not cached
METADATA = "about.json"

Fields = dict[str, np.ndarray]


def load_or_decode(fingerprint: str, decode: Callable[[], Fields]) -> Fields:
    """Load the arrays cached under ``fingerprint``, or return ``decode()`` and cache it.

    A cache that fails (no home, no space, damage) is no error: the arrays are decoded.

    Args:
      fingerprint: hexadecimal hash of the data files and of how they are decoded.
      decode: returns the named arrays.
    """
    root = cache.private_folder("decoded")
    if root is None:
        return decode()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return _read(root / fingerprint)
    start = time.perf_counter()
    fields = decode()
    size = sum(array.nbytes for array in fields.values())
    if time.perf_counter() - start > MIN_SECONDS and size < MAX_BYTES / 4:
        with contextlib.suppress(OSError, ValueError):
            _write(root, fingerprint, fields)
            _trim(root, MAX_BYTES)
    return fields


def _read(folder: Path) -> Fields:
    """Load the arrays; raise one of several errors if they are missing or damaged."""
    metadata = json.loads((folder / METADATA).read_text())
    fields = {}
    for number, (name, checksum) in enumerate(metadata["fields"].items()):
        array = np.load(folder / f"{number}.npy", allow_pickle=False)
        if _checksum(array) != checksum:
            raise ValueError(f"{folder}: {name} is damaged")
        fields[name] = array
    os.utime(folder)  # for _trim: recently used
    return fields


def _write(root: Path, fingerprint: str, fields: Fields) -> None:
    """Write atomically: another process may read, or write the same data set."""
    part = Path(tempfile.mkdtemp(dir=root, prefix=".part-"))
    try:
        checksums = {}
        for number, (name, array) in enumerate(fields.items()):
            np.save(part / f"{number}.npy", array, allow_pickle=False)
            checksums[name] = _checksum(array)
        (part / METADATA).write_text(json.dumps({"fields": checksums}))
        shutil.rmtree(root / fingerprint, ignore_errors=True)  # damaged, else it would have been loaded
        part.rename(root / fingerprint)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _trim(root: Path, limit: int) -> None:
    """Remove the least recently used data sets above ``limit`` bytes, and what killed processes left."""
    found = []
    for folder in filter(Path.is_dir, root.iterdir()):
        modified = folder.stat(follow_symlinks=False).st_mtime
        size = sum(file.stat().st_size for file in folder.iterdir())
        stale = folder.name.startswith(".part-") and time.time() - modified > 3600
        found.append((0.0 if stale else modified, size, folder))
    total = sum(size for _, size, _ in found)
    for used, size, folder in sorted(found):
        if total > limit or not used:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
