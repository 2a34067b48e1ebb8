"""Read the inputs of ``predict``: image files, folders, .npy arrays, csv tables and lines of text."""

from __future__ import annotations

import codecs
import csv
import math
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jaxtrain.artifact.batch import check_values
from jaxtrain.artifact.images import decode_image, read_image, scale_pixels
from jaxtrain.artifact.manifest import InputSpec, Manifest
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_LINE = 2**20
"""Longest line of text in bytes."""
STDIN = "-"


class Example(NamedTuple):
    """One example to predict.

    Attributes:
      id: path, ``path:row`` of an array or table, or the number of a line of text, from 0.
      inputs: arrays by name, without the batch axis.
      tokens: the number of tokens of a text, without padding; None for other data.
    """

    id: str | int
    inputs: dict[str, Any]
    tokens: int | None = None


class Reader:
    """Reads examples one by one, in the order of the inputs and, in a folder, of the names.

    Args:
      manifest: of the model, which says what an example must be.
      words: the vocabulary of a model of text with words.
      resize: crop and resize images of another size.
    """

    def __init__(self, manifest: Manifest, words: bytes | None = None, resize: bool = False) -> None:
        self.manifest, self.resize = manifest, resize
        self.skipped = 0
        lines = [] if words is None else words.split(b"\n")[:-1]
        self._vocabulary = {word: 256 + rank for rank, word in enumerate(lines)}

    def read(self, inputs: Sequence[str], stdin: IO[bytes]) -> Iterator[Example]:
        """Yield the examples of files and folders; ``-`` is text from ``stdin``, one example a line.

        Raises:
          InputError: an input does not exist, cannot be read, or is not what the model takes.
        """
        for example in self._read(inputs, stdin):
            for name, array in example.inputs.items():
                check_values(f"{example.id}: {name}", self.manifest.inputs[name], array)
            yield example

    def _read(self, inputs: Sequence[str], stdin: IO[bytes]) -> Iterator[Example]:
        for text in inputs:
            if text == STDIN:
                yield from self._text(stdin, "", "stdin")
                continue
            path = Path(text)
            if os.path.isdir(path):  # noqa: PTH112 - False, and no error, for a name that is too long
                yield from self._folder(path)
            elif os.path.lexists(path):
                yield from self._file(path)
            else:
                raise InputError(f"{text}: there is no such file or folder")

    def _folder(self, folder: Path) -> Iterator[Example]:
        found = False
        for root, folders, names in os.walk(folder, onerror=_unreadable):
            folders.sort()
            for name in sorted(names):
                if Path(name).suffix.lower() in (*IMAGES, ".npy"):
                    found = True
                    yield from self._file(Path(root, name))
                else:
                    self.skipped += 1
        if not found:
            raise InputError(f"{folder} has no image ({', '.join(IMAGES)}) and no .npy file")

    def _file(self, path: Path) -> Iterator[Example]:
        suffix = path.suffix.lower()
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for who writes into it
                raise InputError(f"{path} is not a file: give - to read text from stdin")
            if suffix in IMAGES:
                yield Example(str(path), self._image(path))
            elif suffix == ".npy":
                yield from self._array(path)
            elif suffix == ".csv":
                with path.open(encoding="utf-8-sig", newline="") as file:
                    yield from self._table(csv.reader(file, strict=True), path)
            elif suffix == ".txt":
                with path.open("rb") as binary:
                    yield from self._text(binary, f"{path}:", str(path))
            else:
                raise InputError(
                    f"{path}: give an image ({', '.join(IMAGES)}), .npy, .csv or .txt file, or a folder"
                )
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror or error})") from error

    def _only_input(self, what: str) -> tuple[str, InputSpec]:
        """Return the model's input, where it has one."""
        if len(self.manifest.inputs) != 1:
            raise InputError(
                f"{what}: the model takes {', '.join(self.manifest.inputs)}: give a .csv file with these"
            )
        return next(iter(self.manifest.inputs.items()))

    def _image(self, path: Path) -> dict[str, np.ndarray]:
        name, spec, size, channels = self._image_input(str(path))
        return {name: scale_pixels(read_image(path, size, channels, spec.crop, self.resize), spec)}

    def _image_input(self, where: str) -> tuple[str, InputSpec, tuple[int, int], int]:
        """Return the input that an image is for, its width and height, and its channels."""
        name, spec = self._only_input(where)
        shape = spec.shape[1:]
        if len(shape) != 3 or shape[2] not in (1, 3) or spec.white is None:
            raise InputError(f"{where} is an image, and the model takes {name}: {spec.text}")
        height, width, channels = (int(n) for n in shape)
        return name, spec, (width, height), channels

    def image(self, data: bytes, where: str, formats: tuple[str, ...], max_pixels: int) -> Example:
        """Return the example of an image that is in memory.

        Args, raises: as ``decode_image``; InputError also where the model takes no image.
        """
        name, spec, size, channels = self._image_input(where)
        pixels = decode_image(data, where, size, channels, spec.crop, self.resize, formats, max_pixels)
        return Example(where, {name: scale_pixels(pixels, spec)})

    def text(self, text: bytes, where: str) -> Example:
        """Return the example of a text, tokenized as the run's data.

        Raises:
          InputError: the model takes no text, or the text is empty where it may not be.
        """
        if self.manifest.text is None:
            raise InputError(f"{where} is text, and {self._takes()}")
        return self._tokens(text, where, where)

    def _array(self, path: Path) -> Iterator[Example]:
        name, spec = self._only_input(str(path))
        try:
            array = np.lib.format.open_memmap(path, mode="r")  # np.load would read other formats too
        except (ValueError, EOFError) as error:
            raise InputError(f"{path} is not an array that can be read ({first_line(error)})") from error
        wanted = spec.shape[1:]
        single = array.ndim == len(wanted)
        rows = array[None] if single else array
        if array.dtype != spec.numpy_dtype or not _fits(rows.shape[1:], wanted):
            raise InputError(
                f"{path} must be {spec.text}, or one example without the batch axis, and is {array.dtype} "
                f"{list(array.shape)}"
            )
        for row in range(len(rows)):
            yield Example(str(path) if single else f"{path}:{row}", {name: np.array(rows[row])})

    def _table(self, lines: Any, path: Path) -> Iterator[Example]:
        try:
            header = [cell.strip() for cell in next(lines, [])]
            columns = self._columns(header, path)
            for row, cells in enumerate(line for line in lines if line):
                if len(cells) != len(header):
                    raise InputError(f"{path}, row {row + 2}: {len(cells)} cells for {len(header)} columns")
                inputs = {}
                for name, numbers in columns.items():
                    spec = self.manifest.inputs[name]
                    values = [
                        _number(cells[n], spec, f"{path}, row {row + 2}, column {header[n]}") for n in numbers
                    ]
                    inputs[name] = np.array(values, spec.numpy_dtype).reshape(spec.shape[1:])  # type: ignore[arg-type]
                yield Example(f"{path}:{row}", inputs)
        except (csv.Error, UnicodeError) as error:
            raise InputError(f"{path} is not a csv file in UTF-8 ({error})") from error

    def _columns(self, header: list[str], path: Path) -> dict[str, list[int]]:
        """Return the columns of each input: ``NAME``, or ``NAME.0``, ``NAME.1``, ... for several numbers."""
        found = {}
        for name, spec in self.manifest.inputs.items():
            shape = spec.shape[1:]
            if len(shape) > 1 or not all(isinstance(n, int) for n in shape):
                raise InputError(
                    f"{path}: the model takes {name}: {spec.text}, which a table cannot hold: give .npy"
                )
            wanted = [f"{name}.{n}" for n in range(int(shape[0]))] if shape else [name]
            missing = [column for column in wanted if header.count(column) != 1]
            if missing:
                raise InputError(
                    f"{path}: column {missing[0]!r} is missing or appears twice in its first line, "
                    f"{','.join(header)[:80]!r}; the model takes {name}: {spec.text}"
                )
            found[name] = [header.index(column) for column in wanted]
        return found

    def _text(self, file: IO[bytes], prefix: str, where: str) -> Iterator[Example]:
        if self.manifest.text is None:
            raise InputError(f"{where} is text, and {self._takes()}")
        number = 0
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise InputError(f"{where}, line {number + 1} is longer than {MAX_LINE} bytes")
            if number == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise InputError(f"{where} is UTF-16: convert it to UTF-8")
            text = line.rstrip(b"\r\n")
            yield self._tokens(text, f"{prefix}{number}" if prefix else number, f"{where}, line {number + 1}")
            number += 1

    def _takes(self) -> str:
        inputs = ", ".join(f"{name}: {spec.text}" for name, spec in self.manifest.inputs.items())
        return f"the model takes {inputs}"

    def _tokens(self, text: bytes, id: str | int, where: str) -> Example:
        """Return the tokens of a text as its data source makes them."""
        about, specs = self.manifest.text or {}, self.manifest.inputs
        name = next((name for name, spec in specs.items() if len(spec.shape) == 2), None)
        if name is None or set(specs) - {name, "length"}:
            raise InputError(f"{where}: text cannot be given to this model: {self._takes()}")
        axis = specs[name].shape[1]
        length = self.manifest.sizes[axis] if isinstance(axis, str) else axis
        if about["tokens"] == "words":
            from jaxtrain.data.word_tokenizer import encode

            tokens = encode(text, self._vocabulary, length)
        else:
            language_model = self.manifest.task == "language_model"
            tokens = list(text[-length:] if language_model else text[:length])
        if not tokens and self.manifest.task == "language_model":
            raise InputError(f"{where} is empty: give at least one character")
        row = np.zeros(len(tokens) if isinstance(axis, str) else length, specs[name].numpy_dtype)
        row[: len(tokens)] = tokens
        inputs = {name: row}
        if "length" in specs:
            inputs["length"] = np.array(len(tokens), specs["length"].numpy_dtype)
        return Example(id, inputs, len(tokens))


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read ({error.strerror})") from error


def _fits(shape: tuple[int, ...], wanted: Sequence[int | str]) -> bool:
    return len(shape) == len(wanted) and all(
        isinstance(w, str) or n == w for n, w in zip(shape, wanted, strict=True)
    )


_BOOLEANS = {"0": False, "1": True, "false": False, "true": True}


def _largest(dtype: np.dtype[Any]) -> float:
    import ml_dtypes  # of JAX; NumPy's finfo does not know bfloat16

    return float(ml_dtypes.finfo(dtype).max)


def _number(cell: str, spec: InputSpec, where: str) -> Any:
    dtype = spec.numpy_dtype
    try:
        if "_" in cell or not cell.isascii():  # Python reads 1_0 as 10, and the digits of other scripts
            raise ValueError
        if np.issubdtype(dtype, np.integer):
            if np.iinfo(dtype).min <= (whole := int(cell)) <= np.iinfo(dtype).max:
                return whole
        elif dtype.kind == "b":
            return _BOOLEANS[cell.strip().lower()]
        elif abs(number := float(cell)) <= _largest(dtype) or not math.isfinite(number):
            return number
        raise ValueError
    except (ValueError, KeyError) as error:
        raise InputError(f"{where}: {cell[:40]!r} is not a number for {spec.dtype}") from error
