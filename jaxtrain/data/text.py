"""Text sources, from files or TensorFlow Datasets: windows for next-byte prediction, and labelled texts."""

from __future__ import annotations

import codecs
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.data import paths
from jaxtrain.data.data_dir import default_data_dir
from jaxtrain.data.order import permutation
from jaxtrain.data.text_file import read_text_file
from jaxtrain.data.tfds import TFDS
from jaxtrain.data.word_tokenizer import build_vocabulary, encode

SPLITS = ("train", "validation", "test")

# Not a run's seed: every run splits a file in the same way.
_SPLIT_SEED = 2005
# Texts read at a time while counting words, so a large data set never has to fit in memory.
_CHUNK = 8192

_File = tuple[str, tuple[int, ...]]  # its path and its stamp, for the keys of the caches


@dataclasses.dataclass(frozen=True)
class TextWindows:
    """Windows of a long text, each byte labelled with the byte that follows it.

    Window i starts at byte ``i * stride``. Only full windows count: fewer than ``stride`` bytes at the end
    are never predicted, nor is the first byte, which nothing precedes. At the default stride every byte
    in between is predicted exactly once. The text of the split stays in memory.

    Attributes:
      context: bytes per window, at least 1.
      split: ``train``, ``validation`` or ``test``: the first 90 %, the next 5 % and the last 5 % of ``file``,
        as TFDS splits tiny_shakespeare. Without ``file``, any TFDS split expression.
      name: the TFDS data set whose feature ``text`` is read; several examples are joined by newlines.
      file: a text file, read instead of the data set; in UTF-8 or an encoding with ASCII as single bytes.
      stride: bytes from one window to the next, at least 1; None: ``context``, no overlap.
      data_dir: as for ``TFDS``.

    >>> source = TextWindows(context=128, split="test")
    >>> {name: (array.dtype.name, array.shape) for name, array in source.example().items()}
    {'tokens': ('uint8', (1, 128)), 'label': ('int32', (1, 128))}
    """

    context: int = 256
    split: str = "train"
    name: str = "tiny_shakespeare"
    file: str | None = None
    stride: int | None = None
    data_dir: str | None = dataclasses.field(default=None, metadata={"operational": True})

    def __post_init__(self) -> None:
        if self.context < 1:
            raise InputError(f"TextWindows: context is {self.context}: it must be at least 1")
        if self.stride is not None and self.stride < 1:
            raise InputError(
                f"TextWindows: stride is {self.stride}: it must be at least 1, or none for {self.context}"
            )
        if self.file is not None:
            _check_file_split("TextWindows", self.split)

    def prepared(self) -> bool:
        """Return whether nothing has to be downloaded: ``file`` is set, or the data set is on disk."""
        return self.file is not None or _tfds(self).prepared()

    def example(self) -> dict[str, np.ndarray]:
        """Return zeros in the shapes of one example; reads nothing."""
        shape = (1, self.context)
        return {"tokens": np.zeros(shape, np.uint8), "label": np.zeros(shape, np.int32)}

    def __len__(self) -> int:
        """Return the number of windows, ``(bytes - context - 1) // stride + 1``.

        Raises:
          InputError: the file cannot be read, the data set is not prepared, or the split has too few bytes
            for one window.
        """
        return len(self._windows())

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return ``tokens: uint8 [k, context]`` and ``label: int32 [k, context]``, shifted by one byte."""
        block = self._windows()[indices]
        return {"tokens": np.ascontiguousarray(block[:, :-1]), "label": block[:, 1:].astype(np.int32)}

    def data_files(self) -> tuple[Path, ...]:
        """Return the files that are read."""
        return _tfds(self).data_files() if self.file is None else (paths.resolve(self.file),)

    def _windows(self) -> np.ndarray:
        """Return all windows with the byte after each: uint8 ``[n, context + 1]``, a view without a copy."""
        where = f"data set {self.name}" if self.file is None else self.file
        text = (
            _read_tfds_text(_tfds(self))
            if self.file is None
            else _read_split(*_with_stamp(self.file), self.split)
        )
        if len(text) <= self.context:
            raise InputError(
                f"{where}: its {self.split} split has {len(text)} bytes, too few for one window of context "
                f"{self.context} and the byte after it: lower context, or give more text"
            )
        windows = np.lib.stride_tricks.sliding_window_view(text, self.context + 1)
        return windows[:: self.stride or self.context]


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """Labelled texts, tokenized as bytes or as words.

    With ``words=0`` a token is a byte. With ``words=N`` the text is lower-cased (A to Z) and the N most
    frequent words of the train split are tokens 256 and up, by falling frequency and then alphabet; a word
    is a run of letters, digits and apostrophes. Other words and other visible characters are encoded as
    their bytes, so there is no unknown token. White space is dropped, except for one space between two
    consecutive words encoded as bytes. Texts of more than ``length`` tokens are truncated; shorter ones are
    padded with 0.

    Attributes:
      length: tokens per example, at least 1.
      split: ``train``, ``validation`` or ``test``: 80, 10 and 10 % of the lines of each of ``files``, a
        fixed random split. Without ``files``, any TFDS split expression.
      name: the TFDS data set whose features ``text`` and ``label`` are read.
      files: one file per class in label order, read instead of the data set: one text per line, in UTF-8 or
        an encoding with ASCII as single bytes; lines of only white space are skipped.
      words: number of words in the vocabulary, at least 0. It always comes from the full ``train`` split.
      data_dir: as for ``TFDS``.

    >>> source = LabelledText(length=64, words=1000)
    >>> source.vocabulary, source.example()["tokens"].dtype.name
    (1256, 'int32')
    """

    length: int = 256
    split: str = "train"
    name: str = "imdb_reviews"
    files: tuple[str, ...] = ()
    words: int = 0
    data_dir: str | None = dataclasses.field(default=None, metadata={"operational": True})

    shared: ClassVar[tuple[str, ...]] = ("name", "files", "words")

    def __post_init__(self) -> None:
        if self.length < 1:
            raise InputError(f"LabelledText: length is {self.length}: it must be at least 1")
        if self.words < 0:
            raise InputError(f"LabelledText: words is {self.words}: it must be at least 0")
        if isinstance(self.files, str) or len(self.files) == 1:
            raise InputError(f"LabelledText: files is {self.files!r}: give two or more, one for each class")
        object.__setattr__(self, "files", tuple(map(str, self.files)))
        if len(set(self.files)) < len(self.files):
            raise InputError(f"LabelledText: files is {self.files!r}: each class needs its own file")
        if self.files:
            _check_file_split("LabelledText", self.split)

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary: 256 bytes and ``words``; tokens are in ``[0, vocabulary)``."""
        return 256 + self.words

    @property
    def classes(self) -> int | None:
        """The number of classes."""
        return len(self.files) if self.files else _tfds(self).classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in label order; of files the stems, names or paths, the first unique."""
        if not self.files:
            return _tfds(self).class_names
        files = [Path(file) for file in self.files]
        candidates = [tuple(p.stem for p in files), tuple(p.name for p in files), self.files]
        return next(names for names in candidates if len(set(names)) == len(names))

    def prepared(self) -> bool:
        """Return whether nothing has to be downloaded: ``files`` is set, or the data set is on disk."""
        return bool(self.files) or _tfds(self).prepared()

    def example(self) -> dict[str, np.ndarray]:
        """Return zeros in the shapes of one example; reads nothing."""
        return {
            "tokens": np.zeros((1, self.length), np.int32 if self.words else np.uint8),
            "length": np.zeros(1, np.int32),
            "label": np.zeros(1, np.int32),
        }

    def __len__(self) -> int:
        """Return the number of texts.

        Raises:
          InputError: a file cannot be read or holds no text, or the data set is not prepared, has no such
            split or no class labels.
        """
        return len(self._lines()[1]) if self.files else len(_tfds(self))

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return ``tokens: uint8 [k, length]``, int32 with ``words``; ``length``, ``label``: int32 ``[k]``.

        ``length`` counts the tokens without padding; it is 0 for an empty text.
        """
        texts, label = self._texts(np.asarray(indices))
        if self.words:
            vocabulary = _vocabulary(self._stamped(), self._train(), self.words)
            rows = [encode(text, vocabulary, self.length) for text in texts]
            padded_rows = np.zeros((len(rows), self.length), np.int32)
            for row, values in zip(padded_rows, rows, strict=True):
                row[: len(values)] = values
            return {"tokens": padded_rows, "length": _count_tokens(rows), "label": label}
        truncated = [text[: self.length] for text in texts]
        padded = bytearray().join(text.ljust(self.length, b"\0") for text in truncated)
        tokens = np.frombuffer(padded, np.uint8).reshape(len(truncated), self.length)
        return {"tokens": tokens, "length": _count_tokens(truncated), "label": label}

    def text(self, indices: np.ndarray) -> list[str]:
        """Return the texts of the examples ``indices: int [k]``, in full; bytes not in UTF-8 as U+FFFD."""
        return [text.decode(errors="replace") for text in self._texts(np.asarray(indices))[0]]

    def data_files(self) -> tuple[Path, ...]:
        """Return the files that are read, those of the train split's vocabulary included."""
        if self.files:
            return tuple(map(paths.resolve, self.files))
        own = _tfds(self).data_files()
        return tuple(dict.fromkeys((*own, *self._train().data_files()))) if self.words else own

    def vocabulary_words(self) -> tuple[bytes, ...]:
        """Return the words of the tokens from 256 on; none with ``words=0``. Reads the train split."""
        if not self.words:
            return ()
        return tuple(_vocabulary(self._stamped(), self._train(), self.words))

    def _texts(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        if self.files:
            texts, labels = self._lines()
            return [texts[i] for i in indices.tolist()], labels[indices]
        source = _tfds(self)
        if source.classes is None:
            raise InputError(f"data set {self.name} has no class label in a feature named 'label'")
        columns = source.raw(indices, ("text", "label"))
        return columns["text"], np.array(columns["label"], np.int32)

    def _lines(self) -> tuple[tuple[bytes, ...], np.ndarray]:
        return _read_lines(self._stamped(), self.split)

    def _stamped(self) -> tuple[_File, ...]:
        return tuple(map(_with_stamp, self.files))

    def _train(self) -> TFDS:
        return dataclasses.replace(_tfds(self), split="train")


def _check_file_split(what: str, split: str) -> None:
    if split not in SPLITS:
        raise InputError(f"{what}: files have the splits {', '.join(SPLITS)}, not {split!r}")


def _tfds(source: TextWindows | LabelledText) -> TFDS:
    # The folder is made explicit because it is part of the key of the caches below.
    return TFDS(source.name, source.split, source.data_dir or str(default_data_dir()))


def _with_stamp(file: str) -> _File:
    path = str(paths.resolve(file))
    return path, paths.stamp(path)


@functools.lru_cache(maxsize=8)
def _read_tfds_text(source: TFDS) -> np.ndarray:
    """Return the text of a TFDS split: uint8 ``[bytes]``, read-only."""
    return np.frombuffer(b"\n".join(_iterate_tfds(source)), np.uint8)


@functools.lru_cache(maxsize=8)
def _read_split(path: str, _: tuple[int, ...], split: str) -> np.ndarray:
    """Return one split of a file: uint8 ``[bytes]``, read-only."""
    text = np.frombuffer(read_text_file(path), np.uint8)
    first = int(len(text) * 0.9)  # rounded down as TFDS does
    second = first + int((len(text) - first) * 0.5)
    return dict(zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True))[split]


def _iterate_tfds(source: TFDS) -> Iterator[bytes]:
    for start in range(0, len(source), _CHUNK):
        yield from source.raw(np.arange(start, min(start + _CHUNK, len(source))), ("text",))["text"]


@functools.lru_cache(maxsize=8)
def _read_lines(files: tuple[_File, ...], split: str) -> tuple[tuple[bytes, ...], np.ndarray]:
    """Return the texts of a split and their labels, int32 ``[n]``, in order of file and line."""
    texts: list[bytes] = []
    labels: list[int] = []
    for label, (path, _) in enumerate(files):
        data = read_text_file(path).removeprefix(codecs.BOM_UTF8)
        if b"\0" in data:
            raise InputError(f"{path} holds NUL bytes, and 0 is the token of the padding: remove them")
        lines = [line.rstrip(b"\r") for line in data.split(b"\n") if line.strip()]
        if not lines:
            raise InputError(f"{path} holds no text: give one text per line")
        tenth = round(len(lines) / 10)
        if not tenth:
            raise InputError(
                f"{path} has {len(lines)} texts, too few for splits of a tenth: give at least 10"
            )
        order = permutation(_SPLIT_SEED, label, len(lines))
        parts = {"validation": order[:tenth], "test": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
        texts += [lines[i] for i in np.sort(parts[split])]
        labels += [label] * len(parts[split])
    return tuple(texts), np.array(labels, np.int32)


@functools.lru_cache(maxsize=8)
def _vocabulary(files: tuple[_File, ...], train: TFDS, words: int) -> Mapping[bytes, int]:
    """Return the vocabulary of the train split."""
    return build_vocabulary(_read_lines(files, "train")[0] if files else _iterate_tfds(train), words)


def _count_tokens(rows: list[bytes] | list[list[int]]) -> np.ndarray:
    return np.array([len(row) for row in rows], np.int32)
