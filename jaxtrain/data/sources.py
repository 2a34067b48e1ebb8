"""Sources of raw examples: ``len(source)`` and ``source.gather(indices)``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.data import decoded_cache


@runtime_checkable
class Source(Protocol):
    """Random-access examples. Any object with these two methods is a source.

    ``gather`` takes int64 ``[k]`` ids in ``[0, len)`` and returns named raw arrays with leading axis k:
    pixels stay uint8, tokens stay integers; casting and normalising happen on the device. It must be a pure
    function of the ids and may be called from several threads.

    A source that augments its training examples on the host, such as random crops of JPEG files, also has
    ``draw(indices, epochs, seed)``: the same fields, a pure function of its arguments (``epochs: int64 [k]``
    is the epoch in which each example is seen). Training uses ``draw``, evaluation ``gather``.

    A source that computes its splits itself may name in ``shared`` the settings that must be equal in all
    splits of a run, such as the file that is split.

    A run records what its data are, and refuses to resume on other data. A source may have ``fingerprint()``,
    which returns a str that differs when its examples differ, such as a version or a checksum. Without it,
    checksums of examples are compared: of all where they are in memory, else of some (``data.identity``).
    """

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Arrays:
    """Examples in memory.

    Attributes:
      fields: named arrays with a common leading axis of at least 1.

    >>> source = Arrays({"image": np.zeros((10, 8, 8, 1), np.uint8), "label": np.arange(10)})
    >>> source.gather(np.array([3]))["label"]
    array([3])
    """

    fields: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", {k: np.asarray(v) for k, v in self.fields.items()})
        lengths = {name: len(array) if array.ndim else 0 for name, array in self.fields.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise InputError(f"Arrays need one common length of at least 1, not {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows ``indices`` of every field."""
        return {name: array[indices] for name, array in self.fields.items()}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Subset:
    """Some examples of another source, in the order of ``indices: int64 [k]``."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples ``self.indices[indices]`` of the source."""
        return self.source.gather(self.indices[indices])

    def __getattr__(self, name: str) -> Any:
        if name != "draw":
            raise AttributeError(name)
        draw = getattr(self.source, "draw")  # noqa: B009 - a subset has draw if its source does
        return lambda ids, epochs, seed: draw(self.indices[ids], epochs, seed)


@dataclasses.dataclass(frozen=True)
class Digits:
    """The 1,797 handwritten digits that come with scikit-learn: uint8 ``[8, 8, 1]`` in 0..16, 10 classes.

    A fixed stratified split: 1,437 for training and 360 for testing. (Digits of one writer may be in both,
    so this is easier than the original split by writers.) Source: Alpaydin & Kaynak 1998, UCI
    "Optical Recognition of Handwritten Digits", its test part.

    >>> len(Digits("train")), len(Digits("test"))
    (1437, 360)
    """

    split: Literal["train", "test"] = "train"

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise InputError(f"Digits has the splits train and test, not {self.split!r}")

    def __len__(self) -> int:
        return 1437 if self.split == "train" else 360

    def example(self) -> dict[str, np.ndarray]:
        """Return zeros in the shapes of one example, without the second that importing scikit-learn takes."""
        return {"image": np.zeros((1, 8, 8, 1), np.uint8), "label": np.zeros(1, np.int32)}

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return ``image: uint8 [k, 8, 8, 1]`` and ``label: int32 [k]``."""
        return {name: array[indices] for name, array in _load_digits(self.split).items()}


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Synthetic images with a learnable class, for tests and benchmarks.

    Each class has a random pattern, and an example is its class's pattern plus noise.

    Attributes:
      n: number of examples.
      shape: of one image, ``(height, width, channel)``.
      classes: number of classes.
      seed: of the patterns and, with ``split``, of the noise.
      split: the two splits share patterns and differ in noise.
    """

    n: int = 1024
    shape: tuple[int, ...] = (32, 32, 3)
    classes: int = 10
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return ``image: uint8 [k, *shape]`` and ``label: int32 [k]``."""
        rng = np.random.default_rng(self.seed)
        patterns = rng.integers(64, 192, (self.classes, *self.shape))
        label = (np.asarray(indices) % self.classes).astype(np.int32)
        stream = (self.seed, self.split == "test")
        noise = [np.random.default_rng((*stream, int(i))).integers(-48, 49, self.shape) for i in indices]
        image = patterns[label] + np.array(noise).reshape(len(label), *self.shape)
        return {"image": image.astype(np.uint8), "label": label}


def in_memory(source: Source, limit: int) -> Arrays | None:
    """Load all of ``source`` into arrays; None if that takes more than ``limit`` bytes or it has ``draw``."""
    if hasattr(source, "draw"):
        return None
    if isinstance(source, Arrays):
        return source if sum(a.nbytes for a in source.fields.values()) <= limit else None
    one = source.gather(np.zeros(1, np.int64))
    if len(source) * sum(a.nbytes for a in one.values()) > limit:
        return None
    cache_key = getattr(source, "cache_key", None)
    if cache_key is None:
        return Arrays(source.gather(np.arange(len(source))))
    return Arrays(decoded_cache.load_or_decode(cache_key(), lambda: source.gather(np.arange(len(source)))))


@functools.cache
def _load_digits(split: str) -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    rows = _digits_rows(data.target)[split]
    return {
        "image": data.images[rows].astype(np.uint8)[..., None],
        "label": data.target[rows].astype(np.int32),
    }


def _digits_rows(target: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of each split: a fifth of every class for testing, rounded to 360 in all."""
    share = np.bincount(target) * 360 / len(target)
    count = np.floor(share).astype(int)
    count[np.argsort(count - share, kind="stable")[: 360 - count.sum()]] += 1
    order = np.argsort(np.random.Philox(key=1797).random_raw(len(target)), kind="stable")
    test = np.concatenate([order[target[order] == c][: count[c]] for c in range(len(count))])
    return {"test": np.sort(test), "train": np.setdiff1d(np.arange(len(target)), test)}
