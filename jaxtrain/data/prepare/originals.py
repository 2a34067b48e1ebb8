"""The original files of the small image sets, prepared without TensorFlow: ``ORIGINALS``.

Each entry has the size and checksum of every file, and the parser from bytes to arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError

# Yields (key, example). Keys are those of the stock TFDS builder, which orders examples by their hash.
Examples = Generator[tuple[int | str, Mapping[str, Any]], None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSetInfo:
    """Metadata of a data set; names and versions are those of the stock TFDS builder.

    Attributes:
      config: the part of the name after the slash, or None.
      default_config: the config that the name without a config means in TFDS.
      supervised: the input feature and the target feature.
    """

    name: str
    version: str
    description: str
    homepage: str
    citation: str
    config: str | None = None
    default_config: str | None = None
    supervised: tuple[str, str] | None = ("image", "label")

    @property
    def full(self) -> str:
        """The name with the config."""
        return f"{self.name}/{self.config}" if self.config else self.name


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of an original distribution, gzipped or not.

    Attributes:
      name: its base name, without ``.gz``.
      size: bytes, decompressed; None if it is not known.
      digest: md5 (32 hex digits) or sha1 (40) of the decompressed bytes; None if it is not known.
    """

    name: str
    size: int | None = None
    digest: str | None = None

    def problem(self, data: bytes) -> str | None:
        """Return why ``data`` is not this file, or None.

        >>> Member("a.bin", 3).problem(b"four")
        'a.bin is not the original: expected 3 bytes, found more'
        """
        if self.size is not None and len(data) != self.size:
            found = f"{len(data)}" if len(data) < self.size else "more"
            return f"{self.name} is not the original: expected {self.size} bytes, found {found}"
        if self.digest is None:
            return None
        kind = "md5" if len(self.digest) == 32 else "sha1"
        found = hashlib.new(kind, data, usedforsecurity=False).hexdigest()
        if found == self.digest:
            return None
        return f"{self.name} is not the original: expected {kind} {self.digest}, found {found}"


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split in original order: images uint8 [n, h, w, c], labels uint8 [n]."""

    images: np.ndarray
    labels: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A parsed data set: its splits, and the class names of each label (a count if unnamed)."""

    splits: Mapping[str, Split]
    classes: Mapping[str, tuple[str, ...] | int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Original(DataSetInfo):
    """A small data set as published: read into memory, every file checked.

    Attributes:
      members: the required files.
      parse: from the contents of the members by name to arrays.
      pickled: file names of the authors' Python-pickle version, which is refused.
      shape: of one image, [height, width, channel].
      examples: their number by split.
      ids: whether examples have the feature ``id`` of the stock TFDS builder.
    """

    members: tuple[Member, ...]
    parse: Callable[[Mapping[str, bytes]], Parsed]
    shape: tuple[int, int, int]
    examples: Mapping[str, int]
    pickled: tuple[str, ...] = ()
    ids: bool = False


_CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"


def _cifar(
    files: Mapping[str, bytes],
    splits: Mapping[str, tuple[str, ...]],
    classes: Mapping[str, tuple[str, ...] | int],
) -> Parsed:
    """Parse records of one byte per label, then 1,024 bytes each of red, green and blue."""
    keys, parsed = list(classes), {}
    for split, names in splits.items():
        raw = np.frombuffer(b"".join(files[name] for name in names), np.uint8)
        rows = raw.reshape(-1, len(keys) + 3 * 32 * 32)
        images = rows[:, len(keys) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parsed[split] = Split(images, {key: rows[:, i] for i, key in enumerate(keys)})
    return Parsed(parsed, classes)


def _cifar10(files: Mapping[str, bytes]) -> Parsed:
    train = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
    classes = {"label": tuple(_CIFAR10_NAMES.split())}
    return _cifar(files, {"train": train, "test": ("test_batch.bin",)}, classes)


def _cifar100(files: Mapping[str, bytes]) -> Parsed:
    classes = {}
    for key, name, count in (
        ("coarse_label", "coarse_label_names.txt", 20),
        ("label", "fine_label_names.txt", 100),
    ):
        classes[key] = tuple(files[name].decode("ascii", "replace").split())
        if len(set(classes[key])) != count:
            raise InputError(f"{name}: expected {count} different class names")
    return _cifar(files, {"train": ("train.bin",), "test": ("test.bin",)}, classes)


def _idx(name: str, data: bytes, rank: int) -> np.ndarray:
    """Parse an idx file of bytes: two zeros, type 8, the rank, the big-endian sizes, the values."""
    head = 4 + 4 * rank
    shape = np.frombuffer(data[4:head], ">u4").astype(int)
    if data[:4] != bytes((0, 0, 8, rank)) or len(data) != head + int(shape.prod()):
        raise InputError(f"{name}: not an idx file of bytes with {rank} axes")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def _mnist(files: Mapping[str, bytes], classes: tuple[str, ...] | int = 10) -> Parsed:
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        image_file, label_file = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
        images, labels = _idx(image_file, files[image_file], 3), _idx(label_file, files[label_file], 1)
        if len(images) != len(labels):
            raise InputError(f"{image_file} has {len(images)} images, {label_file} {len(labels)} labels")
        splits[split] = Split(images[..., None], {"label": labels})
    return Parsed(splits, {"label": classes})


def _fashion(files: Mapping[str, bytes]) -> Parsed:
    names = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
    return _mnist(files, tuple(names.split(",")))


def _idx_members(*digests: str) -> tuple[Member, ...]:
    return tuple(
        Member(name, size, digest)
        for (name, size), digest in zip(
            {
                "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
                "train-labels-idx1-ubyte": 8 + 60_000,
                "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
                "t10k-labels-idx1-ubyte": 8 + 10_000,
            }.items(),
            digests,
            strict=True,
        )
    )


_KRIZHEVSKY = (
    "@techreport{krizhevsky2009learning, author={Alex Krizhevsky}, year={2009}, "
    "title={Learning multiple layers of features from tiny images}}"
)

# Checksums are of the decompressed files, so a file that was gzipped again still matches.
ORIGINALS: dict[str, Original] = {
    original.name: original
    for original in (
        Original(
            name="cifar10",
            version="3.0.2",
            description="60,000 colour images of 32 x 32 pixels in 10 classes (CIFAR-10).",
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            citation=_KRIZHEVSKY,
            members=tuple(
                Member(name, 10_000 * 3073, md5)
                for name, md5 in {
                    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
                    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
                }.items()
            ),
            parse=_cifar10,
            shape=(32, 32, 3),
            examples={"train": 50_000, "test": 10_000},
            pickled=("cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1"),
            ids=True,
        ),
        Original(
            name="cifar100",
            version="3.0.2",
            description="60,000 colour images of 32 x 32 pixels in 100 classes, grouped into 20.",
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            citation=_KRIZHEVSKY,
            # The authors publish no md5 of these. The sha1 are those with which Apache MXNet's
            # gluon.data.vision.CIFAR100 checks its downloads; its six sha1 for CIFAR-10 equal those of
            # the original files. None is known for the lists of names.
            members=(
                Member("train.bin", 50_000 * 3074, "e207cd2e05b73b1393c74c7f5e7bea451d63e08e"),
                Member("test.bin", 10_000 * 3074, "8fb6623e830365ff53cf14adec797474f5478006"),
                Member("coarse_label_names.txt"),
                Member("fine_label_names.txt"),
            ),
            parse=_cifar100,
            shape=(32, 32, 3),
            examples={"train": 50_000, "test": 10_000},
            pickled=("cifar-100-python.tar.gz", "cifar-100-python"),
            ids=True,
        ),
        Original(
            name="mnist",
            version="3.0.1",
            description="70,000 grey images of handwritten digits, 28 x 28 pixels (MNIST).",
            homepage="http://yann.lecun.com/exdb/mnist/",
            citation=(
                "@article{lecun2010mnist, author={LeCun, Yann and Cortes, Corinna and Burges, CJ}, "
                "title={MNIST handwritten digit database}, year={2010}}"
            ),
            members=_idx_members(
                "6bbc9ace898e44ae57da46a324031adb",
                "a25bea736e30d166cdddb491f175f624",
                "2646ac647ad5339dbf082846283269ea",
                "27ae3e4e09519cfbb04c329615203637",
            ),
            parse=_mnist,
            shape=(28, 28, 1),
            examples={"train": 60_000, "test": 10_000},
        ),
        Original(
            name="fashion_mnist",
            version="3.0.1",
            description="70,000 grey images of clothes in 10 classes, 28 x 28 pixels.",
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            citation=(
                "@article{xiao2017fashion, author={Han Xiao and Kashif Rasul and Roland Vollgraf}, "
                "title={Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
                "Algorithms}, journal={arXiv:1708.07747}, year={2017}}"
            ),
            members=_idx_members(
                "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                "9018921c3c673c538a1fc5bad174d6f9",
                "8181f5470baa50b63fa0f6fddb340f0a",
                "15d484375f8d13e6eb1aabb0c3f46965",
            ),
            parse=_fashion,
            shape=(28, 28, 1),
            examples={"train": 60_000, "test": 10_000},
        ),
    )
}
