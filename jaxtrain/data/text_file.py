"""Read a file that should hold text: ``read_text_file``."""

from __future__ import annotations

import codecs
from pathlib import Path

from jaxtrain.core.errors import InputError

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_PROBED = 1024  # bytes


def read_text_file(path: str | Path) -> bytes:
    """Return the bytes of a text, in UTF-8 or another encoding of single bytes for ASCII.

    Raises:
      InputError: the file cannot be read, is compressed, or is UTF-16 or UTF-32.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): correct the path, or omit it to read a data set"
        ) from error
    kind = next((kind for start, kind in _COMPRESSED.items() if data.startswith(start)), None)
    if kind is not None:
        raise InputError(f"{path} is compressed with {kind}: unpack it")
    probe = data[:_PROBED]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or probe.count(0) * 4 > len(probe):
        raise InputError(
            f"{path} looks like UTF-16, and bytes of UTF-8 are read: convert it, such as with iconv -t UTF-8"
        )
    return data
