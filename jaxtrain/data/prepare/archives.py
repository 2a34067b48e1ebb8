"""Finding the original files of a data set in a folder or an archive, and checking them.

Nothing is unpacked to disk and nothing is ever unpickled. An archive that holds links, devices or paths which
lead out of it, or that expands to far more than it could hold, is refused all the same.
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
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from jaxtrain.core.errors import InputError
from jaxtrain.data.prepare.originals import Member, Original

# A file of unknown size (a list of label names) is not read further than this.
_TEXT_LIMIT = 65_536
# The whole of one file is read into memory: the largest original, an image, has some 15 MB.
_LARGEST = 128 << 20
# Photographs do not expand, drawn digits and text some five times, and 20 leaves room.
_EXPANSION, _SLACK = 20, 64 << 20
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
_Files = Generator[tuple[str, str, IO[bytes], int], None, None]  # where, path, open file, size
_UNREADABLE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, OverflowError),
    RuntimeError,  # an encrypted zip
)
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of a folder or an archive, open until the next one is asked for.

    Attributes:
      where: the folder's file or the archive, for messages.
      path: inside it, beginning with the name of the folder.
      size: bytes, as the archive claims.
    """

    where: str
    path: PurePosixPath
    file: IO[bytes]
    size: int

    def read(self) -> bytes:
        """All of it.

        Raises:
          InputError: the archive ends before the file does, or is damaged; or the file is larger than any
            original is.
        """
        try:
            data = self.file.read(_LARGEST + 1)
        except _UNREADABLE as error:
            raise InputError(_broken(self.where, error)) from error
        if len(data) > _LARGEST:
            raise InputError(_refused(self.where, str(self.path), f"has more than {_LARGEST:,} bytes"))
        return data

    def entries(self) -> Iterator[Entry]:
        """The files of a tar archive inside an archive."""
        try:
            where = f"{self.where}: {self.path}"
            with tarfile.open(fileobj=_expanded(self.file, where, self.size), mode="r|") as tar:
                for path, file, size in _members(tar, where):
                    yield Entry(self.where, PurePosixPath(path), file, size)
        except _UNREADABLE as error:
            raise InputError(_broken(f"{self.where}: {self.path}", error)) from error


def entries(source: Path) -> Iterator[Entry]:
    """Every file of a folder or an archive, one at a time, front to back; hidden ones are left out.

    Raises:
      InputError: ``source`` is no archive, or not a whole one.
    """
    with contextlib.closing(_walk(source) if source.is_dir() else _archive(source)) as found:
        for where, path, file, size in found:
            entry = Entry(where, PurePosixPath(path), file, size)
            if not entry.path.name.startswith("."):
                yield entry


def _walk(folder: Path) -> _Files:
    # One folder's names at a time: an unpacked ImageNet has over a million.
    for parent, below, names in os.walk(folder):
        below.sort()
        for name in sorted(names):
            path = Path(parent, name)
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                yield str(path), path.relative_to(folder.parent).as_posix(), file, size


def load_members(original: Original, source: Path) -> dict[str, bytes]:
    """The checked contents of every member of ``original``, by name, decompressed.

    Args:
      source: a folder that holds the files, or an archive of them, anywhere below; or an archive.

    Raises:
      InputError: ``source`` is absent or unreadable, or a file is missing or is not the original.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    wanted = {member.name: member for member in original.members}
    found: dict[str, bytes] = {}
    wrong: dict[str, str] = {}
    pickled = bool(set(original.pickled) & {*source.parts})
    for where, path, file, _ in _files(source):
        pickled |= bool(set(original.pickled) & {*PurePosixPath(path).parts})
        name = PurePosixPath(path).name
        member = wanted.get(name.removesuffix(".gz"))
        if member is None or member.name in found:
            continue
        data = _read(file, member, where, packed=name.endswith(".gz"))
        problem = member.problem(data)
        if problem is None:
            found[member.name] = data
        else:  # Another data set may use the same file names: look on.
            wrong.setdefault(member.name, f"{where}: {problem}")
        if len(found) == len(wanted):
            return found
    raise InputError(_missing(original, source, found, wrong, pickled))


def _missing(
    original: Original,
    source: Path,
    found: Mapping[str, bytes],
    wrong: Mapping[str, str],
    pickled: bool,
) -> str:
    missing = [member.name for member in original.members if member.name not in found]
    for name in missing:
        if name in wrong:
            return wrong[name]
    if pickled:
        return (
            f"{source}: this is the Python version of {original.name}, a pickle, which is never "
            f"opened: use the binary version, which holds {', '.join(missing)}"
        )
    return f"{source}: {', '.join(missing)} (or .gz) is not in it, and {original.name} needs it"


def _read(file: IO[bytes], member: Member, where: str, *, packed: bool) -> bytes:
    # One byte past the expected size shows that there is more, whatever the file claims.
    limit = (member.size if member.size is not None else _TEXT_LIMIT) + 1
    try:
        return gzip.GzipFile(fileobj=file).read(limit) if packed else file.read(limit)
    except _UNREADABLE as error:
        raise InputError(f"{where}: {member.name} cannot be read ({error})") from error


def _files(source: Path) -> _Files:
    """(where, path, open file, size) of every file in a folder, then in the archives of that folder."""
    if source.is_file():
        yield from _archive(source)
        return
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    for path in paths:
        with path.open("rb") as file:
            yield str(path), path.relative_to(source).as_posix(), file, path.stat().st_size
    for path in paths:
        if path.name.lower().endswith(_ARCHIVES):
            yield from _archive(path)


def _archive(path: Path) -> _Files:
    try:
        yield from _zip(path) if zipfile.is_zipfile(path) else _tar(path)
    except _UNREADABLE as error:
        raise InputError(_broken(path, error)) from error


def _broken(where: str | Path, error: Exception) -> str:
    line = " ".join(str(error).split())
    return f"{where}: not a whole .tar, .tar.gz or .zip archive ({line}): fetch it again"


def _refused(where: str | Path, name: str, why: str) -> str:
    return f"{where}: {name[:200]!r} {why}, which no original does: fetch it again"


def _tar(path: Path) -> _Files:
    # "r|" reads front to back once: a gzipped archive is never rewound.
    with path.open("rb") as packed:
        whole = _expanded(packed, str(path), path.stat().st_size)
        with tarfile.open(fileobj=whole, mode="r|") as tar:
            for name, file, size in _members(tar, str(path)):
                yield str(path), name, file, size
            # tarfile takes a cut between two files for the end, but a whole archive ends in blocks of zeros.
            if tar.fileobj is None or tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("unexpected end of data")


def _expanded(packed: IO[bytes], where: str, size: int) -> IO[bytes]:
    """The bytes of a tar archive, which may be compressed; refuses to give far more than ``size`` of it."""
    head: bytes = packed.peek(2)[:2]  # type: ignore[attr-defined] # as every buffered reader has
    opener = _OPENERS.get(head)
    most = _EXPANSION * size + _SLACK
    return cast(IO[bytes], _Limited(packed if opener is None else opener(packed), where, most))


class _Limited:
    """A file that is read front to back, and never further than ``most`` bytes."""

    def __init__(self, file: Any, where: str, most: int) -> None:
        self._file, self._where, self._left = file, where, most

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise InputError(
                _refused(self._where, "all of it", f"expands to over {_EXPANSION} times its size")
            )
        return data


def _members(tar: tarfile.TarFile, where: str) -> Iterator[tuple[str, IO[bytes], int]]:
    for info in tar:
        _check_path(where, info.name)
        # Stricter than tarfile's data filter, which Python has only from 3.11.4 on: no links at all.
        if not (info.isfile() or info.isdir()):
            raise InputError(_refused(where, info.name, "is a link or a device"))
        file = tar.extractfile(info) if info.isfile() else None
        if file is not None:
            yield info.name, file, info.size


def _check_path(where: str | Path, name: str) -> None:
    """Refuse what would be written elsewhere if it were written: such an archive is a trap."""
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise InputError(_refused(where, name, "leads out of the archive"))


def _zip(path: Path) -> _Files:
    with zipfile.ZipFile(path) as archive:
        left = _EXPANSION * path.stat().st_size + _SLACK
        for info in archive.infolist():
            _check_path(path, info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise InputError(_refused(path, info.filename, "is a link or a device"))
            left -= info.file_size  # no more than it claims is ever read of it
            if left < 0:
                raise InputError(_refused(path, "all of it", f"expands to over {_EXPANSION} times its size"))
            if not info.is_dir():
                with archive.open(info) as file:
                    yield str(path), info.filename, file, info.file_size
