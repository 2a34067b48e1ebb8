"""CIFAR-10 and MNIST themselves: prepared bit for bit as TensorFlow would, read, and trained on."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from fixtures_data import real_data
from test_data_prepare import everything, stock_order

from jaxtrain import run
from jaxtrain.data.prepare import prepare
from jaxtrain.data.tfds import TFDS


@pytest.fixture(scope="module")
def cifar10_originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the original CIFAR-10 .bin files."""
    script = real_data("cifar10").parent / "unpack.py"
    spec = importlib.util.spec_from_file_location("unpack", script)
    assert spec is not None and spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    folder = tmp_path_factory.mktemp("originals") / "cifar-10-batches-bin"
    folder.mkdir()
    with np.load(unpack.HERE / "labels.npz") as labels:
        for i in range(5):
            part = labels["train"][10_000 * i : 10_000 * (i + 1)]
            blocks = range(10 * i, 10 * i + 10)
            data = unpack.records("train", blocks, part)
            (folder / f"data_batch_{i + 1}.bin").write_bytes(data)
        data = unpack.records("test", range(10), labels["test"])
        (folder / "test_batch.bin").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def cifar10_dir(cifar10_originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS data_dir that holds the real CIFAR-10."""
    root = tmp_path_factory.mktemp("cifar10")
    prepare("cifar10", data_dir=root, source=cifar10_originals)
    return root


@pytest.fixture(scope="module")
def mnist_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS data_dir that holds the real MNIST."""
    source = real_data("mnist")
    root = tmp_path_factory.mktemp("mnist")
    prepare("mnist", data_dir=root, source=source)
    return root


@pytest.mark.full("tests/data/test_data_prepare.py::test_originals_match_the_stock_builders")
def test_cifar10_is_bit_exact(cifar10_originals: Path, cifar10_dir: Path) -> None:
    batches = [cifar10_originals / f"data_batch_{i}.bin" for i in range(1, 6)]
    for split, paths in (("train", batches), ("test", [cifar10_originals / "test_batch.bin"])):
        raw = np.concatenate([np.fromfile(p, np.uint8) for p in paths]).reshape(-1, 3073)
        order = stock_order(split, len(raw))
        got = everything("cifar10", split, cifar10_dir)
        assert got["label"].dtype == np.int32
        np.testing.assert_array_equal(got["label"], raw[order, 0])
        images = raw[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        assert np.array_equal(got["image"], images[order])
    # As TensorFlow's own preparation gives them.
    assert stock_order("train", 50_000)[:3].tolist() == [16399, 1680, 47917]


@pytest.mark.full("tests/data/test_data_prepare.py::test_originals_match_the_stock_builders")
def test_mnist_is_bit_exact(mnist_dir: Path) -> None:
    # The shared files were gzipped anew: what counts is what is inside.
    for split, count, md5 in (
        ("train", 60_000, "6bbc9ace898e44ae57da46a324031adb"),
        ("test", 10_000, "2646ac647ad5339dbf082846283269ea"),
    ):
        got = everything("mnist", split, mnist_dir)
        back = np.argsort(stock_order(split, count))
        head = np.array([0x803, count, 28, 28], ">u4").tobytes()
        assert hashlib.md5(head + got["image"][back].tobytes()).hexdigest() == md5
        if split == "train":
            assert got["label"][:10].tolist() == [4, 1, 0, 7, 8, 1, 2, 7, 1, 6]
            assert got["label"][back][:4].tolist() == [5, 0, 4, 1]


@pytest.mark.full("tests/data/test_data_prepare.py::test_originals_match_the_stock_builders")
def test_plain_tfds_reads_it(cifar10_dir: Path) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=cifar10_dir)
    assert builder.is_prepared()
    assert type(builder).__module__ == "tensorflow_datasets.image_classification.cifar"
    example = builder.as_data_source("train")[0]
    assert example["id"] == b"train_16399"
    mine = TFDS("cifar10", "train", data_dir=str(cifar10_dir)).gather(np.array([0]))
    assert np.array_equal(example["image"], mine["image"][0])
    assert builder.info.features["label"].names[example["label"]] == "horse"


@pytest.mark.full("tests/cli/test_cli.py::test_run_twice_then_new_then_evaluate")
def test_cifar_cnn_passes_its_smoke_test(
    cifar10_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(cifar10_dir))
    experiment = str(ROOT / "experiments" / "cifar_cnn.py")
    assert run.main(["--experiment", experiment, "--smoke", "--set", "batch=64"]) == 0
    assert "smoke test of cifar_cnn passed" in capsys.readouterr().out
