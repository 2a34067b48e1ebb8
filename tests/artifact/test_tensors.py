"""safetensors bytes: those of the safetensors package, both ways, and nothing else."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from jaxtrain import InputError
from jaxtrain.artifact import tensors

safetensors = pytest.importorskip("safetensors.numpy")

ARRAYS = {
    "kernel": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "scalar": np.float64(3),
    "empty": np.zeros((0, 3), np.int8),
    "big_endian": np.arange(3, dtype=">i4"),
    "half": np.array([[1.5, -2]], np.float16),
    "flags": np.array([True, False]),
    "bytes": np.arange(5, dtype=np.uint8)[::-1],
    "long": np.array([2**40], np.int64),
}


def test_the_safetensors_package_reads_what_we_write(tmp_path):
    data = tensors.encode({**ARRAYS, "brain": np.array([1, 2], ml_dtypes.bfloat16)}, {"step": "7"})
    from safetensors import deserialize, safe_open

    parts = dict(deserialize(data))
    brain = parts.pop("brain")
    assert (brain["dtype"], brain["shape"]) == ("BF16", [2])
    assert np.frombuffer(bytes(brain["data"]), ml_dtypes.bfloat16).tolist() == [1, 2]
    read = safetensors.load(tensors.encode(ARRAYS))
    for name, array in ARRAYS.items():
        assert read[name].shape == np.shape(array)
        np.testing.assert_array_equal(read[name], array)

    (tmp_path / "a.safetensors").write_bytes(data)
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata() == {"step": "7"}


def test_we_read_what_the_safetensors_package_writes():
    arrays = {
        name: np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
        for name, array in ARRAYS.items()
    }
    arrays["brain"] = np.array([1, 2], ml_dtypes.bfloat16)
    read = tensors.decode(safetensors.save(arrays, {"a": "b"}), "it")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


def header(entries: object, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="U8", shape=(2,), offsets=(0, 2)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        (struct.pack("<Q", 2**63) + b"{}", "longer than the file"),
        (header(b"[1"), "not valid JSON"),
        (header(b"[" * 100_000), "not valid JSON"),
        (header([]), "not a JSON object"),
        (header(b'{"a": {}, "a": {}}'), "not valid JSON"),
        (header({"a": 1}), "needs dtype"),
        (header({"a": entry("O")}, b"12"), "dtype O"),
        (header({"a": entry(["U8"])}, b"12"), "not supported"),
        (header({"a": entry(shape=[-1])}, b"12"), "no list of sizes"),
        (header({"a": entry(shape=[2.0])}, b"12"), "no list of sizes"),
        (header({"a": entry(shape=[True, 2])}, b"12"), "no list of sizes"),
        (header({"a": entry(shape=[1] * 33)}, b"12"), "out of range"),
        (header({"a": entry(shape=[2**40, 2**40])}, b"12"), "takes"),
        (header({"a": entry(offsets=[2, 0])}, b"12"), "out of range"),
        (header({"a": entry(offsets=[0, 2, 2])}, b"12"), "out of range"),
        (header({"a": entry()}, b"1"), "takes 2 bytes"),
        (header({"a": entry()}, b"123"), "end at byte 2 of 3"),
        (header({"a": entry(), "b": entry(offsets=[1, 3])}, b"123"), "overlap"),
        (header({"a": entry(), "b": entry(offsets=[3, 5])}, b"12345"), "hole"),
    ],
)
def test_damaged_bytes_are_refused_in_one_line(data, message):
    with pytest.raises(InputError, match=message) as error:
        tensors.decode(data, "weights")
    assert "\n" not in str(error.value)


def test_a_dtype_without_a_name_is_refused():
    with pytest.raises(InputError, match="complex64, which safetensors cannot store"):
        tensors.encode({"a": np.zeros(2, np.complex64)})
