"""Reading prepared TensorFlow Datasets without TensorFlow: ``TFDS(name, split)``.

Only data sets in the ``array_record`` format are read, because only those can be read at random;
``jaxtrain.data.prepare`` writes them. Nothing here opens a network connection.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.process import cores
from jaxtrain.core.text import first_line
from jaxtrain.data.data_dir import (
    check_features,
    file_formats,
    find_folder,
    folders,
    not_prepared,
    parse_name,
)
from jaxtrain.data.prepare.originals import ORIGINALS
from jaxtrain.data.record_place import first_bad, place

# Enough records to repay handing a chunk to a thread, few enough to keep all threads busy.
_CHUNK = 512
DECODER = 1  # another number when ``gather`` makes something else of the same files
# What Pillow calls an image of one, three or four uint8 channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Two threads of a worker that both import TFDS first thing can wait for each other for ever: each holds a
# lock that the other needs, of an import or of the cached properties behind TFDS's lazy ones (Python 3.11).
_OPENING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class TFDS:
    """A prepared TensorFlow Datasets split, read without TensorFlow.

    Examples stand in the order in which they were prepared, which never changes; for the stock
    data sets that is the order every TFDS user sees (a hash of the example's key, not the order of
    the original files). An instance is three strings: it compares, hashes and pickles as such, and
    opens its files on first use, once per process. All methods may be called from several threads.

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
        """Whether the data set lies ready on disk. Reads two small files: no network, no TFDS."""
        return find_folder(self.name, self.data_dir) is not None

    def __len__(self) -> int:
        """The number of examples in the split.

        Raises:
          InputError: the data set is not prepared, or has no such split.
        """
        return self._open().length

    @property
    def classes(self) -> int | None:
        """The number of classes of the feature ``label``; None when that is no class label."""
        label = self._open().features.get("label")
        return getattr(label, "num_classes", None)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in label order; None as for ``classes``."""
        names = getattr(self._open().features.get("label"), "names", None)
        return None if names is None else tuple(names)

    def example(self) -> dict[str, np.ndarray] | None:
        """Zeros of one example's shapes, leading axis 1; None while they are not known.

        The data sets that ``prepare`` writes itself are known before they are prepared.
        """
        original = ORIGINALS.get(parse_name(self.name)[0])
        if original is None and self.prepared():
            return {key: np.zeros_like(value) for key, value in self.gather(np.zeros(1, int)).items()}
        if original is None:
            return None
        return {"image": np.zeros((1, *original.shape), np.uint8), "label": np.zeros(1, np.int32)}

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at ``indices``, as arrays whose leading axis is ``len(indices)``.

        Args:
          indices: int [n], each in [0, len(self)), in any order, repeats allowed.

        Returns:
          One array per feature: images uint8 [n, height, width, channel], class labels int32 [n],
          other numbers in their own shape and dtype. Features of nested features are named
          ``outer/inner``. Strings (text, ids, file names) are left out.

        Raises:
          InputError: not prepared, no such split, or a feature differs in shape between examples
            (images of several sizes), so it cannot be stacked.
          IndexError: an index is out of range.
          RunError: a data file is missing or damaged.
        """
        return self._open().gather(np.asarray(indices))

    def raw(self, indices: np.ndarray, fields: Sequence[str]) -> dict[str, list[Any]]:
        """The stored values of some features, undecoded, for sources that decode them their own way.

        Args:
          indices: as for ``gather``.
          fields: names of features: text and images come as bytes (an image as its file), numbers as
            Python numbers.

        Raises:
          InputError: not prepared, no such split, or no such feature.
          IndexError, RunError: as for ``gather``.
        """
        return self._open().raw(np.asarray(indices), fields)

    def place(self, index: int) -> str:
        """Where example ``index`` lies: ``record 12 of FILE``."""
        return self._open().place(index)

    def identity(self) -> str:
        """Hexadecimal digits that stand for what ``gather`` gives: the split, its files, sizes and times."""
        opened = self._open()
        paths = sorted({Path(file.filename).resolve() for file in opened.files})
        about = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        features = sorted(map(str, opened.features.items()))
        text = repr((DECODER, self.name, self.split, opened.length, features, about))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _open(self) -> _Split:
        folder = find_folder(self.name, self.data_dir)
        if folder is None:
            raise InputError(_why_not(self.name, self.data_dir))
        with _OPENING:
            return _open_split(self.name, str(folder), self.split)


def _why_not(name: str, data_dir: str | None) -> str:
    """One line: what is missing and the command that provides it."""
    other = folders(name, data_dir)
    if other:
        return (
            f"data set {name}: {other[0]} holds {file_formats(other[0])[0]} files, which need "
            "TensorFlow: move that folder away (or set TFDS_DATA_DIR to another folder), then run: "
            f"python -m jaxtrain prepare {name}"
        )
    return not_prepared(name, data_dir)


@functools.lru_cache(maxsize=64)
def _open_split(name: str, folder: str, split: str) -> _Split:
    # Of its own so that open files stay out of TFDS's equality, hash, repr and pickle.
    return _Split(name, folder, split)


class _Split:
    """The open files of one split, and how each of its features becomes an array."""

    def __init__(self, name: str, folder: str, split: str):
        import tensorflow_datasets as tfds

        check_features(Path(folder))
        builder = tfds.builder_from_directory(folder, file_format="array_record")
        self.name, self.split = name, split
        self.files = self._check_split(builder.info.splits, folder)
        # Sorted, because features.json is read back in no particular order.
        self.features: Mapping[str, Any] = dict(sorted(builder.info.features.items()))
        self.records = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        self.length = len(self.records)
        self._images = self._named(tfds.features.Image)
        self._labels = self._named(tfds.features.ClassLabel)
        known = {*self._images, *self._labels, *self._named(tfds.features.Text)}
        # Anything less common is left to TFDS: ten times slower an example, and always right.
        self._others = [key for key in self.features if key not in known]
        self._parse = builder.info.features.deserialize_example_np
        self._specs = _flatten(builder.info.features.get_tensor_info())
        self._skip = {key: tfds.decode.SkipDecoding() for key in self._images}

    def _named(self, kind: type) -> list[str]:
        return [key for key, feature in self.features.items() if type(feature) is kind]

    def _check_split(self, splits: Mapping[str, Any], folder: str) -> Sequence[Any]:
        try:
            files = splits[self.split].file_instructions
        except (KeyError, ValueError, AssertionError) as error:
            raise InputError(
                f"data set {self.name} has no split {self.split!r}: its splits are "
                f"{', '.join(splits)}, and parts of them such as {next(iter(splits))}[:90%]"
            ) from error
        if not files:
            raise InputError(f"data set {self.name}: split {self.split!r} holds no example")
        for file in files:
            if not Path(file.filename).exists():
                raise RunError(f"{file.filename} is missing: {_again(self.name, folder)}")
        return list(files)

    def place(self, index: int) -> str:
        file, record = place(self.files, index)
        return f"record {record} of {file}"

    def raw(self, indices: np.ndarray, fields: Sequence[str]) -> dict[str, list[Any]]:
        from tensorflow_datasets.proto import tf_example_pb2

        self._check_indices(indices)
        for name in fields:
            if name not in self.features:
                raise InputError(
                    f"data set {self.name} has no feature {name!r}: it has {', '.join(self.features)}"
                )
        values: dict[str, list[Any]] = {name: [] for name in fields}
        numbers = indices.tolist()
        for index, record in zip(numbers, self._read(numbers) if numbers else (), strict=True):
            try:
                feature = tf_example_pb2.Example.FromString(record).features.feature
                for name in fields:
                    kind = feature[name].WhichOneof("kind")
                    values[name].append(getattr(feature[name], kind).value[0])
            except Exception as error:  # protobuf's own, or what comes of a feature that is not there
                raise self._damaged(index, error) from error
        return values

    def _check_indices(self, indices: np.ndarray) -> None:
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise IndexError(f"indices: expected int [n], got {indices.dtype} {indices.shape}")
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < self.length:
            raise IndexError(
                f"indices {indices.min()} to {indices.max()} of {self.name} {self.split}, "
                f"which has {self.length} examples"
            )

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self._check_indices(indices)
        if not indices.size:  # The shapes and dtypes of one example, none of its rows.
            return {key: value[:0] for key, value in self._chunk([0]).items()}
        chunks = [indices[i : i + _CHUNK].tolist() for i in range(0, len(indices), _CHUNK)]
        if len(chunks) == 1:
            return self._chunk(chunks[0])
        with concurrent.futures.ThreadPoolExecutor(min(8, cores())) as pool:
            parts = list(pool.map(self._chunk, chunks))
        return {key: self._join(key, [part[key] for part in parts], np.concatenate) for key in parts[0]}

    def _chunk(self, indices: list[int]) -> dict[str, np.ndarray]:
        from tensorflow_datasets.proto import tf_example_pb2

        records = self._read(indices)
        images: dict[str, list[np.ndarray]] = {key: [] for key in self._images}
        labels: dict[str, list[int]] = {key: [] for key in self._labels}
        for index, record in zip(indices, records, strict=True):
            try:
                column = tf_example_pb2.Example.FromString(record).features.feature
                for key, decoded in images.items():
                    decoded.append(self._decode(key, column[key].bytes_list.value[0]))
                for key, values in labels.items():
                    values.append(column[key].int64_list.value[0])
            except Exception as error:  # of protobuf, of Pillow, or of a feature that is not there
                raise self._damaged(index, error) from error
        batch = {key: self._join(key, decoded) for key, decoded in images.items()}
        batch |= {key: np.array(values, np.int32) for key, values in labels.items()}
        return batch | self._rest(records)

    def _read(self, indices: list[int]) -> Sequence[bytes]:
        try:
            records: Sequence[bytes] = self.records.__getitems__(indices)
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            found = first_bad(indices, self.records.__getitems__) or (indices[0], error)
            raise self._damaged(*found) from error
        return records

    def _damaged(self, index: int, error: Exception) -> RunError:
        """For an example that cannot be read: its file and record, and what to do."""
        line = first_line(error).partition("; ")[0]
        again = _again(self.name, str(self.records.dataset_info.data_dir))
        return RunError(
            f"data set {self.name}: {self.place(index)} (example {index} of split {self.split}) cannot be "
            f"read ({line[:200]}): {again}"
        )

    def _decode(self, key: str, encoded: bytes) -> np.ndarray:
        """An image file as an array [height, width, channel]."""
        from PIL import Image

        feature = self.features[key]
        with Image.open(io.BytesIO(encoded)) as image:
            if feature.np_dtype == np.float32:  # TFDS keeps float images bit for bit as RGBA.
                return np.asarray(image).view(np.float32)
            mode = _MODES.get(feature.shape[-1])
            # A grey or CMYK file among colour ones must not change the shape.
            if feature.np_dtype == np.uint8 and mode is not None and image.mode != mode:
                array = np.asarray(image.convert(mode))
            else:
                array = np.asarray(image, feature.np_dtype)
        return array if array.ndim == 3 else array[..., None]

    def _rest(self, records: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Features that are neither image, class label nor text, through TFDS's own parser."""
        if not self._others:
            return {}
        examples = [self._parse(record, decoders=self._skip) for record in records]
        flat = [_flatten({key: example[key] for key in self._others}) for example in examples]
        batch = {}
        for key in flat[0]:
            dtype = np.dtype(self._specs[key].np_dtype)
            if dtype.kind in "biuf":
                # Scalars come as Python numbers, which have forgotten their dtype.
                batch[key] = self._join(
                    key,
                    [f[key] for f in flat],
                    lambda values, dtype=dtype: np.stack([np.asarray(v, dtype) for v in values]),
                )
        return batch

    def _join(self, key: str, values: Sequence[Any], join: Any = np.stack) -> np.ndarray:
        try:
            joined: np.ndarray = join(values)
        except ValueError as error:
            skip = 0 if join is not np.concatenate else 1  # Only there do values hold rows.
            shapes = sorted({str(getattr(v, "shape", "ragged")[skip:]) for v in values})
            raise InputError(
                f"data set {self.name}: feature {key!r} differs in shape between examples "
                f"({', '.join(shapes[:2])}), so it cannot be stacked into one array"
            ) from error
        return joined


def _again(name: str, folder: str) -> str:
    return f"delete {folder}, then run: python -m jaxtrain prepare {name}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested features under one name each, ``outer/inner``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{key}/") if nested else {prefix + key: value}
    return flat
