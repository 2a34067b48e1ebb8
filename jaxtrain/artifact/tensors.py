"""Named arrays as safetensors bytes, read with bounds and without a copy.

The format is https://huggingface.co/docs/safetensors: the length of a JSON header as uint64, the header with
dtype, shape and offsets of each array, and the arrays themselves. Loading an artifact needs no other package.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxtrain.core.errors import InputError

HEADER_LIMIT = 100_000_000
"""Largest header in bytes, that of the safetensors package."""
MAX_DIMENSIONS = 32

DTYPES: dict[str, Any] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode(arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the arrays as safetensors bytes; the same arrays give the same bytes.

    Args:
      arrays: by name; any memory layout (transposed arrays are copied).
      metadata: texts for the entry ``__metadata__`` of the header.

    Raises:
      InputError: safetensors has no such dtype.

    >>> decode(encode({"a": np.eye(2, dtype=np.float32).T}), "example")["a"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, offset = [], 0
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.newbyteorder("=") not in _NAMES:
            raise InputError(f"{name} is {array.dtype}, which safetensors cannot store: cast it in the model")
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes("C")
        end = offset + len(data)
        header[name] = {
            "dtype": _NAMES[array.dtype.newbyteorder("=")],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        parts.append(data)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # arrays start at a multiple of eight bytes
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def decode(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Return the arrays of safetensors bytes by name: read-only views of ``data``.

    Args:
      data: of the entire file.
      where: the file, for messages.

    Raises:
      InputError: the bytes are not valid safetensors: a header beyond its bounds, an unknown dtype, arrays
        that overlap, leave bytes unused or do not fit their shape.
    """
    header, start = _read_header(data, where)
    arrays: dict[str, np.ndarray] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = _check_entry(entry, f"{where}: array {name!r}")
        size = math.prod(shape) * dtype.itemsize
        if end - begin != size or end > len(data) - start:
            raise InputError(
                f"{where}: array {name!r} takes {size} bytes and has {end - begin}: it is damaged"
            )
        spans.append((begin, end))
        flat = np.frombuffer(data, dtype, math.prod(shape), start + begin)
        arrays[name] = flat.reshape(shape)
    _check_spans(spans, len(data) - start, where)
    return arrays


def _read_header(data: bytes, where: str) -> tuple[dict[str, Any], int]:
    """Return the header, and where the arrays start."""
    if len(data) < 8:
        raise InputError(f"{where} is too short for safetensors: it is damaged")
    length = struct.unpack("<Q", data[:8])[0]
    if length > min(HEADER_LIMIT, len(data) - 8):
        raise InputError(f"{where}: its header of {length} bytes is longer than the file: it is damaged")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: its header is not valid JSON: it is damaged") from error
    if not isinstance(header, dict):
        raise InputError(f"{where}: its header is not a JSON object: it is damaged")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name appears twice")
    return names


def _check_entry(entry: Any, what: str) -> tuple[np.dtype[Any], tuple[int, ...], tuple[int, int]]:
    """Return dtype, shape and offsets of an entry of the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{what} needs dtype, shape and data_offsets: it is damaged")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"{what} has the dtype {str(name)[:20]}, which is not supported")
    numbers = isinstance(shape, list) and isinstance(offsets, list)
    if not numbers or not all(type(n) is int and 0 <= n < 2**63 for n in [*shape, *offsets]):
        raise InputError(f"{what} has a shape or offsets that are no list of sizes: it is damaged")
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{what} has a shape or offsets out of range: it is damaged")
    return DTYPES[name], tuple(shape), (offsets[0], offsets[1])


def _check_spans(spans: Iterable[tuple[int, int]], total: int, where: str) -> None:
    """Check that the arrays lie side by side, without holes, and fill the file."""
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise InputError(f"{where}: its arrays overlap or leave a hole: it is damaged")
        position = end
    if position != total:
        raise InputError(f"{where}: its arrays end at byte {position} of {total}: it is damaged")
