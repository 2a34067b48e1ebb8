"""Shared by the data tests: small data sets in their original format and in TFDS's layout."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrain.data.prepare import originals


def real_data(name: str) -> Path:
    """Return a folder of real data, or skip the test and say where it was expected."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("JAXTRAIN_TEST_DATA") or default).resolve() / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in {folder.parent}: set JAXTRAIN_TEST_DATA to where it is")
    return folder


def tiny_files(name: str, records: int = 6) -> dict[str, bytes]:
    """Return synthetic files in the original format of data set ``name``, ``records`` examples each."""
    rng = np.random.default_rng(7)

    def noise(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, np.uint8)

    def labels(classes: int) -> np.ndarray:
        return (np.arange(records, dtype=np.uint8) * 3 % classes)[:, None]

    files = {}
    for member in originals.ORIGINALS[name].members:
        if member.name.endswith("names.txt"):
            count = 20 if "coarse" in member.name else 100
            data = "\n".join(f"{member.name[0]}{i}" for i in range(count)).encode() + b"\n\n"
        elif name == "cifar10":
            data = np.hstack([labels(10), noise(records, 3072)]).tobytes()
        elif name == "cifar100":
            data = np.hstack([labels(20), labels(100), noise(records, 3072)]).tobytes()
        elif "images" in member.name:
            head = np.array([0x803, records, 28, 28], ">u4").tobytes()
            data = head + noise(records, 784).tobytes()
        else:
            data = np.array([0x801, records], ">u4").tobytes() + labels(10).tobytes()
        files[member.name] = data
    return files


def patch_checksums(monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes]) -> None:
    """Replace the sizes and checksums of the originals by those of synthetic ``files``."""
    members = tuple(
        originals.Member(key, len(data), hashlib.md5(data, usedforsecurity=False).hexdigest())
        for key, data in files.items()
    )
    original = dataclasses.replace(originals.ORIGINALS[name], members=members)
    monkeypatch.setitem(originals.ORIGINALS, name, original)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def write_tfds(root: Path, name: str, features: Any, **splits: Iterable[Mapping[str, Any]]) -> None:
    """Write a small data set with TFDS itself, without TensorFlow."""
    import tensorflow_datasets as tfds

    data_set, spec = name, tfds.features.FeaturesDict(features)

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore
        name = data_set
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=spec)

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: enumerate(examples) for split, examples in splits.items()}

        def _generate_examples(self) -> Any:
            raise NotImplementedError

    tfds.disable_progress_bar()
    Builder(data_dir=root, file_format="array_record").download_and_prepare()


def check_fresh_process(sources: Sequence[Any], folder: Path, python: Any) -> None:
    """Check that sources pickle as their settings, and that another process reads the same from them."""
    sources = list(sources)
    assert [pickle.loads(pickle.dumps(s)) for s in sources] == sources and len({*sources}) == len(sources)
    expected = [s.gather(np.arange(len(s))) for s in sources]  # before pickling: no data may be pickled
    (folder / "in").write_bytes(pickle.dumps(sources))
    assert (folder / "in").stat().st_size < 2000
    script = (
        "import pickle, sys, numpy as np\n"
        "sources = pickle.load(open('in', 'rb'))\n"
        "batches = [s.gather(np.arange(len(s))) for s in sources]\n"
        "assert not {'tensorflow', 'pandas'} & sys.modules.keys()\n"
        "pickle.dump(batches, open('out', 'wb'))\n"
    )
    done = python("-W", "ignore", "-c", script)
    assert done.returncode == 0, done.stderr
    for one, other in zip(expected, pickle.loads((folder / "out").read_bytes()), strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])
