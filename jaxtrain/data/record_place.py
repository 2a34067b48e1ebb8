"""Where an example lies in the files of a data set, so that an error can name the file and the record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def place(files: Sequence[Any], index: int) -> tuple[str, int]:
    """The file of example ``index``, and the number of its record there, from 0.

    Args:
      files: TFDS's ``FileInstruction`` of a split: ``filename``, and its records ``skip`` to ``skip + take``.
      index: the example's number in the split.

    Raises:
      IndexError: the split has no such example.
    """
    for file in files:
        if index < file.take:
            return str(file.filename), file.skip + index
        index -= file.take
    raise IndexError(f"{index} examples too many")


def first_bad(indices: Sequence[int], read: Callable[[list[int]], Any]) -> tuple[int, Exception] | None:
    """The first of ``indices`` that ``read`` fails for by itself, and how; None where it reads each.

    >>> first_bad([4, 0, 2], lambda one: 1 / one[0])
    (0, ZeroDivisionError('division by zero'))
    """
    for index in indices:
        try:
            read([index])
        except Exception as error:
            return index, error
    return None
