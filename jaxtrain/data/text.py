"""Text as bytes, from files or TensorFlow Datasets: windows for the next byte, and labelled texts."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.data.data_dir import default_data_dir
from jaxtrain.data.order import permutation
from jaxtrain.data.tfds import TFDS

SPLITS = ("train", "validation", "test")

# Not a seed that runs use: the split of a file stays the same whatever they do.
_SPLIT_SEED = 2005
# Texts read at a time while counting words, so that a large data set is never whole in memory.
_CHUNK = 8192
# Bytes above 127 count as letters, which keeps words whole in UTF-8 and in Latin-1.
_WORD = re.compile(rb"[a-z0-9'\x80-\xff]+")
_WORD_OR_OTHER = re.compile(rb"([a-z0-9'\x80-\xff]+)|\S")
_SPACE = 0x20


@dataclasses.dataclass(frozen=True)
class TextWindows:
    """Windows of a long text and, for each of their bytes, the byte that follows.

    Window i starts at byte ``i * stride``. Only whole windows count: fewer than ``stride`` bytes at the end
    are never predicted, and neither is the first byte, which nothing precedes. At the default stride every
    byte between is predicted exactly once. The text of the split stays in memory.

    Attributes:
      context: bytes in a window, at least 1.
      split: ``train``, ``validation`` or ``test``: the first 90 %, the next 5 % and the last 5 % of ``file``,
        as TFDS splits tiny_shakespeare. Without ``file``, any TFDS split expression.
      name: the TFDS data set, whose feature ``text`` is read; several examples are joined by a newline.
      file: a text file in any encoding, read instead of the data set.
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
            _check_split("TextWindows", self.split)

    def prepared(self) -> bool:
        """Whether there is nothing to fetch: a file is given, or the data set lies on disk."""
        return self.file is not None or _tfds(self).prepared()

    def example(self) -> dict[str, np.ndarray]:
        """Zeros of one example's shapes; reads nothing."""
        shape = (1, self.context)
        return {"tokens": np.zeros(shape, np.uint8), "label": np.zeros(shape, np.int32)}

    def __len__(self) -> int:
        """The number of windows, ``(bytes - context - 1) // stride + 1``.

        Raises:
          InputError: the file cannot be read, the data set is not prepared, or the split has too few bytes
            for one window.
        """
        return len(self._windows())

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """``tokens: uint8 [k, context]`` and ``label: int32 [k, context]``, one byte further on."""
        block = self._windows()[indices]
        return {"tokens": np.ascontiguousarray(block[:, :-1]), "label": block[:, 1:].astype(np.int32)}

    def _windows(self) -> np.ndarray:
        """All windows with the byte after each: a uint8 view ``[n, context + 1]`` that copies nothing."""
        where = f"data set {self.name}" if self.file is None else self.file
        text = _corpus(_tfds(self)) if self.file is None else _part(_absolute(self.file), self.split)
        if len(text) <= self.context:
            raise InputError(
                f"{where}: its {self.split} split has {len(text)} bytes, too few for one window of context "
                f"{self.context} and the byte after it: lower context, or give more text"
            )
        every = np.lib.stride_tricks.sliding_window_view(text, self.context + 1)
        return every[:: self.stride or self.context]


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """Texts and their class, as bytes or as words.

    A token is a byte (``words=0``). With ``words=N`` the text is lower-cased (A to Z) and the N most frequent
    words of the train split are tokens 256 and up, by falling frequency and then alphabet; a word is a run of
    letters, digits and apostrophes. Every other word is spelt in its bytes and every other visible
    character is its byte, so nothing is unknown. White space is dropped, except for one space between
    two spelt words in a row. Texts of more than ``length`` tokens lose their end; shorter ones are padded
    with 0.

    Attributes:
      length: tokens in a row of ``tokens``, at least 1.
      split: ``train``, ``validation`` or ``test``: 80, 10 and 10 % of the lines of each of ``files``, drawn
        at random, once and for all. Without ``files``, any TFDS split expression.
      name: the TFDS data set, whose features ``text`` and ``label`` are read.
      files: one file for each class in label order, read instead of the data set: one text a line, in any
        encoding; lines of only white space are skipped.
      words: size of the vocabulary of words, at least 0. It always comes from the whole split ``train``.
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
            raise InputError(f"LabelledText: files is {self.files!r}: each class needs a file of its own")
        if self.files:
            _check_split("LabelledText", self.split)

    @property
    def vocabulary(self) -> int:
        """Tokens are in ``[0, vocabulary)``: 256 bytes and ``words``."""
        return 256 + self.words

    @property
    def classes(self) -> int | None:
        """The number of classes."""
        return len(self.files) if self.files else _tfds(self).classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in label order; the files' stems, or as much more as tells them apart."""
        if not self.files:
            return _tfds(self).class_names
        paths = [Path(file) for file in self.files]
        ways = [tuple(p.stem for p in paths), tuple(p.name for p in paths), self.files]
        return next(names for names in ways if len(set(names)) == len(names))

    def prepared(self) -> bool:
        """Whether there is nothing to fetch: files are given, or the data set lies on disk."""
        return bool(self.files) or _tfds(self).prepared()

    def example(self) -> dict[str, np.ndarray]:
        """Zeros of one example's shapes; reads nothing."""
        return {
            "tokens": np.zeros((1, self.length), np.int32 if self.words else np.uint8),
            "length": np.zeros(1, np.int32),
            "label": np.zeros(1, np.int32),
        }

    def __len__(self) -> int:
        """The number of texts.

        Raises:
          InputError: a file cannot be read or holds no text, or the data set is not prepared, has no such
            split or no class labels.
        """
        return len(self._lines()[1]) if self.files else len(_tfds(self))

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """``tokens: uint8 [k, length]``, int32 with ``words``; ``length`` and ``label``: int32 ``[k]``.

        ``length`` counts the tokens that are not padding; it is 0 for an empty text.
        """
        texts, label = self._texts(np.asarray(indices))
        if self.words:
            vocabulary = _vocabulary(self._paths(), self._train(), self.words)
            rows = [_in_words(text, vocabulary, self.length) for text in texts]
            numbers = np.zeros((len(rows), self.length), np.int32)
            for row, values in zip(numbers, rows, strict=True):
                row[: len(values)] = values
            return {"tokens": numbers, "length": _lengths(rows), "label": label}
        cut = [text[: self.length] for text in texts]
        padded = bytearray().join(text.ljust(self.length, b"\0") for text in cut)
        tokens = np.frombuffer(padded, np.uint8).reshape(len(cut), self.length)
        return {"tokens": tokens, "length": _lengths(cut), "label": label}

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
        return _labelled_lines(self._paths(), self.split)

    def _paths(self) -> tuple[str, ...]:
        return tuple(map(_absolute, self.files))

    def _train(self) -> TFDS:
        return dataclasses.replace(_tfds(self), split="train")


def _check_split(what: str, split: str) -> None:
    if split not in SPLITS:
        raise InputError(f"{what}: files have the splits {', '.join(SPLITS)}, not {split!r}")


def _tfds(source: TextWindows | LabelledText) -> TFDS:
    # The folder is written out because it is part of what the caches below know a data set by.
    return TFDS(source.name, source.split, source.data_dir or str(default_data_dir()))


def _absolute(file: str) -> str:
    return str(Path(file).expanduser().absolute())


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): correct the path, or leave it out to read a data set"
        ) from error


@functools.lru_cache(maxsize=8)
def _corpus(source: TFDS) -> np.ndarray:
    """The text of a TFDS split: uint8 ``[bytes]``, read-only."""
    return np.frombuffer(b"\n".join(_tfds_texts(source)), np.uint8)


@functools.lru_cache(maxsize=8)
def _part(path: str, split: str) -> np.ndarray:
    """The bytes of one split of a file: uint8 ``[bytes]``, read-only."""
    text = np.frombuffer(_read(path), np.uint8)
    first = int(len(text) * 0.9)  # TFDS rounds both borders down in this way
    second = first + int((len(text) - first) * 0.5)
    return dict(zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True))[split]


def _tfds_texts(source: TFDS) -> Iterator[bytes]:
    for start in range(0, len(source), _CHUNK):
        yield from source.raw(np.arange(start, min(start + _CHUNK, len(source))), ("text",))["text"]


@functools.lru_cache(maxsize=8)
def _labelled_lines(paths: tuple[str, ...], split: str) -> tuple[tuple[bytes, ...], np.ndarray]:
    """The texts of a split and their labels, int32 ``[n]``, file by file and in the order of the lines."""
    texts: list[bytes] = []
    labels: list[int] = []
    for label, path in enumerate(paths):
        lines = [line.rstrip(b"\r") for line in _read(path).split(b"\n") if line.strip()]
        if not lines:
            raise InputError(f"{path} holds no text: it needs one on each line")
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
def _vocabulary(paths: tuple[str, ...], train: TFDS, words: int) -> Mapping[bytes, int]:
    """The token of each of the most frequent words of the train split."""
    counts: collections.Counter[bytes] = collections.Counter()
    for text in _labelled_lines(paths, "train")[0] if paths else _tfds_texts(train):
        counts.update(_WORD.findall(text.lower()))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: 256 + rank for rank, word in enumerate(ranked[:words])}


def _in_words(text: bytes, vocabulary: Mapping[bytes, int], length: int) -> list[int]:
    """At most ``length`` tokens of ``text``: words of the vocabulary, and the bytes of all else."""
    tokens: list[int] = []
    spelt = False
    for match in _WORD_OR_OTHER.finditer(text.lower()):
        if len(tokens) >= length:
            break
        word, is_word = match[0], match[1] is not None
        if word in vocabulary:
            tokens.append(vocabulary[word])
        else:
            tokens += [_SPACE, *word] if spelt and is_word else word
        spelt = is_word and word not in vocabulary
    return tokens[:length]


def _lengths(rows: list[bytes] | list[list[int]]) -> np.ndarray:
    return np.array([len(row) for row in rows], np.int32)
