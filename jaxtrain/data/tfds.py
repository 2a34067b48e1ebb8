"""Read prepared TensorFlow Datasets without TensorFlow: ``TFDS(name, split)``.

Only the ``array_record`` format is read, because only that format has random access;
``jaxtrain.data.prepare`` writes it. Nothing here opens a network connection.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.data.data_dir import (
    file_formats,
    find_prepared,
    not_prepared_message,
    parse_name,
    version_folders,
)
from jaxtrain.data.prepare.originals import ORIGINALS
from jaxtrain.data.tfds_reader import SplitReader

DECODER = 1  # Increase it when ``gather`` returns something else for the same files.
# Two threads of a worker that both import TFDS first can deadlock: each holds a lock that the other needs, of
# an import or of the cached properties behind TFDS's lazy imports (Python 3.11).
_OPEN_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class TFDS:
    """A prepared TensorFlow Datasets split, read without TensorFlow.

    Examples keep the order in which they were prepared, which never changes; for the stock data sets
    that is the order every TFDS user sees (a hash of the example's key, not the order of the original
    files). An instance is three strings: it compares, hashes and pickles as such, and opens its files
    on first use, once per process. All methods are thread-safe.

    Args:
      name: ``"cifar10"``, ``"imdb_reviews/plain_text"``, ``"mnist:3.0.1"``; without a version, the
        newest prepared one.
      split: any TFDS split expression: ``"train"``, ``"train[:90%]"``, ``"train+test"``.
      data_dir: the folder of all data sets; None: ``$TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``.

    >>> train = TFDS("cifar10", "train[:90%]")
    >>> if train.prepared():
    ...     batch = train.gather(np.arange(128))
    ...     assert batch["image"].shape == (128, 32, 32, 3)
    ...     assert batch["label"].dtype == np.int32 and train.classes == 10
    """

    name: str
    split: str = "train"
    data_dir: str | None = dataclasses.field(default=None, metadata={"operational": True})

    def prepared(self) -> bool:
        """Return whether the data set is on disk. Reads two small files: no network, no TFDS."""
        return find_prepared(self.name, self.data_dir) is not None

    def __len__(self) -> int:
        """Return the number of examples in the split.

        Raises:
          InputError: the data set is not prepared, or has no such split.
        """
        return self._open().length

    @property
    def classes(self) -> int | None:
        """The number of classes of the feature ``label``; None if it is not a class label."""
        label = self._open().features.get("label")
        return getattr(label, "num_classes", None)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in label order; None as for ``classes``."""
        names = getattr(self._open().features.get("label"), "names", None)
        return None if names is None else tuple(names)

    def example(self) -> dict[str, np.ndarray] | None:
        """Return zeros in the shapes of one example, leading axis 1; None if they are not known yet.

        For the data sets that ``prepare`` writes itself they are known before it has run.
        """
        original = ORIGINALS.get(parse_name(self.name)[0])
        if original is None and self.prepared():
            return {key: np.zeros_like(value) for key, value in self.gather(np.zeros(1, int)).items()}
        if original is None:
            return None
        return {"image": np.zeros((1, *original.shape), np.uint8), "label": np.zeros(1, np.int32)}

    def expected_length(self) -> int | None:
        """Return the number of examples of a split that is not prepared yet; None if it is not known.

        >>> TFDS("cifar10", "test").expected_length()
        10000
        """
        original = ORIGINALS.get(parse_name(self.name)[0])
        return None if original is None else original.examples.get(self.split)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at ``indices`` as arrays whose leading axis is ``len(indices)``.

        Args:
          indices: int [n], each in [0, len(self)), in any order, repeats allowed.

        Returns:
          One array per feature: images uint8 [n, height, width, channel], class labels int32 [n],
          other numbers in their own shape and dtype. Nested features are named ``outer/inner``.
          Strings (text, ids, file names) are left out.

        Raises:
          InputError: not prepared, no such split, or a feature differs in shape between examples
            (images of several sizes), so it cannot be stacked.
          IndexError: an index is out of range.
          RunError: a data file is missing or damaged.
        """
        return self._open().gather(np.asarray(indices))

    def raw(self, indices: np.ndarray, fields: Sequence[str]) -> dict[str, list[Any]]:
        """Return the stored values of some features, undecoded, for sources with their own decoder.

        Args:
          indices: as for ``gather``.
          fields: names of features: text and images come as bytes (an image as its file), numbers as
            Python numbers.

        Raises:
          InputError: not prepared, no such split, or no such feature.
          IndexError, RunError: as for ``gather``.
        """
        return self._open().raw(np.asarray(indices), fields)

    def locate(self, index: int) -> str:
        """Return where example ``index`` is stored, such as ``record 12 of FILE``."""
        return self._open().locate(index)

    def data_files(self) -> tuple[Path, ...]:
        """Return the files that are read: those of the split, and the description of its features."""
        reader = self._open()
        files = sorted({Path(file.filename) for file in reader.files})
        return *files, Path(reader.folder, "features.json")

    def cache_key(self) -> str:
        """Return a hash of what ``gather`` depends on: the split and its files' names, sizes and times."""
        reader = self._open()
        paths = sorted({Path(file.filename).resolve() for file in reader.files})
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        features = sorted(map(str, reader.features.items()))
        text = repr((DECODER, self.name, self.split, reader.length, features, stats))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _open(self) -> SplitReader:
        folder = find_prepared(self.name, self.data_dir)
        if folder is None:
            raise InputError(_unreadable_message(self.name, self.data_dir))
        with _OPEN_LOCK:
            return _open_split(self.name, str(folder), self.split)


def _unreadable_message(name: str, data_dir: str | None) -> str:
    """Return one line: what is missing and the command that provides it."""
    other = version_folders(name, data_dir)
    if other:
        return (
            f"data set {name}: {other[0]} holds {file_formats(other[0])[0]} files, which need "
            "TensorFlow: move that folder away (or set TFDS_DATA_DIR to another folder), then run: "
            f"python -m jaxtrain prepare {name}"
        )
    return not_prepared_message(name, data_dir)


@functools.lru_cache(maxsize=64)
def _open_split(name: str, folder: str, split: str) -> SplitReader:
    # A function, so that open files stay out of TFDS's equality, hash, repr and pickle.
    return SplitReader(name, folder, split)
