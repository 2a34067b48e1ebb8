"""jaxtrain.data.decoded_cache: decoded arrays are loaded from disk the next time, if undamaged."""

from __future__ import annotations

import dataclasses
import os
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from fixtures_data import write_tfds

from jaxtrain.data import TFDS, decoded_cache, in_memory

FIELDS = {"image": np.arange(24, dtype=np.uint8).reshape(4, 3, 2), "label": np.array([3, 1, 2, 0], np.int32)}


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(decoded_cache, "MIN_SECONDS", 0.0)
    return tmp_path / "caches" / "jaxtrain" / "decoded"


class Decoder:
    def __init__(self, fields=FIELDS):
        self.fields, self.calls = fields, 0

    def __call__(self):
        self.calls += 1
        return self.fields


def read(decode, fingerprint="ab"):
    found = decoded_cache.load_or_decode(fingerprint, decode)
    assert found.keys() == FIELDS.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, FIELDS[name])
        assert array.dtype == FIELDS[name].dtype
    return decode.calls


def test_decoded_once(home):
    decode = Decoder()
    assert [read(decode), read(decode), read(decode, "cd")] == [1, 1, 2]
    assert sorted(path.name for path in home.iterdir()) == ["ab", "cd"]
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "about"])
def test_damaged_arrays_are_decoded_again(damage, home):
    decode = Decoder()
    read(decode)
    path = home / "ab" / ("about.json" if damage == "about" else "0.npy")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-3], "gone": data, "about": b"[]"}[damage])
    if damage == "gone":
        path.unlink()
    assert [read(decode), read(decode)] == [2, 2]


def test_fast_decoding_is_not_cached(home, monkeypatch):
    monkeypatch.setattr(decoded_cache, "MIN_SECONDS", 60.0)
    assert [read(Decoder()), read(Decoder())] == [1, 1] and list(home.iterdir()) == []


def test_no_cache_when_disabled_or_unsafe(home, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXTRAIN_CACHE", "off")
    decode = Decoder()
    assert [read(decode), read(decode)] == [1, 2] and not home.exists()
    monkeypatch.delenv("JAXTRAIN_CACHE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [read(decode), read(decode)] == [3, 4]
    home.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    home.chmod(0o777)  # other users could write to it
    assert [read(decode), read(decode)] == [5, 6]


def test_least_recently_used_are_removed_first(home):
    for k, name in enumerate("abc"):
        read(Decoder(), name)
        os.utime(home / name, (1000 + k, 1000 + k))
    read(Decoder(), "a")
    (home / ".part-x").mkdir()  # left by a killed process
    os.utime(home / ".part-x", (0, 0))
    size = sum(file.stat().st_size for file in (home / "a").iterdir())
    decoded_cache._trim(home, 2 * size)
    assert sorted(path.name for path in home.iterdir()) == ["a", "c"]


def test_cache_key_depends_on_split_and_files(home, tmp_path):
    features = {"x": tfds.features.Tensor(shape=(2,), dtype=np.float32)}
    rows = [{"x": np.full(2, k, np.float32)} for k in range(3)]
    write_tfds(tmp_path / "data", "small", features, train=rows, test=rows)
    train, test = (TFDS("small", split, str(tmp_path / "data")) for split in ("train", "test"))
    assert train.cache_key() == dataclasses.replace(train).cache_key() != test.cache_key()
    before = in_memory(train, 10**9).fields
    assert [path.name for path in home.iterdir()] == [train.cache_key()]
    again = in_memory(train, 10**9).fields
    for fields in (before, again):
        assert sorted(fields["x"][:, 0].tolist()) == [0, 1, 2] and fields["x"].dtype == np.float32
    (path,) = (tmp_path / "data").rglob("*train*array_record*")
    os.utime(path, (time.time(), 12345))  # rewritten
    np.testing.assert_array_equal(in_memory(train, 10**9).fields["x"], before["x"])
    assert len(list(home.iterdir())) == 2
