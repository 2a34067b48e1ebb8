"""Read the columns of a time series from a csv file, and check its cells and the order of its rows."""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.data import timestamps

_SEPARATORS = {";": "';'", "\t": "tab", "|": "'|'", ",": "','"}
_TIME_NAMES = frozenset(["year", "month", "day"]) | frozenset(
    ["date", "time", "datetime", "date_time", "timestamp", "stamp", "when", "epoch", "unix", "unixtime"]
)
_INDEX_NAMES = frozenset(["id", "idx", "index"])
_HOUR_NAMES = frozenset(["time", "hour", "hr", "minute"])


@dataclasses.dataclass(frozen=True)
class CsvFormat:
    """How a csv file is written.

    Attributes:
      separator: between cells, one character.
      decimal: ``.`` or ``,``.
      encoding: of the text; a byte order mark is skipped.
    """

    separator: str = ","
    decimal: str = "."
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if len(self.separator) != 1 or self.separator in "\r\n\"'" or self.separator == self.decimal:
            raise InputError(
                f"separator is {self.separator!r}: give one character, such as ';' or '\\t', that is not the "
                "decimal sign"
            )
        if self.decimal not in (".", ","):
            raise InputError(f"decimal is {self.decimal!r}: give '.' or ','")
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError) as error:
            raise InputError(
                f"encoding is {self.encoding!r}, which Python does not know: give utf-8, utf-16 or latin-1"
            ) from error

    def number(self, cell: str) -> float | None:
        """Return the number in ``cell``, None where it holds another text or none.

        >>> CsvFormat().number(" 1e3"), CsvFormat().number("1_0"), CsvFormat(";", ",").number("1,5")
        (1000.0, None, 1.5)
        """
        if self.decimal == ",":
            cell = "." if "." in cell else cell.replace(",", ".")
        try:  # Python also reads 1_0 as 10, and the digits of other scripts
            return float(cell) if "_" not in cell and cell.isascii() else None
        except ValueError:
            return None


class Table(NamedTuple):
    """Names and values, float64 ``[rows, variables]``, of the selected columns; a note on times or None."""

    names: tuple[str, ...]
    values: np.ndarray
    note: str | None


def read(path: Path, form: CsvFormat, columns: Sequence[str], limit: int | None) -> Table:
    """Read a table with a line of column names.

    Args:
      path: the file.
      form: how it is written.
      columns: names of the columns, in this order. Empty: all, without the first if it is not numeric;
        others that hold times or an index are refused.
      limit: the number of rows to read; None: all.

    Raises:
      InputError: the file cannot be read or is written in another form, a column is missing, a cell is not a
        finite number, or the rows are not in the order of time.
    """
    encoding = "utf-8-sig" if codecs.lookup(form.encoding).name == "utf-8" else form.encoding
    try:
        with path.open(encoding=encoding, newline="") as file:
            lines = csv.reader(file, strict=True, delimiter=form.separator, skipinitialspace=True)
            return _Reader(path, form, lines).table(columns, limit)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): correct the path, or omit it to read a data set"
        ) from error
    except (UnicodeError, csv.Error) as error:
        raise InputError(
            f"{path} is not a csv file in {form.encoding.upper()} ({error}): {_encoding_fix(path, error)}"
        ) from error


class _Reader:
    """One pass over the rows of a file.

    Args:
      path: for messages.
      form: of the file.
      lines: a ``csv.reader``.
    """

    def __init__(self, path: Path, form: CsvFormat, lines: Any) -> None:
        self.path, self.form, self.lines = path, form, lines
        header: list[str] = next(
            (cells for cells in lines if any(map(str.strip, cells)) or len(cells) > 1), []
        )
        self.header, self.top = [name.strip() for name in header], lines.line_num

    def table(self, columns: Sequence[str], limit: int | None) -> Table:
        if any("\0" in name for name in self.header):
            raise InputError(
                f"{self.path} holds NUL characters: it looks like UTF-16: set encoding=utf-16-le"
            )
        if self.header and all(self.form.number(name) is not None for name in self.header):
            raise InputError(
                f"{self.path}, row {self.top} holds numbers only: add a line of column names above it"
            )
        rows = self._rows()
        first = next(rows, None)
        if first is None:
            raise InputError(
                f"{self.path} has no rows: it needs a line of column names and a row for each time"
            )
        selected = self._select(columns, first[1])
        clock = self._clock(selected, first[1])
        beside = self._hours_beside(clock, first[1])
        numbers, times, values = [first[0]], [first[1][clock or 0]], [self._values(first, selected)]
        hours = [first[1][beside or 0]]
        for row in rows:
            if len(values) == limit:
                break
            numbers.append(row[0])
            times.append(row[1][clock or 0])
            hours.append(row[1][beside or 0])
            values.append(self._values(row, selected))
        array, note = np.array(values), None
        if clock is not None:
            joined = timestamps.join(times, hours) if beside is not None else times
            note = timestamps.check_order(
                str(self.path), self.header[clock], joined or times, numbers, repeats=joined is None
            )
        if not columns and len(selected) > 1 and selected[0] == 0 and timestamps.are_times(array[:, 0]):
            self._refuse(0, f"holds times as numbers, such as {array[0, 0]:.15g}")
        return Table(tuple(self.header[column] for column in selected), array, note)

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the line number and the cells of each row; empty lines are skipped."""
        empty = 0
        for cells in self.lines:
            line = self.lines.line_num
            if not cells or (len(cells) == 1 and not cells[0].strip()):
                empty = empty or line
                continue
            if empty and len(self.header) == 1:
                raise InputError(
                    f"{self.path}, row {empty}: an empty cell is not a finite number: fill it in"
                )
            if len(cells) != len(self.header):
                raise InputError(self._wrong_length(line, cells))
            yield line, cells

    def _wrong_length(self, line: int, cells: list[str]) -> str:
        header = self.header
        short = header[len(cells)] if len(cells) < len(header) else header[-1]
        relation = "ends before" if len(cells) < len(header) else "continues after"
        text = (
            f"{self.path}, row {line}: {len(cells)} cells for {len(header)} columns: "
            f"it {relation} column {short!r}"
        )
        if header[0].startswith("#") or cells[0].startswith("#"):
            comment = self.top if header[0].startswith("#") else line
            return f"{text}; remove lines of comments, such as row {comment}"
        return text + self._separator_hint()

    def _separator_hint(self) -> str:
        """Return which other separator the line of column names seems to have."""
        for sign, shown in _SEPARATORS.items():
            if sign != self.form.separator and any(sign in name for name in self.header):
                return f"; it looks {shown}-separated: set separator={sign!r}"
        return ""

    def _select(self, columns: Sequence[str], first: list[str]) -> list[int]:
        """Return the numbers of the selected columns."""
        where, header = f"{self.path}, row {self.top}", self.header
        for name in columns:
            if header.count(name) != 1:
                problem = "appears twice" if name in header else "is missing"
                names = ", ".join(header) + self._separator_hint()
                raise InputError(f"{where}: column {name!r} {problem}; there are {names}")
        if columns:
            return [header.index(name) for name in columns]
        unnamed = next(
            (n for n, name in enumerate(header) if not name or name.lower().startswith("unnamed:")), None
        )
        if unnamed is not None:
            raise InputError(
                f"{where}: column {unnamed + 1} has no name, like an index that pandas wrote: name the "
                "variables in columns, or write the file without it (index=False)"
            )
        # An empty first cell is a missing number, not a date.
        skip = bool(first[0].strip()) and self.form.number(first[0]) is None
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{where}: column {twice!r} appears twice: rename one of them")
        if skip and len(header) == 1:
            hint = self._separator_hint() or ": separate columns by commas"
            raise InputError(f"{where}: its only column {header[0]!r} is not numeric{hint}")
        if all(self.form.number(name) is not None for name in header[1:]) and len(header) > 1:
            raise InputError(
                f"{where} looks like a row of numbers: add a line of column names above it; where these are "
                "names, give them in columns"
            )
        selected = list(range(int(skip), len(header)))
        for column in selected if len(selected) > 1 else ():
            if _key(header[column]) in _INDEX_NAMES:
                self._refuse(column, "numbers the rows")
            if _key(header[column]) in _TIME_NAMES and first[column].strip():
                numeric = self.form.number(first[column]) is not None
                self._refuse(
                    column, f"holds times{' as numbers' if numeric else ''}, such as {first[column].strip()}"
                )
        return selected

    def _clock(self, selected: list[int], first: list[str]) -> int | None:
        """Return the number of the column with the times of the rows; None where no other column has any."""
        others = [n for n in range(len(first)) if n not in selected]
        found = next((n for n in others if timestamps.is_time(first[n])), None)
        if found is not None or 0 in selected or self.form.number(first[0]) is not None:
            return found
        looks = _key(self.header[0]) in _TIME_NAMES or any(map(str.isdigit, first[0]))
        return 0 if looks and first[0].strip() else None

    def _hours_beside(self, clock: int | None, first: list[str]) -> int | None:
        """Return the number of the column with the time of day where that of the dates has none."""
        if clock is None or clock + 1 >= len(first) or ":" in first[clock]:
            return None
        return clock + 1 if _key(self.header[clock + 1]) in _HOUR_NAMES else None

    def _refuse(self, column: int, what: str) -> NoReturn:
        """Raise InputError for a column that is no variable: an index, or times."""
        known = _TIME_NAMES | _INDEX_NAMES
        others = [name for n, name in enumerate(self.header) if n != column and _key(name) not in known]
        shown = ",".join(others := others or self.header)
        raise InputError(
            f"{self.path}, column {self.header[column]!r} {what}: it is no variable; name the variables in "
            f"columns, such as columns={shown if len(shown) < 60 else others[0]}"
        )

    def _values(self, row: tuple[int, list[str]], selected: list[int]) -> list[float]:
        line, cells = row
        text = "".join(cells)
        if self.form.decimal == "." and text.isascii() and "_" not in text:  # as ``number``, twice as fast
            with contextlib.suppress(ValueError):
                values = [float(cells[column]) for column in selected]
                if all(map(math.isfinite, values)):
                    return values
        values = []
        for column in selected:
            value = self.form.number(cells[column])
            if value is None or not math.isfinite(value):
                what = repr(cells[column]) if cells[column].strip() else "an empty cell"
                raise InputError(
                    f"{self.path}, row {line}, column {self.header[column]!r}: {what} is not a finite "
                    f"number: {self._number_fix(cells[column].strip())}"
                )
            values.append(value)
        return values

    def _number_fix(self, cell: str) -> str:
        """Return what to do about a cell that is no number."""
        grouped = r"[+-]?\d{1,3}([., '\u00a0\u202f]\d{3})+[.,]\d+|[+-]?\d{1,3}([ '\u00a0\u202f]\d{3})+"
        comma = self.form.separator == ","  # which no decimal sign can be then
        if re.fullmatch(grouped, cell) or (comma and re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", cell)):
            return "write numbers without a thousands separator"
        if re.fullmatch(r"[+-]?\d+[.,]\d+", cell) and not comma:
            other = "," if self.form.decimal == "." else "."
            return f"it has a decimal {'comma' if other == ',' else 'point'}: set decimal={other!r}"
        return "fill it in, or remove the column from columns"


def _key(name: str) -> str:
    return name.lower().replace(" ", "_")


def _encoding_fix(path: Path, error: Exception) -> str:
    """Return what to do about a text that is in another encoding, or is no csv."""
    if isinstance(error, csv.Error):
        return "correct its quotes"
    with path.open("rb") as file:
        start = file.read(2)
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "it looks like UTF-16: set encoding=utf-16"
    if 0 in start:
        return f"it looks like UTF-16: set encoding=utf-16-{'le' if start[1] == 0 else 'be'}"
    return "convert it, or set encoding, such as encoding=latin-1"
