"""Windows of a multivariate time series from a csv file: ``Series``."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.data import csv_table, paths
from jaxtrain.data.csv_table import CsvFormat
from jaxtrain.data.data_dir import not_prepared_message, parse_name
from jaxtrain.data.prepare.tables import table_file

SPLITS = ("train", "validation", "test")

# Known before the data set is downloaded, so that ``example`` works without it.
_VARIABLES = {"etth1": 7}


@dataclasses.dataclass(frozen=True)
class Series:
    """Forecasting windows of a multivariate time series: ``window`` input rows, then ``horizon`` target rows.

    The rows are split in time order into 60, 20 and 20 %. Training windows lie within the train part.
    Validation and test windows reach back ``window`` rows into the part before, so every row of these parts
    is a target of its own split and of no other. Values are standardised by the mean and the population
    standard deviation of the train part. This is the usual set-up for the ETT data, with ``rows=14400`` (Zhou
    et al. 2021, arXiv:2012.07436). The table stays in memory.

    Attributes:
      window: input rows, at least 1.
      horizon: target rows, at least 1.
      split: ``train``, ``validation`` or ``test``.
      name: a data set that ``python -m jaxtrain prepare`` downloads.
      file: a csv file with a line of column names and a row for each time, the oldest first, read instead of
        the data set. A column of times that is no variable is checked: every row must be later than the one
        before.
      columns: names of the variables, in this order. Empty: all columns, without the first if it is not
        numeric (dates); other columns whose names are those of times or an index are refused.
      rows: use only the first ``rows`` rows; None: all.
      separator: of the cells of ``file``: ``","``, ``";"``, ``"\\t"`` or another character.
      decimal: the decimal sign of the numbers of ``file``: ``"."`` or ``","``.
      encoding: of the text of ``file``, such as ``utf-8``, ``utf-16`` or ``latin-1``.
      data_dir: as for ``TFDS``.

    >>> source = Series(window=48, horizon=12, columns=("OT",))
    >>> {name: array.shape for name, array in source.example().items()}
    {'series': (1, 48, 1), 'target': (1, 12, 1)}
    """

    window: int = 96
    horizon: int = 24
    split: str = "train"
    name: str = "etth1"
    file: str | None = None
    columns: tuple[str, ...] = ()
    rows: int | None = None
    separator: str = ","
    decimal: str = "."
    encoding: str = "utf-8"
    data_dir: str | None = dataclasses.field(default=None, metadata={"operational": True})

    shared: ClassVar[tuple[str, ...]] = (
        "name",
        "file",
        "columns",
        "rows",
        "separator",
        "decimal",
        "encoding",
    )

    def __post_init__(self) -> None:
        for name, value in (("window", self.window), ("horizon", self.horizon), ("rows", self.rows)):
            if value is not None and value < 1:
                raise InputError(f"Series: {name} is {value}: it must be at least 1")
        if self.split not in SPLITS:
            raise InputError(f"Series has the splits {', '.join(SPLITS)}, not {self.split!r}")
        if isinstance(self.columns, str):
            raise InputError(f"Series: columns is {self.columns!r}: give a tuple of names")
        object.__setattr__(self, "columns", tuple(self.columns))
        self._form()

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the variables, in the order of the last axis."""
        return self._table().names

    @property
    def mean(self) -> np.ndarray:
        """Mean of the training rows: float64 ``[variables]``; ``value = series * std + mean``."""
        return self._table().mean

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation of the training rows: float64 ``[variables]``."""
        return self._table().std

    def notes(self) -> tuple[str, ...]:
        """Return warnings about the data, one per line: gaps in time, or times that are not read."""
        note = self._table().note
        return () if note is None else (note,)

    def prepared(self) -> bool:
        """Return whether nothing has to be downloaded: ``file`` is set, or the data set is on disk."""
        return self.file is not None or table_file(self.name, self.data_dir) is not None

    def example(self) -> dict[str, np.ndarray] | None:
        """Return zeros in the shapes of one example; None if only the file, which is not read, knows them."""
        known = None if self.file is not None else _VARIABLES.get(parse_name(self.name)[0])
        count = len(self.columns) or known
        if count is None:
            return None
        return {
            "series": np.zeros((1, self.window, count), np.float32),
            "target": np.zeros((1, self.horizon, count), np.float32),
        }

    def __len__(self) -> int:
        """Return the number of windows.

        Raises:
          InputError: the file cannot be read or is written in another form, the data set is not prepared, a
            column is missing or constant, a cell is not a finite number, the rows are not in the order of
            time, or too few for one window.
        """
        return len(self._windows())

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return float32 ``series [k, window, variables]`` and ``target [k, horizon, variables]``."""
        block = self._windows()[indices]
        return {
            "series": np.ascontiguousarray(block[:, : self.window]),
            "target": np.ascontiguousarray(block[:, self.window :]),
        }

    def data_files(self) -> tuple[Path, ...]:
        """Return the file that is read."""
        return (self._path(),)

    def _windows(self) -> np.ndarray:
        """Return every window with its target: a view ``[n, window + horizon, variables]``, not a copy."""
        values = self._table().values
        bounds = (0, *_split_points(len(values)), len(values))
        number = SPLITS.index(self.split)
        overlap = self.window if number else 0
        start, end = bounds[number] - overlap, bounds[number + 1]
        if start < 0 or end - start < self.window + self.horizon:
            raise InputError(
                f"{self._path()}: {len(values)} rows are too few for one {self.split} window of window="
                f"{self.window} and horizon={self.horizon}: lower these, or give more rows"
            )
        view = np.lib.stride_tricks.sliding_window_view(values[start:end], self.window + self.horizon, axis=0)
        return view.transpose(0, 2, 1)

    def _path(self) -> Path:
        if self.file is not None:
            return paths.resolve(self.file)
        path = table_file(self.name, self.data_dir)
        if path is None:
            raise InputError(not_prepared_message(self.name, self.data_dir))
        return path

    def _form(self) -> CsvFormat:
        return CsvFormat(self.separator, self.decimal, self.encoding)

    def _table(self) -> _Table:
        path, form = self._path(), CsvFormat() if self.file is None else self._form()
        return _read_table(path, paths.stamp(path), form, self.columns, self.rows)


class _Table(NamedTuple):
    """``values: float32 [rows, variables]``, standardised; ``mean`` and ``std``: float64 ``[variables]``.

    ``note`` is a line about gaps in time or times that are not read, or None.
    """

    names: tuple[str, ...]
    values: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    note: str | None


def _split_points(rows: int) -> tuple[int, int]:
    """Return the first validation row and the first test row."""
    return rows * 6 // 10, rows * 8 // 10


@functools.lru_cache(maxsize=8)
def _read_table(
    path: Path, _: tuple[int, ...], form: CsvFormat, columns: tuple[str, ...], limit: int | None
) -> _Table:
    names, raw, note = csv_table.read(path, form, columns, limit)
    if limit is not None and len(raw) < limit:
        raise InputError(
            f"{path} has {len(raw)} rows, fewer than rows={limit}: lower rows, or set none for all"
        )
    train = raw[: _split_points(len(raw))[0]]
    if not len(train):
        raise InputError(f"{path}: {len(raw)} rows are too few to split: give at least 2")
    for name, low, high in zip(names, train.min(axis=0), train.max(axis=0), strict=True):
        if low == high:
            raise InputError(
                f"{path}, column {name!r}: all {len(train)} training rows are {low:g}, so it cannot be "
                "standardised: remove it from columns"
            )
    mean, std = train.mean(axis=0), train.std(axis=0)
    table = _Table(names, ((raw - mean) / std).astype(np.float32), mean, std, note)
    for array in table[1:4]:
        array.flags.writeable = False
    return table
