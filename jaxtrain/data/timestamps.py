"""Times in a table: whether its rows are in their order, without a gap."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

import numpy as np

from jaxtrain.core.errors import InputError

# Year, month and day in any order (or year and month), then perhaps a time, AM or PM and an offset from UTC.
_TIME = re.compile(
    r"(?=\d{4}[-/]|\d+[-./]\d+[-./])(\d{1,4})[-./](\d{1,2})(?:[-./](\d{1,4}))?"
    r"(?:[ T]+(\d{1,2}):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?)?(?: *([AaPp])[Mm])?"
    r"(?: *(?:Z|UTC|([+-]\d\d):?(\d\d)))?"
)
# 20191231, 201912312350, or seconds, milliseconds, microseconds or nanoseconds since 1970
_DIGITS = re.compile(r"\d{8,14}|\d{16}|[1-4]\d{18}")
_HOURS = re.compile(r"(\d{1,2})(?:[:.](\d\d)(?:[:.](\d\d))?)?(?: *[AaPp][Mm])?")


def is_time(text: str) -> bool:
    """Return whether ``text`` looks like a date, with or without a time.

    >>> is_time("31.12.2019 23:50:00"), is_time("2019-12-31T23:50Z"), is_time("1949-01"), is_time("a1")
    (True, True, True, False)
    """
    return _TIME.fullmatch(text.strip()) is not None or _DIGITS.fullmatch(text.strip()) is not None


def are_times(values: np.ndarray) -> bool:
    """Return whether integers ``[rows]`` look like times: 20191231, or seconds (or ms, µs, ns) since 1970.

    >>> are_times(np.array([20191231.0, 20200101.0])), are_times(np.array([1.0, 2.0]))
    (True, False)
    """
    if len(values) < 2 or not (values == np.round(values)).all() or np.abs(values).max() >= 9e18:
        return False
    return _are_digits_of_times(values.astype(np.int64))


def _are_digits_of_times(values: np.ndarray) -> bool:
    low, high = int(values.min()), int(values.max())
    if low == high or len(str(low)) != len(str(high)):
        return False
    if any(10**n <= low <= high < 5 * 10**n for n in (9, 12, 15, 18)):
        return True
    date = values // 10 ** max(0, len(str(low)) - 8)
    month, day = date // 100 % 100, date % 100
    on_calendar = ((month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)).all()
    return bool(int(date.min()) >= 19000101 and int(date.max()) <= 21001231 and on_calendar)


def join(dates: Sequence[str], hours: Sequence[str]) -> list[str] | None:
    """Join dates and times of day from two columns; None where these are not read.

    >>> join(["2019-12-31", "2019-12-31"], ["8", "9.30"])
    ['2019-12-31 8:00', '2019-12-31 9:30']
    """
    cells = [text.strip() for text in hours]
    if not all(map(_HOURS.fullmatch, cells)):
        return None
    clock = [text.replace(".", ":") if ":" in text or "." in text else f"{text}:00" for text in cells]
    joined = [f"{date.strip()} {time}" for date, time in zip(dates, clock, strict=True)]
    return joined if all(map(is_time, joined)) else None


def check_order(
    where: str, column: str, texts: Sequence[str], lines: Sequence[int], repeats: bool = False
) -> str | None:
    """Check that times rise from row to row; return a line about gaps or a text that is no time, or None.

    Nothing is checked unless all ``texts`` look like times.

    Args:
      where: the file, for messages.
      column: the name of the column.
      texts: its cells.
      lines: their line numbers.
      repeats: whether a row may have the time of the row before.

    Raises:
      InputError: a row has the time of the row before, or an earlier one.
    """
    candidates = _read(texts)
    if not candidates:
        if all(map(_DIGITS.fullmatch, texts)):  # ids
            return None
        odd = next((text for text in texts if not is_time(text)), texts[0]).strip()
        return f"{where}: the order of {column!r} was not checked: {odd!r} is not a time that is read here"
    for seconds in candidates:
        steps = np.diff(seconds)
        if repeats and (steps >= 0).all():
            return None
        if (steps > 0).all():
            return _gaps(f"{where}, column {column!r}", steps, lines)
    steps = np.diff(candidates[0])
    row = int(np.argmax(steps < 0 if repeats else steps <= 0)) + 1
    now = f"{where}, row {lines[row]}, column {column!r}: {texts[row].strip()!r}"
    if steps[row - 1] == 0:
        raise InputError(f"{now} is also the time of the row before: leave one row for each time")
    if (steps < 0).all():
        raise InputError(f"{now} is before the row above: the rows run from new to old: reverse them")
    raise InputError(f"{now} is before the row above, {texts[row - 1].strip()!r}: sort the rows by time")


def _read(texts: Sequence[str]) -> list[np.ndarray]:
    """Return times in seconds ``[rows]``, for each possible order of day and month; empty: unknown."""
    if all(map(_DIGITS.fullmatch, texts)):
        values = np.array(texts).astype(np.int64)
        return [values] if _are_digits_of_times(values) else []
    fields = _fixed_width(texts)
    if fields is None:
        found = [_TIME.fullmatch(text.strip()) for text in texts]
        groups = [match.groups() for match in found if match is not None]
        if len(groups) < len(texts):
            return []
        fields = np.array([_numbers(group) for group in groups], np.int64)
    first = _TIME.fullmatch(texts[0].strip())
    assert first is not None
    a, _, c, *_ = first.groups()
    if len(a) == 4:
        orders = [(0, 1, 2)]
    else:
        orders = [(2, 1, 0), (2, 0, 1), *([] if len(c or "") == 4 else [(0, 1, 2)])]
    return [
        _to_seconds(fields[:, [year, month, day]], fields[:, 3:])
        for year, month, day in orders
        if ((fields[:, month] >= 1) & (fields[:, month] <= 12)).all()
    ]


def _numbers(group: Sequence[str | None]) -> tuple[int, ...]:
    """Return three numbers of the date, hour, minute, second, nanosecond and minutes ahead of UTC."""
    a, b, c, hour, minute, second, fraction, half, ahead, more = group
    hours = int(hour or 0)
    if half:
        hours = hours % 12 + (12 if half in "Pp" else 0)
    offset = (int(ahead) * 60 + int(more or 0) * (-1 if ahead.startswith("-") else 1)) if ahead else 0
    nanoseconds = int((fraction or "").ljust(9, "0"))
    date = int(a or 0), int(b or 0), int(c or 1)
    return (*date, hours, int(minute or 0), int(second or 0), nanoseconds, offset)


def _fixed_width(texts: Sequence[str]) -> np.ndarray | None:
    """Read as ``_numbers`` where all texts have digits in the same places, 20 times as fast; else None."""
    first = _TIME.fullmatch(texts[0])
    if (
        first is None
        or any(first.group(8, 9))
        or len(set(map(len, texts))) > 1
        or not "".join(texts).isascii()
    ):
        return None
    codes = np.frombuffer("".join(texts).encode(), np.uint8).reshape(len(texts), -1)
    digits = np.array([character.isdigit() for character in texts[0]])
    numbers = codes[:, digits] - np.uint8(ord("0"))  # others wrap to more than 9
    if (numbers > 9).any() or (codes[:, ~digits] != codes[0, ~digits]).any():
        return None
    fields = np.tile(np.array(_numbers(first.groups()), np.int64), (len(texts), 1))
    for column, group in enumerate(range(1, 8)):
        start, end = first.span(group)
        if start >= 0:
            power = 10 ** np.arange(end - start - 1, -1, -1) * (
                10 ** (9 - (end - start)) if group == 7 else 1
            )
            fields[:, column] = (codes[:, start:end] - ord("0")) @ power
    return fields


def _to_seconds(date: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Return seconds since 1970: int64, or float64 where there are fractions."""
    year, month, day = date.T
    year = np.where(year < 70, year + 2000, np.where(year < 100, year + 1900, year))
    months = (year - 1970).astype("M8[Y]").astype("M8[M]") + (month - 1)
    days = months.astype("M8[D]").astype(np.int64) + (day - 1)
    hour, minute, second, nanosecond, offset = time.T
    seconds = days * 86400 + (hour * 60 + minute - offset) * 60 + second
    return seconds + nanosecond / 1e9 if nanosecond.any() else seconds


def _gaps(where: str, steps: np.ndarray, lines: Sequence[int]) -> str | None:
    """Return a line about steps of more than 1.5 times the usual one."""
    usual = np.median(steps) if len(steps) else 0
    wide = np.flatnonzero(steps > 1.5 * usual)
    if not len(wide):
        return None
    step = datetime.timedelta(seconds=float(usual))
    return (
        f"{where}: {len(wide)} steps are longer than the usual {step}, the first before row "
        f"{lines[wide[0] + 1]}: windows reach over these gaps"
    )
