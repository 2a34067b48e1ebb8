"""Read the original files of a data set from a folder or an archive, and check them.

Nothing is extracted to disk and nothing is unpickled. An archive with links, devices, paths that lead out of
it, or far more data than its size can hold (a decompression bomb) is refused.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from jaxtrain.core.errors import InputError
from jaxtrain.data.prepare.originals import Original

# A file of unknown size (a list of label names) is read up to this many bytes.
_MAX_TEXT = 65_536
# A file is read into memory; the largest original file is an image of about 15 MB.
_MAX_FILE = 128 << 20
# An archive may expand to _MAX_RATIO times its size and _SLACK bytes: text expands about 5 times.
_MAX_RATIO, _SLACK = 20, 64 << 20
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
_DECOMPRESS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}
_READ_ERRORS = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, OverflowError),
    RuntimeError,  # an encrypted zip
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of a folder or an archive, open until the next one is requested.

    Attributes:
      where: path of the file or of its archive, for messages.
      path: inside the folder or archive; for a folder it starts with the folder's name.
      file: the contents, not yet read.
    """

    where: str
    path: PurePosixPath
    file: IO[bytes]

    def read(self) -> bytes:
        """Return the contents.

        Raises:
          InputError: the archive is damaged, or the file is larger than any original file.
        """
        with _read_errors(self.where):
            data = self.file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise _refusal(self.where, f"{str(self.path)[:200]!r} has more than {_MAX_FILE:,} bytes")
        return data

    def entries(self) -> Iterator[Entry]:
        """Yield the files of this entry, an uncompressed tar archive inside an archive."""
        where = f"{self.where}: {self.path}"
        with _read_errors(where):
            yield from _tar(self.file, where)


def entries(source: Path) -> Iterator[Entry]:
    """Yield every file of a folder or an archive, one at a time; hidden files are skipped.

    Raises:
      InputError: ``source`` is not an archive, is damaged, or is refused.
    """
    for entry in _folder(source) if source.is_dir() else _archive(source):
        if not entry.path.name.startswith("."):
            yield entry


def load_members(original: Original, source: Path) -> dict[str, bytes]:
    """Return the checked contents of every member of ``original``, by name, decompressed.

    Args:
      source: a folder that holds the files, or an archive of them, at any depth; or an archive.

    Raises:
      InputError: ``source`` is missing or unreadable, or a file is missing or is not the original.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    members = {member.name: member for member in original.members}
    found: dict[str, bytes] = {}
    problems: dict[str, str] = {}
    names = {*source.parts}
    for entry in _entries_at_any_depth(source):
        names.update(entry.path.parts)
        name = entry.path.name.removesuffix(".gz")
        if name not in members or name in found:
            continue
        member = members[name]
        file = gzip.GzipFile(fileobj=entry.file) if entry.path.suffix == ".gz" else entry.file
        try:  # One byte more than expected shows that the file is too large, whatever size it claims.
            data = file.read((_MAX_TEXT if member.size is None else member.size) + 1)
        except _READ_ERRORS as error:
            raise InputError(f"{entry.where}: cannot read {name} ({error})") from error
        problem = member.problem(data)
        if problem is None:
            found[name] = data
        else:  # Another data set may use the same file names, so keep looking.
            problems.setdefault(name, f"{entry.where}: {problem}")
        if len(found) == len(members):
            return found
    missing = [name for name in members if name not in found]
    for name in missing:
        if name in problems:
            raise InputError(problems[name])
    if names & {*original.pickled}:
        raise InputError(
            f"{source}: this is the Python version of {original.name}, a pickle, which is never opened: use "
            f"the binary version, which holds {', '.join(missing)}"
        )
    raise InputError(f"{source}: {', '.join(missing)} (or .gz) is missing, and {original.name} needs it")


def _entries_at_any_depth(source: Path) -> Iterator[Entry]:
    yield from entries(source)
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.name.lower().endswith(_SUFFIXES) and path.is_file():
                yield from entries(path)


def _folder(folder: Path) -> Iterator[Entry]:
    # os.walk lists one directory at a time: an extracted ImageNet has over a million files.
    for parent, subfolders, names in os.walk(folder):
        subfolders.sort()
        for path in (Path(parent, name) for name in sorted(names)):
            if path.is_file():
                with path.open("rb") as file:
                    yield Entry(str(path), PurePosixPath(path.relative_to(folder.parent)), file)


def _archive(path: Path) -> Iterator[Entry]:
    where = str(path)
    with _read_errors(where), path.open("rb") as file:
        limit = _MAX_RATIO * path.stat().st_size + _SLACK
        if zipfile.is_zipfile(file):
            yield from _zip(file, where, limit)
            return
        file.seek(0)
        decompress = _DECOMPRESS.get(file.peek(2)[:2], lambda file: file)
        yield from _tar(cast(IO[bytes], _Capped(decompress(file), where, limit)), where)


class _Capped:
    """A stream that refuses to expand to more than ``limit`` bytes.

    It counts what tarfile reads, so it covers long names and skipped members too.
    """

    def __init__(self, file: IO[bytes], where: str, limit: int) -> None:
        self._file, self._where, self._left = file, where, limit

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise _refusal(self._where, f"expands to more than {_MAX_RATIO} times its size")
        return data


def _tar(file: IO[bytes], where: str) -> Iterator[Entry]:
    # "r|" reads front to back once, so a compressed archive is never rewound.
    with tarfile.open(fileobj=file, mode="r|") as tar:
        for info in tar:
            # Stricter than tarfile's data filter, which Python has only from 3.11.4 on: no links at all.
            _check_member(where, info.name, info.isfile() or info.isdir())
            if info.isfile():
                yield Entry(where, PurePosixPath(info.name), cast(IO[bytes], tar.extractfile(info)))
        # tarfile accepts an archive cut between two files, but a complete one ends in blocks of zeros.
        if tar.fileobj is None or tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("unexpected end of data")


def _zip(file: IO[bytes], where: str, limit: int) -> Iterator[Entry]:
    with zipfile.ZipFile(file) as archive:
        # zipfile reads no more of a member than the size it claims.
        if sum(info.file_size for info in archive.infolist()) > limit:
            raise _refusal(where, f"expands to more than {_MAX_RATIO} times its size")
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            _check_member(where, info.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if not info.is_dir():
                with archive.open(info) as member:
                    yield Entry(where, PurePosixPath(info.filename), member)


def _check_member(where: str, name: str, regular: bool) -> None:
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise _refusal(where, f"{name[:200]!r} leads out of the archive")
    if not regular:
        raise _refusal(where, f"{name[:200]!r} is a link or a device")


def _refusal(where: str, problem: str) -> InputError:
    return InputError(f"{where}: {problem}, unlike any original file: download it again")


@contextlib.contextmanager
def _read_errors(where: str) -> Iterator[None]:
    """Turn the errors of a damaged archive into one line."""
    try:
        yield
    except _READ_ERRORS as error:
        line = " ".join(str(error).split())
        raise InputError(
            f"{where}: not a complete .tar, .tar.gz or .zip archive ({line}): download it again"
        ) from error
