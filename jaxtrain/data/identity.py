"""What the data of a run are: lengths and checksums, by which a resumed run notices other data.

Everything is compared that can be read in about a tenth of a second. Of files of more than ``FULL`` bytes,
blocks are read that are spread evenly over them; of examples that are not in memory, ``ROWS``. The checksums
are CRC-32C, which finds accidents and is ten times as fast as SHA-256.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
from crc32c import crc32c

from jaxtrain.core import redact
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line
from jaxtrain.data import paths
from jaxtrain.data.sources import Arrays, Source, Subset

FULL = 256 * 2**20  # bytes of a source's files, or of an array, up to which all of them are read
SAMPLE = 32 * 2**20  # bytes that are read of larger ones
BLOCK = 64 * 2**10  # bytes read at a time
ROWS = 32  # examples of a source of the user's own
NAMED_FILES = 16  # more files of a source are one entry
ALL_ROWS = ", all rows"
CHECKSUM = re.compile(r" [0-9a-f]{8}$")
UNSTABLE = "differs from one gather to the next"
UNREADABLE = "cannot be read"

Identity = dict[str, str]
"""What is compared of one source, by name: ``length``, ``file table.csv``, ``field image``, ..."""


class _FileSource(Source, Protocol):
    def data_files(self) -> tuple[Path, ...]: ...


def identify(name: str, source: Source, opened: Source | None = None) -> Identity:
    """Return the identity of a source.

    Args:
      name: of its split, for messages.
      source: as the experiment names it.
      opened: the same examples, in memory where they fit; saves a second read.

    Raises:
      InputError: the source's ``fingerprint()`` does not return a str.
      RunError: a source of the user's own fails.

    >>> identify("train", Arrays({"label": np.arange(3, dtype=np.int32)}))
    {'length': '3', 'field label': 'int32[3] dd3bebfb'}
    """
    try:
        return {"length": f"{len(source)}", **dict(_parts(source, source if opened is None else opened))}
    except (InputError, RunError):
        raise
    except Exception as error:  # from the user's own code
        raise RunError(
            f"{name}: {type(source).__name__} cannot be identified: {type(error).__name__}: "
            f"{first_line(error)} (--debug shows where)"
        ) from error


def differences(before: Mapping[str, Identity], now: Mapping[str, Identity]) -> list[str]:
    """Return how two identities of a run's splits differ, one text per difference.

    >>> differences({"test": {"length": "3"}}, {"test": {"length": "4"}})
    ['test: length was 3 and is 4']
    """
    lines = []
    for split in [*now, *(split for split in before if split not in now)]:
        old, new = before.get(split, {}), now.get(split, {})
        unreadable = UNREADABLE in (*old.values(), *new.values())
        for part in [*new, *(part for part in old if part not in new)]:
            was, is_ = old.get(part, "absent"), new.get(part, "absent")
            if part.endswith(ALL_ROWS):  # what fits in memory there may not here
                comparable = "absent" not in (was, is_)
            else:
                in_full = part + ALL_ROWS in old and part + ALL_ROWS in new
                comparable = not in_full and UNSTABLE not in (was, is_)
            if unreadable and ("field " in part or UNREADABLE in (was, is_)):
                comparable = False
            if was != is_ and comparable:
                lines.append(f"{split}: {_difference(part.removesuffix(ALL_ROWS), was, is_)}")
    return lines


def _difference(part: str, was: str, is_: str) -> str:
    """Say how a part differs, by size or shape where that tells it, since a checksum tells nothing."""
    old, new = (text.rpartition(" ")[0] if CHECKSUM.search(text) else text for text in (was, is_))
    return f"{part} ({new}) has other contents" if old == new else f"{part} was {old} and is {new}"


def files_of(source: Source) -> list[str]:
    """Return the paths of the files that a source of jaxtrain reads, or of their folder if there are many.

    [] for another source.
    """
    while isinstance(source, Subset):
        source = source.source
    files = source.data_files() if _reads_files(source) else ()
    return sorted({str(path if len(files) <= NAMED_FILES else path.parent) for path in files})


def _reads_files(source: Any) -> TypeGuard[_FileSource]:
    """Return whether it is a source of jaxtrain, or derived from one, that names its files."""
    classes = [kind for kind in type(source).__mro__ if "data_files" in vars(kind)]
    return bool(classes) and classes[-1].__module__.startswith("jaxtrain.")


def _parts(source: Source, opened: Source) -> Iterator[tuple[str, str]]:
    kind = type(source)
    if (fingerprint := getattr(source, "fingerprint", None)) is not None:
        yield "fingerprint", _fingerprint(source, fingerprint)
        return
    if isinstance(source, Arrays):
        yield from ((f"field {name}", digest_array(array)) for name, array in source.fields.items())
    elif isinstance(source, Subset) and (_reads_files(source.source) or isinstance(source.source, Arrays)):
        yield from _parts(source.source, source.source)
        yield "indices", digest_array(np.asarray(source.indices))
    elif _reads_files(source):
        yield from digest_files(source.data_files()).items()
    else:
        yield from _own(source, opened)
        return
    if not kind.__module__.startswith("jaxtrain."):  # its methods may read something else
        yield from _own(source, opened)


def _fingerprint(source: Source, fingerprint: Any) -> str:
    text = fingerprint()
    if not isinstance(text, str):
        raise InputError(
            f"{type(source).__name__}.fingerprint() returned {type(text).__name__}: it must return a str"
        )
    return redact.redact_urls(text) if len(text) <= 64 else hashlib.sha256(text.encode()).hexdigest()


def _own(source: Source, opened: Source) -> Iterator[tuple[str, str]]:
    """Identify a source by its examples, and by the sources inside it."""
    ids = np.unique(np.linspace(0, len(source) - 1, min(ROWS, len(source))).astype(np.int64))
    try:
        rows, again = source.gather(ids), source.gather(ids)  # the last bits may depend on the batch
    except Exception:  # an error of the run, where it reads this example
        yield "examples", UNREADABLE
        return
    for name, array in rows.items():
        text = digest_array(np.asarray(array))
        stable = digest_array(np.asarray(again[name])) == text
        yield f"field {name}", text if stable else UNSTABLE
        if stable and isinstance(opened, Arrays):
            yield f"field {name}{ALL_ROWS}", digest_array(opened.fields[name])
    for name, inner in _inner(source):
        yield from ((f"{name} {part}", text) for part, text in _parts(inner, inner))


def _inner(source: Source) -> Iterator[tuple[str, Source]]:
    """Yield the sources of jaxtrain that an object of the user's own holds, such as those it joins."""
    if isinstance(source, Arrays):
        return
    for name, value in vars(source).items() if hasattr(source, "__dict__") else ():
        items = value if isinstance(value, list | tuple) else [value]
        for number, item in enumerate(items):
            if isinstance(item, Arrays) or _reads_files(item):
                yield f"{name}[{number}]" if items is value else name, item


def digest_array(array: np.ndarray) -> str:
    """Return dtype, shape and a checksum; of more than ``FULL`` bytes, of rows spread evenly.

    >>> digest_array(np.zeros((2, 3), np.uint8))
    'uint8[2, 3] 572a7c8a'
    """
    text = f"{array.dtype}{list(array.shape)}"
    if array.nbytes > FULL:
        count = max(ROWS, SAMPLE * len(array) // array.nbytes)
        array = array[np.unique(np.linspace(0, len(array) - 1, count).astype(np.int64))]
    if array.dtype.hasobject:
        data: Any = repr(array.tolist()).encode()
    else:  # as bytes, because not every dtype is a buffer (bfloat16)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.size else b""
    return f"{text} {crc32c(data):08x}"


def digest_files(files: Sequence[Path]) -> dict[str, str]:
    """Return size and checksum of files, by name; of more than ``FULL`` bytes in all, of blocks of them.

    Depends on nothing but names and contents: a copy on another host has the same.
    """
    stamps = [paths.stamp(path) for path in files]
    sizes = [stamp[0] if stamp else 0 for stamp in stamps]
    step = BLOCK if sum(sizes) <= FULL else BLOCK * sum(sizes) // SAMPLE
    found: dict[str, str] = {}
    whole, start = step == BLOCK, 0  # start of the file in the one that all would make together
    for path, stamp, size in zip(files, stamps, sizes, strict=True):
        checksum = _checksum(str(path), stamp, step, 0 if whole else -start % step)
        text = f"{size} bytes {checksum:08x}"
        name = f"file {path.name}"
        found[f"{name} ({len(found) + 1})" if name in found else name] = text
        start += size
    if len(found) <= NAMED_FILES:
        return found
    together = crc32c(repr(list(found.items())).encode())
    return {f"{len(files)} files": f"{sum(sizes)} bytes {together:08x}"}


@functools.lru_cache(maxsize=4096)
def _checksum(path: str, _: tuple[int, ...], step: int, offset: int) -> int:
    """Return the CRC-32C of a block at ``offset`` and at every ``step`` bytes after it.

    The stamp is part of the cache's key: splits of the same file read it once.
    """
    checksum = 0
    with Path(path).open("rb", buffering=0) as file:
        for position in range(offset, file.seek(0, os.SEEK_END), step):
            file.seek(position)
            checksum = crc32c(file.read(BLOCK), checksum)
    return checksum
