"""What observes a run and cannot change it: trackers, and the functions on_evaluation and on_save."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtrain.core.signals import Stopped
from jaxtrain.core.text import first_line
from jaxtrain.monitor.trackers import FINISH, FINISH_EARLY, Trackers


class Evaluation(NamedTuple):
    """An evaluation: ``values`` are the metrics of ``split`` (``"valid"`` or ``"test"``) after ``step``."""

    step: int
    split: str
    values: Mapping[str, Any]


class Save(NamedTuple):
    """A checkpoint that is complete: ``path`` is the folder of ``step``."""

    step: int
    path: Path


class Observers:
    """The trackers and functions that observe a run, on process 0.

    An error of a function is a line, and the run goes on. What it gets is its own copy.

    Args:
      note: prints a line for the user.
      trackers: those of the run; None for none.
      on_evaluation: called in the training thread after each evaluation of a run.
      on_save: called in the thread that writes checkpoints when one is complete.
    """

    def __init__(
        self,
        note: Callable[[str], None] = print,
        trackers: Trackers | None = None,
        on_evaluation: Callable[[Evaluation], object] | None = None,
        on_save: Callable[[Save], object] | None = None,
    ) -> None:
        self._note, self._trackers = note, trackers
        self._on_evaluation, self._on_save = on_evaluation, on_save

    def begin(self, start: int) -> None:
        """Start the trackers, once ``metrics.jsonl`` ends with the records of step ``start``."""
        if self._trackers is not None:
            self._trackers.begin(start)

    def recorded(self) -> None:
        """Look after the trackers when a record has been written."""
        if self._trackers is not None:
            self._trackers.check()

    def evaluated(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Call ``on_evaluation``."""
        if self._on_evaluation is not None:
            own = MappingProxyType(copy.deepcopy(dict(values)))
            self._call("on_evaluation", self._on_evaluation, Evaluation(step, split, own))

    def saved(self, step: int, path: Path) -> None:
        """Call ``on_save``."""
        if self._on_save is not None:
            self._call("on_save", self._on_save, Save(step, path))

    def end(self, status: str) -> None:
        """Wait for the trackers, a limited time."""
        if self._trackers is not None:
            self._trackers.end(status, FINISH if status == "finished" else FINISH_EARLY)

    def _call(self, name: str, function: Callable[[Any], object], record: Any) -> None:
        try:
            function(record)
        except (Exception, SystemExit) as error:
            where = f"step {record.step}: {name} failed ({type(error).__name__}: {first_line(error)})"
            self._note(f"WARNING: {where}; training continues")


@contextlib.contextmanager
def observe(observers: Observers) -> Iterator[Observers]:
    """Yield ``observers`` for one run, and end them with its status."""
    status = "failed"
    try:
        yield observers
        status = "finished"
    except Stopped:
        status = "stopped"
        raise
    finally:
        observers.end(status)
