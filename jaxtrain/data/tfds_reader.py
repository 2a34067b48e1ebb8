"""Decode the ``array_record`` files of one TFDS split into arrays, without TensorFlow."""

from __future__ import annotations

import concurrent.futures
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.process import cores
from jaxtrain.core.text import first_line
from jaxtrain.data.data_dir import check_features

# Enough records to repay handing a chunk to a thread, few enough to keep all threads busy.
_CHUNK = 512
# Pillow's modes for images of one, three or four uint8 channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class SplitReader:
    """The open files of one split and the decoders of its features."""

    def __init__(self, name: str, folder: str, split: str):
        import tensorflow_datasets as tfds

        check_features(Path(folder))
        builder = tfds.builder_from_directory(folder, file_format="array_record")
        self.name, self.folder, self.split = name, folder, split
        self.files = self._check_split(builder.info.splits, folder)
        # Sorted, because TFDS reads features.json in no fixed order.
        self.features: Mapping[str, Any] = dict(sorted(builder.info.features.items()))
        self.records = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        self.length = len(self.records)
        self._images = self._names_of(tfds.features.Image)
        self._labels = self._names_of(tfds.features.ClassLabel)
        known = {*self._images, *self._labels, *self._names_of(tfds.features.Text)}
        # TFDS parses less common features: ten times slower per example, and always right.
        self._others = [key for key in self.features if key not in known]
        self._parse = builder.info.features.deserialize_example_np
        self._specs = _flatten(builder.info.features.get_tensor_info())
        self._skip = {key: tfds.decode.SkipDecoding() for key in self._images}

    def _names_of(self, kind: type) -> list[str]:
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
            raise InputError(f"data set {self.name}: split {self.split!r} is empty")
        for file in files:
            if not Path(file.filename).exists():
                raise RunError(f"{file.filename} is missing: {_prepare_again(self.name, folder)}")
        return list(files)

    def locate(self, index: int) -> str:
        """Return the file and the record of example ``index``, for messages."""
        for file in self.files:  # TFDS's FileInstruction: records ``skip`` to ``skip + take`` of a file
            if index < file.take:
                return f"record {file.skip + index} of {file.filename}"
            index -= file.take
        raise IndexError(f"{index} examples too many")

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
            except Exception as error:  # from protobuf, or from a missing feature
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
        if not indices.size:  # Shapes and dtypes come from one example, without its row.
            return {key: value[:0] for key, value in self._read_chunk([0]).items()}
        chunks = [indices[i : i + _CHUNK].tolist() for i in range(0, len(indices), _CHUNK)]
        if len(chunks) == 1:
            return self._read_chunk(chunks[0])
        with concurrent.futures.ThreadPoolExecutor(min(8, cores())) as pool:
            parts = list(pool.map(self._read_chunk, chunks))
        return {key: self._stack(key, [part[key] for part in parts], np.concatenate) for key in parts[0]}

    def _read_chunk(self, indices: list[int]) -> dict[str, np.ndarray]:
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
            except Exception as error:  # from protobuf, from Pillow, or from a missing feature
                raise self._damaged(index, error) from error
        batch = {key: self._stack(key, decoded) for key, decoded in images.items()}
        batch |= {key: np.array(values, np.int32) for key, values in labels.items()}
        return batch | self._parse_others(records)

    def _read(self, indices: list[int]) -> Sequence[bytes]:
        try:
            records: Sequence[bytes] = self.records.__getitems__(indices)
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            raise self._damaged(*self._first_unreadable(indices, error)) from error
        return records

    def _first_unreadable(self, indices: list[int], error: Exception) -> tuple[int, Exception]:
        """Read one record at a time to find the damaged one, because a batch's error does not name it."""
        for index in indices:
            try:
                self.records.__getitems__([index])
            except Exception as found:
                return index, found
        return indices[0], error

    def _damaged(self, index: int, error: Exception) -> RunError:
        """Return the error for an example that cannot be read: its file and record, and what to do."""
        line = first_line(error).partition("; ")[0]
        again = _prepare_again(self.name, str(self.records.dataset_info.data_dir))
        return RunError(
            f"data set {self.name}: {self.locate(index)} (example {index} of split {self.split}) cannot be "
            f"read ({line[:200]}): {again}"
        )

    def _decode(self, key: str, encoded: bytes) -> np.ndarray:
        """Decode an image file to an array [height, width, channel]."""
        from PIL import Image

        feature = self.features[key]
        with Image.open(io.BytesIO(encoded)) as image:
            if feature.np_dtype == np.float32:  # TFDS stores the bits of float images as RGBA.
                return np.asarray(image).view(np.float32)
            mode = _MODES.get(feature.shape[-1])
            # A grey or CMYK file among RGB ones must not change the shape.
            if feature.np_dtype == np.uint8 and mode is not None and image.mode != mode:
                array = np.asarray(image.convert(mode))
            else:
                array = np.asarray(image, feature.np_dtype)
        return array if array.ndim == 3 else array[..., None]

    def _parse_others(self, records: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Parse features other than images, class labels and text with TFDS's own parser."""
        if not self._others:
            return {}
        examples = [self._parse(record, decoders=self._skip) for record in records]
        flat = [_flatten({key: example[key] for key in self._others}) for example in examples]
        batch = {}
        for key in flat[0]:
            dtype = np.dtype(self._specs[key].np_dtype)
            if dtype.kind in "biuf":
                # Scalars come as Python numbers, without their dtype.
                batch[key] = self._stack(
                    key,
                    [f[key] for f in flat],
                    lambda values, dtype=dtype: np.stack([np.asarray(v, dtype) for v in values]),
                )
        return batch

    def _stack(self, key: str, values: Sequence[Any], join: Any = np.stack) -> np.ndarray:
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


def _prepare_again(name: str, folder: str) -> str:
    return f"delete {folder}, then run: python -m jaxtrain prepare {name}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested features as one level, named ``outer/inner``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{key}/") if nested else {prefix + key: value}
    return flat
