"""Read ``metrics.jsonl``, also while it is being written, and thin long series."""

from __future__ import annotations

import array
import dataclasses
import json
import os
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

NAMES = 300
"""Most names of numbers that are read of one file."""
NUMBERS = (float, int, type(None))
"""Types of JSON that are numbers here: null is one that was not finite."""
CHUNK = 2**22
"""Bytes that are read at once. A longer line is not one of ours."""


class MetricsFile:
    """The numbers of a ``metrics.jsonl`` by name. ``update`` reads what was added since the last call.

    A last line without its end is one that is being written, or that a kill has cut off: it is left out.

    Args:
      path: of the file, which may be missing.

    Attributes:
      bad_lines: complete lines that are no objects with a ``step``.
      not_finite: how many numbers of each name are NaN, infinite or null.
      last_step: the largest step.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reset(None)

    def _reset(self, inode: int | None) -> None:
        self._inode, self._offset = inode, 0
        self._values: dict[str, tuple[array.array[float], array.array[float]]] = {}
        self.bad_lines, self.last_step = 0, 0.0
        self.not_finite: dict[str, int] = {}

    def update(self) -> None:
        """Read the lines that were added. A file that was replaced, as by a resumed run, is read again.

        Raises:
          OSError: the file cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                self._read(file)
        except FileNotFoundError:
            self._reset(None)

    def _read(self, file: BinaryIO) -> None:
        inode, size = _identity(file)
        if inode != self._inode or size < self._offset:
            self._reset(inode)
        file.seek(self._offset)
        rest = b""
        while chunk := file.read(CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._offset += len(line) + 1
                if line.strip():
                    self._add(line)
            if len(rest) > CHUNK:  # no line of ours
                self.bad_lines, self._offset, rest = self.bad_lines + 1, size, b""
                return

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            step = _number(record["step"])
        except (ValueError, LookupError, TypeError, RecursionError):
            step = nan
        if not step >= 0:
            self.bad_lines += 1
            return
        self.last_step = max(self.last_step, step)
        for name, value in record.items():
            if type(value) not in NUMBERS or name == "step":
                continue
            number = value if type(value) is float and isfinite(value) else _number(value)
            if isnan(number):
                self.not_finite[name] = self.not_finite.get(name, 0) + 1
            one = self._values.get(name)
            if one is None:
                if len(self._values) >= NAMES:
                    continue
                one = self._values[name] = (array.array("d"), array.array("d"))
            one[0].append(step)
            one[1].append(number)

    @property
    def names(self) -> list[str]:
        """The names of the numbers, in the order of the file."""
        return list(self._values)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and values of a name: float64 ``[n]``, steps ascending; NaN where not finite."""
        steps, values = (np.array(one, np.float64) for one in self._values.get(name, ((), ())))
        order = np.argsort(steps, kind="stable")
        return steps[order], values[order]

    def last(self, name: str) -> float | None:
        """Return the last value of a name that is finite; None without one."""
        values = self.series(name)[1]
        values = values[np.isfinite(values)]
        return float(values[-1]) if values.size else None


@dataclasses.dataclass(frozen=True)
class Thinned:
    """A series as it is drawn.

    Attributes:
      step: float64 ``[n]``.
      value: float64 ``[n]``; NaN is a gap.
      mean: steps and values of the means of the buckets; None where the series was not thinned.
    """

    step: np.ndarray
    value: np.ndarray
    mean: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def line(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values without extremes: the means, or the series itself."""
        return self.mean or (self.step, self.value)


def thin(step: np.ndarray, value: np.ndarray, buckets: int) -> Thinned:
    """Keep the lowest and the highest value of each bucket of successive points, and the two ends.

    No peak is lost. Series of at most two points a bucket stay as they are.

    Args:
      step: float ``[n]``, ascending.
      value: float ``[n]``; where it is thinned, NaN is left out.
      buckets: how many, at least 1.

    >>> thinned = thin(np.arange(9.0), np.array([0, 5, 1, 2, 3, 2, 9, 1, 1.0]), 3)
    >>> thinned.step.tolist(), thinned.value.tolist()
    ([0.0, 1.0, 3.0, 4.0, 6.0, 7.0, 8.0], [0.0, 5.0, 2.0, 3.0, 9.0, 1.0, 1.0])
    >>> thinned.mean[1].round(2).tolist()
    [2.0, 2.33, 3.67]
    """
    if len(step) <= 2 * buckets:
        return Thinned(step, value)
    finite = np.isfinite(value)
    step, value = step[finite], value[finite]
    if len(step) <= 2 * buckets:
        return Thinned(step, value)
    starts = np.arange(buckets) * len(step) // buckets
    ends = np.append(starts[1:], len(step))
    kept = {0, len(step) - 1}
    for start, end in zip(starts, ends, strict=True):
        part = value[start:end]
        kept |= {int(start + part.argmin()), int(start + part.argmax())}
    places = np.array(sorted(kept))
    sizes = ends - starts
    means = (np.add.reduceat(step, starts) / sizes, np.add.reduceat(value, starts) / sizes)
    return Thinned(step[places], value[places], means)


def _identity(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size


def _number(value: Any) -> float:
    """Return a number as a float; NaN for null and for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return nan
    try:
        number = float(value)
    except OverflowError:
        return nan
    return number if isfinite(number) else nan
