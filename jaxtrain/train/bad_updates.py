"""The host's side of the guard: judges the figures of finished updates, and ends a run that goes wrong."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.core.errors import RunError
from jaxtrain.core.files import write_json
from jaxtrain.core.types import Metrics
from jaxtrain.program import Program
from jaxtrain.sharding import multihost
from jaxtrain.step import guard
from jaxtrain.train.bad_examples import BadField, locate

MAX_SKIPS_IN_A_ROW = (
    5  # skipped one after another: so many different batches are not all bad, the parameters are
)
LOSS_WINDOW = 50  # steps that the loss is averaged over, and that must have been seen before a spike is one
BAD_BATCH_FILE = "bad_batch.json"


class BadUpdateMonitor:
    """Judges ``metrics["guard"]`` of every update, on the host.

    Args:
      program: what is run; ``experiment.guard`` and ``experiment.max_loss_spike`` say what is a fault.
      folder: where ``bad_batch.json`` is written when the run ends; None writes none.
      note: shows a line.
    """

    def __init__(self, program: Program, folder: Path | None, note: Callable[[str], None]) -> None:
        self._program, self._folder, self._note = program, folder, note
        self._row, self._told = 0, False  # skipped one after another; has a skip been shown?
        self._average, self._seen = 0.0, 0

    def judge(self, step: int, metrics: Metrics) -> None:
        """Take the figures of update ``step`` out of its metrics, and judge it.

        Raises:
          RunError: the update was bad; ``bad_batch.json`` tells which examples it was of.
        """
        figures = metrics.pop(guard.GUARD, None)
        if figures is not None:
            self._judge(step, figures.figures())

    def _judge(self, step: int, figures: Mapping[str, float]) -> None:
        wrong = guard.bad_figures(figures)
        if not wrong:
            self._row = 0
            self._spiked(step, figures)
            return
        self._row += 1
        what = f"{wrong[0]} at step {step}"
        if self._program.experiment.guard == "skip" and self._row <= MAX_SKIPS_IN_A_ROW:
            if not self._told:
                self._told = True
                self._note(f"{what}: the update is skipped, and the metric skipped counts such from here on")
            return
        row = f", the {self._row}th bad update in a row" if self._row > 1 else ""
        found = self._found(step)
        fix = "lower the learning rate, clip gradients (--set optimizer.clip=1), or look at the data"
        if found:
            stage = any(one.stage for one in found)
            fix = "look at the stages" if stage else "mend these examples, or leave them out (data.Subset)"
        elif figures[guard.BAD_LABELS]:
            fix = "look at what the source and augment make of the labels"
        skip = "" if self._row > 1 else "; --set guard=skip leaves such batches out"
        kept = "the update was not applied, and earlier checkpoints are kept; "
        told = "".join(f"{one.text}; " for one in found)
        self._end(f"{what}{row}: {kept}{told}", f"; {fix}{skip}", step, figures, found)

    def _spiked(self, step: int, figures: Mapping[str, float]) -> None:
        """End the run for a loss far above its running average, where that is asked for."""
        spike, loss = self._program.experiment.max_loss_spike, figures["loss"]
        if spike is None:
            return
        if self._seen >= LOSS_WINDOW and 0 < spike * self._average < loss:
            self._end(
                f"loss {loss:.4g} at step {step} is above max_loss_spike={spike:g} times its average of "
                f"{self._average:.4g}; earlier checkpoints are kept; ",
                "; lower the learning rate, raise max_loss_spike, or look at the data",
                step,
                {**figures, "average_loss": self._average},
            )
        self._seen += 1
        self._average += (loss - self._average) / min(self._seen, LOSS_WINDOW)

    def _found(self, step: int) -> list[BadField]:
        """What is wrong with the examples of the batch; nothing where they cannot be read once more."""
        with contextlib.suppress(Exception):  # whatever goes wrong here must not hide the fault itself
            return locate(self._program, step)
        return []

    def _end(
        self,
        what: str,
        fix: str,
        step: int,
        figures: Mapping[str, float],
        found: Sequence[BadField] = (),
    ) -> None:
        where = "its examples are not recorded"
        if self._folder is not None:
            where = f"its examples are in {self._folder / BAD_BATCH_FILE}"
            if multihost.is_process_0():
                try:
                    write_json(self._folder / BAD_BATCH_FILE, self._record(step, figures, found))
                except OSError as error:
                    path = self._folder / BAD_BATCH_FILE
                    where = f"its examples could not be written to {path}: {error.strerror}"
        raise RunError(what + where + fix)

    def _record(self, step: int, figures: Mapping[str, float], found: Sequence[BadField]) -> dict[str, Any]:
        """JSON, which has no NaN: what is not finite is a string."""
        return {
            "step": step,
            "figures": {name: x if math.isfinite(x) else str(x) for name, x in figures.items()},
            "examples": np.asarray(self._program.example_ids(step)).tolist(),
            "fields": {one.field: one.record for one in found},
        }
