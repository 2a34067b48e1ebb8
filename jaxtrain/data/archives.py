"""Finding the original files of a data set in a folder or an archive, and checking them.

Nothing is unpacked to disk and nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import os
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from jaxtrain.data.formats import Member, Original
from jaxtrain.errors import InputError

# A file of unknown size (a list of label names) is not read further than this.
_TEXT_LIMIT = 65_536
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
_Files = Generator[tuple[str, str, IO[bytes]], None, None]  # where, path, open file
_UNREADABLE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of a folder or an archive, open until the next one is asked for.

    Attributes:
      where: the folder's file or the archive, for messages.
      path: inside it, beginning with the name of the folder.
    """

    where: str
    path: PurePosixPath
    file: IO[bytes]

    def read(self) -> bytes:
        """All of it.

        Raises:
          InputError: the archive ends before the file does, or is damaged.
        """
        try:
            return self.file.read()
        except _UNREADABLE as error:
            raise InputError(_broken(self.where, error)) from error

    def entries(self) -> Iterator[Entry]:
        """The files of a tar archive inside an archive."""
        try:
            with tarfile.open(fileobj=self.file, mode="r|*") as tar:
                for path, file in _members(tar):
                    yield Entry(self.where, PurePosixPath(path), file)
        except _UNREADABLE as error:
            raise InputError(_broken(f"{self.where}: {self.path}", error)) from error


def entries(source: Path) -> Iterator[Entry]:
    """Every file of a folder or an archive, one at a time, front to back; hidden ones are left out.

    Raises:
      InputError: ``source`` is no archive, or not a whole one.
    """
    with contextlib.closing(_walk(source) if source.is_dir() else _archive(source)) as found:
        for where, path, file in found:
            entry = Entry(where, PurePosixPath(path), file)
            if not entry.path.name.startswith("."):
                yield entry


def _walk(folder: Path) -> _Files:
    # One folder's names at a time: an unpacked ImageNet has over a million.
    for parent, below, names in os.walk(folder):
        below.sort()
        for name in sorted(names):
            path = Path(parent, name)
            with path.open("rb") as file:
                yield str(path), path.relative_to(folder.parent).as_posix(), file


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
    for where, path, file in _files(source):
        pickled |= bool(set(original.pickled) & {*PurePosixPath(path).parts})
        # The path inside an archive is only looked at, never written to: "../x" is harmless.
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


def _files(source: Path) -> Iterator[tuple[str, str, IO[bytes]]]:
    """(where, path, open file) of every file in a folder, then in the archives of that folder."""
    if source.is_file():
        yield from _archive(source)
        return
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    for path in paths:
        with path.open("rb") as file:
            yield str(path), path.relative_to(source).as_posix(), file
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


def _tar(path: Path) -> Iterator[tuple[str, str, IO[bytes]]]:
    # "r|" reads front to back once: a gzipped archive is never rewound.
    with tarfile.open(path, "r|*") as tar:
        for name, file in _members(tar):
            yield str(path), name, file
        # tarfile takes a cut between two files for the end, but a whole archive ends in blocks of zeros.
        if tar.fileobj is None or tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("unexpected end of data")


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for info in tar:
        file = tar.extractfile(info) if info.isfile() else None
        if file is not None:
            yield info.name, file


def _zip(path: Path) -> Iterator[tuple[str, str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                with archive.open(info) as file:
                    yield str(path), info.filename, file
