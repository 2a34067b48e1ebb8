"""jaxtrain.data.sources: the examples of each source, as a pure function of the ids."""

from __future__ import annotations

import collections
import dataclasses
import zlib
from typing import Any

import numpy as np
import pytest

from jaxtrain.core.errors import InputError
from jaxtrain.data import Arrays, Digits, Source, Subset, Synthetic, in_memory

SMALL = Synthetic(n=60, shape=(6, 5, 2), classes=3)
SOURCES = {
    "arrays": Arrays({"image": np.arange(240, dtype=np.uint8).reshape(60, 4), "label": np.arange(60)}),
    "subset": Subset(SMALL, np.arange(59, 0, -2)),
    "digits": Digits(),
    "synthetic": SMALL,
}


@pytest.mark.parametrize("name", SOURCES)
def test_gather_does_not_depend_on_the_batch(name: str) -> None:
    source = SOURCES[name]
    assert isinstance(source, Source)
    full = source.gather(np.arange(len(source)))
    for ids in ([3], [5, 3, 5], [len(source) - 1, 0], []):
        part = source.gather(np.array(ids, np.int64))
        assert part.keys() == full.keys()
        for field, array in part.items():
            np.testing.assert_array_equal(array, full[field][ids])
            assert array.dtype == full[field].dtype


def everything(split: Any) -> dict[str, np.ndarray]:
    source = Digits(split)
    return source.gather(np.arange(len(source)))


def test_digits_split_is_fixed_and_stratified() -> None:
    train, test = everything("train"), everything("test")
    assert (len(train["label"]), len(test["label"])) == (1437, 360)
    in_train, in_test = np.bincount(train["label"]), np.bincount(test["label"])
    assert np.all(np.abs(in_test - (in_train + in_test) / 5) <= 1)


def test_digits_splits_partition_scikit_learns_digits() -> None:
    from sklearn.datasets import load_digits

    def count(images: np.ndarray, labels: np.ndarray) -> collections.Counter[Any]:
        assert images.dtype == np.uint8
        rows = zip(images.reshape(-1, 64), labels.tolist(), strict=True)
        return collections.Counter((image.tobytes(), label) for image, label in rows)

    data, (train, test) = load_digits(), (everything("train"), everything("test"))
    ours = count(train["image"], train["label"]) + count(test["image"], test["label"])
    assert ours == count(data.images.astype(np.uint8), data.target)
    assert train["image"].shape == (1437, 8, 8, 1) and train["label"].dtype == np.int32


@pytest.mark.parametrize(
    ("split", "image", "label"), [("train", 4001954015, 1135185960), ("test", 651833596, 2879433992)]
)
def test_digits_split_never_changes(split: Any, image: int, label: int) -> None:
    """Never update these: every measured accuracy on the digits is on this split."""
    data = everything(split)
    assert zlib.crc32(data["image"].tobytes()) == image
    assert zlib.crc32(data["label"].astype("<i4").tobytes()) == label


def test_digits_have_no_other_split() -> None:
    with pytest.raises(InputError, match="train and test, not 'valid'"):
        Digits("valid")  # type: ignore[arg-type]


def test_gathered_batch_is_a_copy() -> None:
    Digits().gather(np.arange(2))["image"][:] = 99
    assert Digits().gather(np.arange(2))["image"].max() <= 16


@pytest.mark.parametrize(
    "fields",
    [
        {"image": np.zeros((3, 2)), "label": np.zeros(4)},
        {"image": np.zeros((0, 2)), "label": np.zeros(0)},
        {"label": []},
        {},
        {"image": np.zeros((3, 2)), "temperature": 4.0},
    ],
    ids=["two lengths", "empty", "empty list", "no fields", "a scalar"],
)
def test_arrays_without_one_common_length_are_refused(fields: Any) -> None:
    with pytest.raises(InputError, match="one common length of at least 1"):
        Arrays(fields)


def test_arrays_convert_lists_and_copy_the_dict() -> None:
    fields: dict[str, Any] = {"label": [3, 1, 2]}
    source = Arrays(fields)
    fields["late"] = [0]
    assert len(source) == 3
    assert {k: v.tolist() for k, v in source.gather(np.array([2, 0])).items()} == {"label": [2, 3]}


def test_subset_of_a_subset() -> None:
    full = Arrays({"label": np.arange(10) * 10})
    inner = Subset(full, np.array([9, 7, 5, 3, 1]))
    outer = Subset(inner, np.array([4, 0]))
    assert len(outer) == 2
    assert outer.gather(np.array([0, 1, 1]))["label"].tolist() == [10, 90, 90]


def test_synthetic_is_deterministic() -> None:
    ids = np.arange(60)
    first, again = SMALL.gather(ids), dataclasses.replace(SMALL).gather(ids)
    np.testing.assert_array_equal(first["image"], again["image"])
    test = dataclasses.replace(SMALL, split="test").gather(ids)
    assert not np.any((first["image"] == test["image"]).all((1, 2, 3)))
    assert first["image"].dtype == np.uint8 and first["label"].dtype == np.int32


def test_synthetic_generalises_between_splits() -> None:
    train = Synthetic(n=200, shape=(8, 8, 1)).gather(np.arange(200))
    test = Synthetic(n=100, shape=(8, 8, 1), split="test").gather(np.arange(100))
    means = np.stack([train["image"][train["label"] == c].mean(0) for c in range(10)])
    distance = ((test["image"][:, None] - means[None]) ** 2).sum((2, 3, 4))
    assert np.mean(distance.argmin(1) == test["label"]) > 0.95
    raw = test["image"].astype(int).reshape(100, -1)
    assert len(np.unique(raw, axis=0)) == 100, "examples of a class differ"


CASES: dict[type, dict[str, Any]] = {
    Arrays: {"fields": {"image": np.ones((4, 2))}},
    Subset: {"source": Synthetic(n=9), "indices": np.array([3, 1])},
    Digits: {"split": "test"},
    Synthetic: {"n": 7, "shape": (4, 4, 1), "classes": 4, "seed": 1, "split": "test"},
}
BASES: dict[type, Any] = {
    Arrays: Arrays({"image": np.zeros((4, 2))}),
    Subset: Subset(SMALL, np.array([0, 1])),
    Digits: Digits(),
    Synthetic: SMALL,
}
FIELDS = [(cls, f.name) for cls in CASES for f in dataclasses.fields(cls)]


def contents(source: Source) -> str:
    rows = source.gather(np.arange(len(source)))
    return repr({k: (v.shape, zlib.crc32(v.tobytes())) for k, v in rows.items()})


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_field_of_a_source_changes_its_examples(cls: type, field: str) -> None:
    changed = dataclasses.replace(BASES[cls], **{field: CASES[cls][field]})
    assert contents(changed) != contents(BASES[cls])


@pytest.mark.parametrize("source", [SMALL, SOURCES["arrays"]], ids=["made", "arrays"])
def test_in_memory_respects_the_limit(source: Any) -> None:
    full = source.gather(np.arange(60))
    size = sum(array.nbytes for array in full.values())
    loaded = in_memory(source, size)
    assert isinstance(loaded, Arrays)
    for name, array in full.items():
        np.testing.assert_array_equal(loaded.fields[name], array)
    assert in_memory(source, size - 1) is None


def test_in_memory_does_not_read_large_sources() -> None:
    class Huge:
        def __len__(self) -> int:
            return 10**12

        def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            assert len(indices) == 1, "one example is enough to know the size"
            return {"image": np.zeros((1, 100), np.uint8)}

    assert in_memory(Huge(), 10**9) is None
