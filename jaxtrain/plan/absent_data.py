"""Plan without the data: zeros in the shapes that a source describes stand for examples that are not here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.data import Source
from jaxtrain.experiment import Experiment

SPLITS = ("train", "valid", "test")
BATCHES = 10  # in a data set of unknown size


@dataclasses.dataclass(frozen=True, eq=False)
class AbsentData:
    """Zeros in place of a source's examples.

    Attributes:
      fields: one example, leading axis 1.
      n: the number of examples.
    """

    fields: Mapping[str, np.ndarray]
    n: int

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return zeros for each of ``indices``; they take no memory."""
        return {
            name: np.broadcast_to(array, (len(indices), *array.shape[1:]))
            for name, array in self.fields.items()
        }


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedAbsentData(AbsentData):
    """Zeros that are streamed, in place of a source with ``draw`` or one of unknown size.

    Attributes:
      known: whether ``n`` is the source's, not made up.
    """

    known: bool

    def draw(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Return ``gather(indices)``."""
        return self.gather(indices)


def describe_absent(experiment: Experiment) -> tuple[Experiment, tuple[str, ...]]:
    """Replace each source whose data are not on this machine by ``AbsentData``.

    Returns:
      The experiment, and a note for each such source.

    Raises:
      InputError: such a source does not describe its examples.
    """
    changes, notes = dict[str, Any](), list[str]()
    for split in SPLITS:
        source = getattr(experiment, split)
        reason = None if source is None else _absence(source)
        if reason is not None:
            stand_in = _stand_in(split, source, reason, experiment)
            changes[split] = stand_in
            how = "" if length_known(stand_in) else ", as streamed"
            notes.append(f"{split}: {reason}: planned from its description{how}")
    if not changes:
        return experiment, ()
    return dataclasses.replace(experiment, workers=0, **changes), tuple(notes)


def length_known(source: Source) -> bool:
    """Return whether ``len(source)`` is that of the data, here or not."""
    return not isinstance(source, StreamedAbsentData) or source.known


def _absence(source: Source) -> str | None:
    """Return why the data of ``source`` are not here; None if they are, or it describes nothing."""
    name = getattr(source, "name", type(source).__name__)
    prepared = getattr(source, "prepared", None)
    if prepared is not None and not prepared():
        return f"{name} is not prepared here"
    if not callable(getattr(source, "example", None)):
        return None
    try:
        len(source)
        source.gather(np.zeros(1, np.int64))
    except Exception as error:  # of a user's own source, too
        return f"{name} cannot be read here ({first_line(error)[:120]})"
    return None


def _stand_in(split: str, source: Source, reason: str, experiment: Experiment) -> AbsentData:
    describe = getattr(source, "example", None)
    example = describe() if callable(describe) else None
    if example is None:
        raise InputError(
            f"{split}: {reason}, and the shapes of its examples are unknown without it: prepare it, or give "
            "the source a method example() that returns one example, leading axis 1"
        )
    fields, n = {name: np.asarray(array) for name, array in example.items()}, _length(source)
    if n is not None and not hasattr(source, "draw"):
        return AbsentData(fields, n)
    made_up = BATCHES * max(experiment.batch, experiment.eval_batch or 0)
    return StreamedAbsentData(fields, n or made_up, n is not None)


def _length(source: Source) -> int | None:
    expected = getattr(source, "expected_length", None)
    try:
        return len(source) if expected is None else expected()
    except Exception:  # it counts what is not here
        return None
