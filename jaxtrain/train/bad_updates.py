"""The host's side of the guard: checks the values of finished updates, and ends a run that goes wrong."""

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

MAX_SKIPS_IN_A_ROW = 5  # more than that is not bad batches but bad parameters
LOSS_WINDOW = 50  # steps that the loss is averaged over, and steps before a spike is looked for
BAD_BATCH_FILE = "bad_batch.json"


class BadUpdateMonitor:
    """Checks ``metrics["guard"]`` of every update on the host.

    Args:
      program: what is run; ``experiment.guard`` and ``experiment.max_loss_spike`` say what is a fault.
      folder: where ``bad_batch.json`` is written when the run ends; None writes none.
      note: shows a line.
    """

    def __init__(self, program: Program, folder: Path | None, note: Callable[[str], None]) -> None:
        self._program, self._folder, self._note = program, folder, note
        self._skipped_in_a_row, self._skip_shown = 0, False
        self._average_loss, self._steps_averaged = 0.0, 0

    def judge(self, step: int, metrics: Metrics) -> None:
        """Take the guard's values of update ``step`` out of its metrics and check them.

        Raises:
          RunError: the update was bad; ``bad_batch.json`` lists its examples.
        """
        values = metrics.pop(guard.GUARD, None)
        if values is not None:
            self._judge(step, values.by_name())

    def _judge(self, step: int, values: Mapping[str, float]) -> None:
        wrong = guard.bad_values(values)
        if not wrong:
            self._skipped_in_a_row = 0
            self._check_spike(step, values)
            return
        self._skipped_in_a_row += 1
        count, what = self._skipped_in_a_row, f"{wrong[0]} at step {step}"
        if self._program.experiment.guard == "skip" and count <= MAX_SKIPS_IN_A_ROW:
            if not self._skip_shown:
                self._skip_shown = True
                self._note(f"{what}: the update is skipped; the metric skipped counts skipped updates")
            return
        in_a_row = f", the {count}th bad update in a row" if count > 1 else ""
        fields = self._bad_fields(step)
        fix = "lower the learning rate, clip gradients (--set optimizer.clip=1), or look at the data"
        if fields:
            by_stage = any(field.stage for field in fields)
            fix = "look at the stages" if by_stage else "fix these examples, or leave them out (data.Subset)"
        elif values[guard.BAD_LABELS]:
            fix = "look at what the source and augment make of the labels"
        skip = "" if count > 1 else "; --set guard=skip leaves such batches out"
        applied = "the update was not applied, and earlier checkpoints are kept; "
        where = "".join(f"{field.text}; " for field in fields)
        self._end_run(f"{what}{in_a_row}: {applied}{where}", f"; {fix}{skip}", step, values, fields)

    def _check_spike(self, step: int, values: Mapping[str, float]) -> None:
        """End the run when the loss is more than ``max_loss_spike`` times its running average."""
        limit, loss = self._program.experiment.max_loss_spike, values["loss"]
        if limit is None:
            return
        if self._steps_averaged >= LOSS_WINDOW and 0 < limit * self._average_loss < loss:
            self._end_run(
                f"loss {loss:.4g} at step {step} is above max_loss_spike={limit:g} times its average of "
                f"{self._average_loss:.4g}; earlier checkpoints are kept; ",
                "; lower the learning rate, raise max_loss_spike, or look at the data",
                step,
                {**values, "average_loss": self._average_loss},
            )
        self._steps_averaged += 1
        self._average_loss += (loss - self._average_loss) / min(self._steps_averaged, LOSS_WINDOW)

    def _bad_fields(self, step: int) -> list[BadField]:
        """What is wrong with the examples of the batch; empty where they cannot be read again."""
        with contextlib.suppress(Exception):  # an error here must not hide the bad update
            return locate(self._program, step)
        return []

    def _end_run(
        self,
        what: str,
        fix: str,
        step: int,
        values: Mapping[str, float],
        fields: Sequence[BadField] = (),
    ) -> None:
        where = "its examples are not recorded"
        if self._folder is not None:
            path = self._folder / BAD_BATCH_FILE
            where = f"its examples are in {path}"
            if multihost.is_process_0():
                try:
                    write_json(path, self._record(step, values, fields))
                except OSError as error:
                    where = f"its examples could not be written to {path}: {error.strerror}"
        raise RunError(what + where + fix)

    def _record(self, step: int, values: Mapping[str, float], fields: Sequence[BadField]) -> dict[str, Any]:
        """The bad batch as JSON, which has no NaN: numbers that are not finite become strings."""
        return {
            "step": step,
            "values": {name: x if math.isfinite(x) else str(x) for name, x in values.items()},
            "examples": np.asarray(self._program.example_ids(step)).tolist(),
            "fields": {field.field: field.record for field in fields},
        }
