"""jaxtrain.data.tfds: reading without TensorFlow and without a network."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import multiprocessing
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_data import patch_checksums, tiny_files, write, write_tfds
from PIL import Image

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.data.data_dir import default_data_dir, find_prepared
from jaxtrain.data.prepare import prepare
from jaxtrain.data.tfds import TFDS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with a synthetic CIFAR-10 of 3,000 training and 600 test examples."""
    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        files = tiny_files("cifar10", 600)
        patch_checksums(patch, "cifar10", files)
        prepare("cifar10", data_dir=folder, source=write(folder / "originals", files))
    return folder


def encoded(array: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def test_gather(root: Path) -> None:
    train = TFDS("cifar10", "train", data_dir=str(root))
    assert len(train) == 3000 and train.classes == 10
    assert train.class_names is not None and train.class_names[6] == "frog"
    everything = train.gather(np.arange(3000))
    assert list(everything) == ["image", "label"]  # The text feature "id" is left out.
    assert everything["image"].dtype == np.uint8 and everything["label"].dtype == np.int32
    assert everything["image"].shape == (3000, 32, 32, 3)
    some = np.random.default_rng(0).integers(0, 3000, 1500)  # With repeats, in several chunks.
    for indices in (some, some[:1], some[:0], some.astype(np.uint16)):
        batch = train.gather(indices)
        for key, value in batch.items():
            assert value.dtype == everything[key].dtype
            np.testing.assert_array_equal(value, everything[key][indices])


@pytest.mark.full("tests/data/test_data_tfds.py::test_gather")
def test_splits(root: Path) -> None:
    def labels(split: str) -> np.ndarray:
        source = TFDS("cifar10", split, data_dir=str(root))
        return source.gather(np.arange(len(source)))["label"]

    parts = [labels("train[:90%]"), labels("train[90%:]")]
    assert [len(p) for p in parts] == [2700, 300]
    np.testing.assert_array_equal(np.concatenate(parts), labels("train"))
    assert len(labels("train+test")) == 3600
    for split in ("valid", "train[", "", "train[:0%]"):
        with pytest.raises(InputError, match=r"train, test|is empty"):
            len(TFDS("cifar10", split, data_dir=str(root)))


def test_indices_out_of_range(root: Path) -> None:
    test = TFDS("cifar10", "test", data_dir=str(root))
    for bad in ([600], [-1], [0.5], [[1]], [True]):
        with pytest.raises(IndexError):
            test.gather(np.array(bad))


def test_not_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)  # Network access would fail.
    mnist = TFDS("mnist", data_dir=str(tmp_path))
    assert not mnist.prepared()
    for use in (len, lambda s: s.gather(np.arange(1)), lambda s: s.classes):
        with pytest.raises(InputError, match=f"prepare mnist --data-dir {tmp_path}$"):
            use(mnist)
    with pytest.raises(InputError, match="expected NAME"):
        TFDS("../mnist", data_dir=str(tmp_path)).prepared()


def test_reads_without_network_and_tensorflow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    source = TFDS("cifar10", "test[:7]", data_dir=str(root))
    assert source.prepared() and source.gather(np.arange(7))["image"].any()


def test_default_data_dir(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    assert TFDS("cifar10").prepared() and len(TFDS("cifar10", "test")) == 600
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "tensorflow_datasets"
    assert not TFDS("cifar10").prepared()


def test_versions_configs_and_formats(tmp_path: Path) -> None:
    def put(path: str, kind: str = "array_record") -> Path:
        folder = tmp_path / path
        write(folder, {"features.json": b"{}"})
        (folder / "dataset_info.json").write_text(f'{{"fileFormat": "{kind}"}}')
        return folder

    old, new = put("a/1.9.0"), put("a/1.10.0")
    put("a/incomplete.ABCDEF_2.0.0")
    assert find_prepared("a", tmp_path) == new
    assert find_prepared("a:1.9.0", tmp_path) == old == find_prepared("a:1.9.*", tmp_path)
    assert find_prepared("a:3.0.0", tmp_path) is None
    text = put("b/plain/1.0.0")
    assert find_prepared("b/plain", tmp_path) == text and find_prepared("b", tmp_path) is None
    write(tmp_path / "b" / ".config", {"metadata.json": b'{"default_config_name": "plain"}'})
    assert find_prepared("b", tmp_path) == text
    put("c/1.0.0", "tfrecord")
    with pytest.raises(InputError, match="holds tfrecord files, which need TensorFlow"):
        len(TFDS("c", data_dir=str(tmp_path)))


@pytest.mark.full("tests/data/test_data_tfds.py::test_gather")
def test_source_is_a_picklable_value(root: Path) -> None:
    source = TFDS("cifar10", "test", data_dir=str(root))
    fresh = dataclasses.replace(source)
    before = (repr(source), hash(source), pickle.dumps(source))
    first = source.gather(np.arange(20))
    assert before == (repr(source), hash(source), pickle.dumps(source))
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source == fresh
    np.testing.assert_array_equal(copy.gather(np.arange(20))["image"], first["image"])
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        other = pool.submit(source.gather, np.arange(20)).result(60)
    np.testing.assert_array_equal(other["image"], first["image"])


def test_files_are_opened_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tfds

    opened = []
    real = tfds.builder_from_directory

    def counting(*args: Any, **kwargs: Any) -> Any:
        opened.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(tfds, "builder_from_directory", counting)
    for _ in range(3):
        source = TFDS("cifar10", "train[2:9]", data_dir=str(root))
        assert len(source) == 7 and source.classes == 10 and source.gather(np.arange(7))
    assert len(opened) == 1


@pytest.mark.full("tests/data/test_data_tfds.py::test_gather")
def test_threads(root: Path) -> None:
    train = TFDS("cifar10", "train[1:]", data_dir=str(root))
    rng = np.random.default_rng(1)
    requests = [rng.integers(0, 2999, 700) for _ in range(16)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # The first calls open the files.
        batches = list(pool.map(train.gather, requests))
    everything = train.gather(np.arange(2999))
    for indices, batch in zip(requests, batches, strict=True):
        assert np.array_equal(batch["image"], everything["image"][indices])
        assert np.array_equal(batch["label"], everything["label"][indices])


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damage_is_detected(damage: str, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "cifar10", tmp_path / "cifar10")
    (path,) = tmp_path.rglob("cifar10-test.array_record*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": data, "cut": data[: len(data) // 2]}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    test = TFDS("cifar10", "test", data_dir=str(tmp_path))
    with pytest.raises(RunError, match="run: python -m jaxtrain prepare cifar10") as caught:
        # A missing file is detected before any example is read.
        len(test) if damage == "gone" else test.gather(np.arange(600))
    assert "\n" not in str(caught.value)


def test_other_features(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (4, 8, 6), np.uint8)
    features = tfds.features.FeaturesDict(
        {
            "picture": tfds.features.Image(shape=(8, 6, 3)),
            "score": np.float32,
            "text": tfds.features.Text(),
            "box": {"corners": tfds.features.Tensor(shape=(2, 2), dtype=np.int64), "who": np.str_},
        }
    )
    examples = [
        {
            # A grey file among RGB ones.
            "picture": encoded(image if i % 2 else np.stack([image] * 3, -1)),
            "score": i / 2,
            "text": "x",
            "box": {"corners": [[i, 1], [2, 3]], "who": "y"},
        }
        for i, image in enumerate(images)
    ]
    write_tfds(tmp_path, "odd", features, train=examples)
    odd = TFDS("odd", data_dir=str(tmp_path))
    assert odd.classes is None and odd.class_names is None
    got = odd.gather(np.arange(4))
    assert set(got) == {"picture", "score", "box/corners"}
    order = (got["score"] * 2).astype(int)
    assert sorted(order) == [0, 1, 2, 3] and got["score"].dtype == np.float32
    assert np.array_equal(got["picture"], np.stack([images[order]] * 3, -1))
    assert np.array_equal(got["box/corners"][:, 0, 0], order)


def test_shapes_that_differ(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"photo": tfds.features.Image(), "label": np.int64})
    sizes = [(4, 4, 3)] * 700 + [(4, 5, 3)]
    examples = [{"photo": encoded(np.zeros(s, np.uint8), "jpeg"), "label": 0} for s in sizes]
    write_tfds(tmp_path, "photos", features, train=examples)
    photos = TFDS("photos", data_dir=str(tmp_path))
    with pytest.raises(InputError, match="feature 'photo' differs in shape") as caught:
        photos.gather(np.arange(701))
    assert "(4, 4, 3), (4, 5, 3)" in str(caught.value)
    assert photos.classes is None


@pytest.mark.full("tests/cli/test_cli.py::test_importing_jaxtrain_loads_nothing_heavy")
def test_importing_is_cheap() -> None:
    code = (
        "import sys, jaxtrain.data.tfds, jaxtrain.data.prepare;"
        "print([m for m in ('tensorflow_datasets', 'tensorflow', 'PIL') if m in sys.modules])"
    )
    repo = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
