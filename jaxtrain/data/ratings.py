"""Ratings of items by users: ``Ratings``, from a MovieLens file or a TensorFlow data set."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.data import paths
from jaxtrain.data.data_dir import default_data_dir
from jaxtrain.data.order import permutation
from jaxtrain.data.text_file import read_text_file
from jaxtrain.data.tfds import TFDS

SPLITS = ("train", "test")

# Not a run's seed: every run splits the ratings in the same way.
_SPLIT_SEED = 1998
# Records read at a time, so a large data set is never in memory as records.
_CHUNK = 65536
_FEATURES = ("user_id", "movie_id", "user_rating")
# Of the files of MovieLens 100K, 1M and 10M, and of the later ones.
_SEPARATORS = {b"::": "'::'", b"\t": "tabs", b",": "commas"}
_NAMES = (
    {"userid", "user_id", "user"},
    {"movieid", "movie_id", "itemid", "item_id", "item", "movie"},
    {"rating", "user_rating"},
)


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Ratings of items by users, in the MovieLens form (Harper & Konstan 2015, doi:10.1145/2827872).

    MovieLens has no official split: a fixed random part of the ratings is for testing. A user or item of the
    test split may occur in no training example. All ratings stay in memory.

    Attributes:
      split: ``train`` or ``test``.
      name: the TFDS data set whose features ``user_id``, ``movie_id`` and ``user_rating`` are read.
      file: a MovieLens file, read instead of the data set: user, item, rating and time, separated by tabs
        (``u.data``), ``::`` (``ratings.dat``) or commas below a line of column names (``ratings.csv``); ids
        from 1.
      part: share of the ratings in the test split, in (0, 1).
      data_dir: as for ``TFDS``.

    >>> {name: array.dtype.name for name, array in Ratings("test").example().items()}
    {'user': 'int32', 'item': 'int32', 'target': 'float32'}
    """

    split: str = "train"
    name: str = "movielens/100k-ratings"
    file: str | None = None
    part: float = 0.1
    data_dir: str | None = dataclasses.field(default=None, metadata={"operational": True})

    shared: ClassVar[tuple[str, ...]] = ("name", "file", "part")

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"Ratings has the splits {', '.join(SPLITS)}, not {self.split!r}")
        if not 0 < self.part < 1:
            raise InputError(f"Ratings: part is {self.part}: it must be in (0, 1)")

    @property
    def users(self) -> int:
        """One more than the largest ``user`` of either split."""
        return int(self._all()["user"].max()) + 1

    @property
    def items(self) -> int:
        """One more than the largest ``item`` of either split."""
        return int(self._all()["item"].max()) + 1

    def prepared(self) -> bool:
        """Return whether nothing has to be downloaded: ``file`` is set, or the data set is on disk."""
        return self.file is not None or self._tfds().prepared()

    def example(self) -> dict[str, np.ndarray]:
        """Return zeros in the shapes of one example; reads nothing."""
        return {
            "user": np.zeros(1, np.int32),
            "item": np.zeros(1, np.int32),
            "target": np.zeros(1, np.float32),
        }

    def __len__(self) -> int:
        """Return the number of ratings.

        Raises:
          InputError: the file cannot be read or a row of it is malformed, the data set is not prepared, or
            ``part`` leaves a split without a rating.
        """
        return len(self._ids())

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return ``user: int32 [k]`` and ``item: int32 [k]``, ids minus 1, and ``target: float32 [k]``."""
        rows = self._ids()[indices]
        return {name: array[rows] for name, array in self._all().items()}

    def data_files(self) -> tuple[Path, ...]:
        """Return the files that are read."""
        return self._tfds().data_files() if self.file is None else (paths.resolve(self.file),)

    def _all(self) -> dict[str, np.ndarray]:
        if self.file is not None:
            path = paths.resolve(self.file)
            return _read_file(path, paths.stamp(path))
        return _read_tfds(self._tfds())

    def _ids(self) -> np.ndarray:
        return _split(len(self._all()["user"]), self.part, self.split)

    def _tfds(self) -> TFDS:
        # The folder is made explicit because it is part of the key of the cache below.
        return TFDS(self.name, "train", self.data_dir or str(default_data_dir()))


@functools.lru_cache(maxsize=8)
def _split(n: int, part: float, split: str) -> np.ndarray:
    """Return the indices of a split's ratings among all ``n``: int64, ascending."""
    count = round(part * n)
    if not 0 < count < n:
        raise InputError(
            f"Ratings: part={part} of {n} ratings leaves a split empty: give more ratings, or another part"
        )
    order = permutation(_SPLIT_SEED, 0, n)
    return np.sort(order[:count] if split == "test" else order[count:])


@functools.lru_cache(maxsize=4)
def _read_file(path: Path, _: Any) -> dict[str, np.ndarray]:
    data = read_text_file(path).removeprefix(codecs.BOM_UTF8)
    if b"\n" not in data:
        data = data.replace(b"\r", b"\n")
    return _to_arrays(str(path), _file_rows(path, data))


def _file_rows(path: Path, data: bytes) -> Iterator[tuple[int, int, float]]:
    """Yield the ratings of a file. Its first line has the separator and perhaps the names of the columns."""
    columns: tuple[int, ...] = ()
    separator, width, quotes, named = b"", 4, None, False
    for number, line in enumerate(io.BytesIO(data), 1):
        if not line.strip():
            continue
        if not columns:
            separator = next((one for one in _SEPARATORS if one in line), b"\t")
            quotes = b' "\t\r\n' if separator == b"," else None
            columns, cells = (0, 1, 2), line.strip().split(separator)
            if len(cells) > 2 and not any(cell.strip(b' "').isdigit() for cell in cells[:2]):
                columns, width, named = _columns(path, number, cells, separator), len(cells), True
                continue
        cells = line.split(separator)
        if len(cells) != width:
            raise InputError(
                f"{path}, line {number}: {len(cells)} cells where user, item, rating and time, separated by "
                f"{_SEPARATORS[separator]}, are expected"
            )
        where = f"{path}, line {number}"
        row = _parse_rating(where, *(cells[column].strip(quotes) for column in columns))
        if not named and row[2] >= 1e8:
            raise InputError(
                f"{where}: rating {row[2]:.15g} looks like a time: add a first line of column names, such as "
                f"{separator.decode().join(('user', 'item', 'time', 'rating'))}"
            )
        yield row


def _columns(path: Path, number: int, cells: list[bytes], separator: bytes) -> tuple[int, ...]:
    """Return where user, item and rating are, from a line of column names."""
    names = [cell.decode(errors="replace").strip(' "') for cell in cells]
    found = tuple(n for known in _NAMES for n, name in enumerate(names) if name.lower() in known)
    if len(found) != len(_NAMES):
        tabs = 1 if separator == b"," else len(cells)
        raise InputError(
            f"{path}, line {number}: {tabs} cells where user, item, rating and time, separated by tabs, are "
            f"expected; or name the columns userId, itemId (or movieId) and rating, "
            f"which are {', '.join(names)}"
        )
    return found


@functools.lru_cache(maxsize=4)
def _read_tfds(source: TFDS) -> dict[str, np.ndarray]:
    return _to_arrays(f"data set {source.name}", _tfds_rows(source))


def _tfds_rows(source: TFDS) -> Iterator[tuple[int, int, float]]:
    for start in range(0, len(source), _CHUNK):
        columns = source.raw(np.arange(start, min(start + _CHUNK, len(source))), _FEATURES)
        for number, row in enumerate(zip(*(columns[name] for name in _FEATURES), strict=True), start):
            yield _parse_rating(f"data set {source.name}, example {number}", *row)


def _parse_rating(where: str, user: Any, item: Any, rating: Any) -> tuple[int, int, float]:
    """Return one rating with ids from 0, from numbers or their text in bytes."""
    try:
        if any(isinstance(x, bytes) and b"_" in x for x in (user, item, rating)):
            raise ValueError("Python reads 1_2 as 12")
        ids, value = (int(user), int(item)), float(rating)
    except ValueError as error:
        values = (x.decode(errors="replace") if isinstance(x, bytes) else x for x in (user, item, rating))
        raise InputError(
            f"{where}: {', '.join(map(repr, values))} are not two integer ids and a rating: fix or delete it"
        ) from error
    if min(ids) < 1 or max(ids) > 2**31 - 1:
        raise InputError(
            f"{where}: ids {ids[0]} and {ids[1]} must be in 1..{2**31 - 1}: number users and items from 1"
        )
    if not math.isfinite(value):
        raise InputError(f"{where}: rating {value} is not finite: fix or delete it")
    if abs(value) > float(np.finfo(np.float32).max):
        raise InputError(f"{where}: rating {value} is too large for float32: fix or delete it")
    return ids[0] - 1, ids[1] - 1, value


def _to_arrays(where: str, rows: Iterator[tuple[int, int, float]]) -> dict[str, np.ndarray]:
    table = np.fromiter(rows, [("user", np.int32), ("item", np.int32), ("target", np.float32)])
    if not len(table):
        raise InputError(f"{where} holds no ratings")
    return {name: table[name].copy() for name in ("user", "item", "target")}
