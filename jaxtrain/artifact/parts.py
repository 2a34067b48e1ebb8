"""The parts of an artifact in one zip file, with fixed names, fixed limits and nothing compressed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import size_text

MANIFEST, PROGRAM, WEIGHTS, VOCABULARY = (
    "manifest.json",
    "program.jax_export",
    "weights.safetensors",
    "vocabulary.txt",
)
LIMITS = {MANIFEST: 2**24, PROGRAM: 2**28, WEIGHTS: 2**42, VOCABULARY: 2**26}
"""The parts that an artifact may have, with their largest sizes in bytes. All but the last must be there."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip file can hold: the same parts are the same bytes
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_DIRECTORY_LIMIT = 4096  # bytes of the directory; four parts take less than 400


def sha256(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def write(path: Path, parts: Mapping[str, bytes]) -> None:
    """Write the parts to a new zip file, in the order of ``LIMITS``, and sync it to the disk.

    Raises:
      InputError: a part is larger than its limit.
      OSError: the file cannot be written.
    """
    with path.open("xb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(parts, key=list(LIMITS).index):
                if len(parts[name]) > LIMITS[name]:
                    raise InputError(
                        f"{name} has {size_text(len(parts[name]))}: the limit is {size_text(LIMITS[name])}"
                    )
                info = zipfile.ZipInfo(name, _EPOCH)
                info.external_attr = 0o644 << 16
                info.create_system = 3  # Unix, also where it is written elsewhere
                archive.writestr(info, parts[name])
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, bytes]:
    """Read the parts of an artifact; names, sizes and their sum are checked before any part is read.

    Raises:
      InputError: there is no such file, or it is not an artifact, or a part is damaged.
    """
    try:
        with path.open("rb") as file, _damaged(path):
            size = os.fstat(file.fileno()).st_size
            _check_directory(file, size, path)
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                _check_infos(infos, size, path)
                return {info.filename: archive.read(info) for info in infos}
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error


@contextlib.contextmanager
def new_file(path: Path, force: bool) -> Iterator[Path]:
    """Yield a path beside ``path`` to write and check; it becomes ``path`` if the block raises nothing.

    Args:
      path: the file to make, in a folder that exists.
      force: replace it if it exists.

    Raises:
      InputError: it exists and ``force`` is False, or it cannot be written.
    """
    check_new(path, force)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)


def check_new(path: Path, force: bool) -> None:
    """Raise InputError unless a file ``path`` can be made: see ``new_file``."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist: make it first")
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a device or a pipe: give the name of a file")
    if path.exists() and not force:
        raise InputError(f"{path} exists: add --force to replace it, or give another name")


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Report what ``zipfile`` finds as an InputError."""
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error) as error:
        raise InputError(f"{path} is damaged ({error}): export it again, or copy it again") from error
    except (ValueError, RuntimeError, UnicodeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error}): export it again, or copy it again") from error


def _check_directory(file: BinaryIO, size: int, path: Path) -> None:
    """Check the number of parts before ``zipfile`` reads the directory, which has as many entries as it says.

    The end of a zip file says where its directory is. Ours has no comment, so the end is the last 22 bytes,
    and before it, in a file above 4 GB, its 64-bit form.
    """
    fix = f"{path} is not an artifact: give a file that python -m jaxtrain export wrote "
    fix += "(--format jaxtrain, the default)"
    if size < _END.size:
        raise InputError(fix)
    file.seek(0)
    if file.read(4) != b"PK\3\4":
        raise InputError(fix)
    file.seek(size - _END.size)
    magic, _, _, _, count, directory, _, comment = _END.unpack(file.read(_END.size))
    if magic != b"PK\5\6" or comment:
        raise InputError(f"{path} is damaged or cut off: export it again, or copy it again")
    tail = _LOCATOR.size + _END64.size + _END.size
    if size >= tail:
        file.seek(size - tail)
        end = _END64.unpack(file.read(_END64.size))
        if file.read(4) == b"PK\6\7":
            if end[0] != b"PK\6\6":
                raise InputError(f"{path} is damaged: export it again, or copy it again")
            count, directory = max(count, end[6], end[7]), max(directory, end[8])
    if count > len(LIMITS) or directory > _DIRECTORY_LIMIT:
        raise InputError(
            f"{path} is not an artifact: it has {count} parts, and at most {len(LIMITS)} are known"
        )


def _check_infos(infos: list[zipfile.ZipInfo], size: int, path: Path) -> None:
    """Check names and sizes. Nothing is compressed, so that no part is larger than the file."""
    names = [info.filename for info in infos]
    unknown = [name for name in names if name not in LIMITS]
    if unknown or len({*names}) < len(names):
        raise InputError(f"{path} is not an artifact: it has a part {(unknown or names)[0][:60]!r}")
    missing = [name for name in (MANIFEST, PROGRAM, WEIGHTS) if name not in names]
    if missing:
        raise InputError(f"{path} is not an artifact: it has no {missing[0]}")
    for info in infos:
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not stored or info.flag_bits & 1:
            raise InputError(
                f"{path}: its part {info.filename} is compressed or encrypted: an artifact's is not"
            )
        if info.file_size > min(LIMITS[info.filename], size):
            raise InputError(
                f"{path}: its part {info.filename} has {size_text(info.file_size)}: "
                f"the limit is {size_text(LIMITS[info.filename])}"
            )
    if sum(info.file_size for info in infos) > size:
        raise InputError(f"{path} is damaged: its parts are larger than the file")
