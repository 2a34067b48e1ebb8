"""After which updates a run evaluates and saves, and how many updates one compiled call executes."""

from __future__ import annotations

import dataclasses
from typing import Self

from jaxtrain.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Cadence:
    """Pure functions of the step, so a resumed run evaluates, saves and dispatches where a fresh one does.

    Attributes:
      steps: updates in the run.
      steps_per_epoch: updates in one pass over the training examples.
      eval_every: updates from one evaluation to the next, at least 1 and perhaps fractional; None evaluates
        after the last update only.
      save_every: updates from one checkpoint to the next, likewise.
      validates: whether there is a validation set, which the last update is scored on.
      steps_per_execution: updates in one compiled call, where nothing falls between them.

    >>> cadence = Cadence(10, 4.0, eval_every=4.0, save_every=2.5, steps_per_execution=2)
    >>> [step for step in range(1, 11) if cadence.evaluates_after(step)]
    [4, 8]
    >>> [step for step in range(1, 11) if cadence.saves_after(step)]
    [3, 5, 8, 10]
    >>> [cadence.updates_per_call(step) for step in (0, 2, 3)]
    [2, 1, 1]
    """

    steps: int
    steps_per_epoch: float
    eval_every: float | None
    save_every: float
    validates: bool = False
    steps_per_execution: int = 1

    @classmethod
    def of(cls, experiment: Experiment, steps: int, steps_per_epoch: float, validates: bool) -> Self:
        """Return the cadence of ``experiment`` in updates; ``steps_per_execution="auto"`` starts as 1."""

        def updates(epochs: float) -> float:
            return max(1.0, epochs * steps_per_epoch)

        exp, several = experiment, experiment.steps_per_execution
        return cls(
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            eval_every=None if exp.eval_every is None else updates(exp.eval_every),
            save_every=updates(exp.save_every),
            validates=validates,
            steps_per_execution=1 if several == "auto" else several,
        )

    def epoch(self, step: int) -> float:
        """Return the position of update ``step`` in epochs."""
        return step / self.steps_per_epoch

    def evaluates_after(self, step: int) -> bool:
        """Return whether an evaluation follows update ``step``; the final one does not count."""
        if step == self.steps:
            return self.validates
        return self.eval_every is not None and _completes(step, step, self.eval_every)

    def saves_after(self, step: int) -> bool:
        """Return whether a checkpoint follows update ``step``."""
        return step == self.steps or _completes(step, step, self.save_every)

    def updates_per_call(self, step: int) -> int:
        """Return how many updates the call after update ``step`` runs: ``steps_per_execution`` or 1.

        It is 1 where an evaluation, a checkpoint or the end of the run would fall between these updates, so
        each of them is after the same update as in a run that dispatches one update at a time.
        """
        if self.steps_per_execution == 1:
            return 1
        first, last = step + 1, step + self.steps_per_execution - 1
        interrupted = last >= self.steps or any(_completes(first, last, every) for every in self._periods())
        return 1 if interrupted else self.steps_per_execution

    def shortest_interval(self) -> int:
        """Return the least number of updates from one evaluation or checkpoint to the next."""
        return min(self.steps, *(int(every) for every in self._periods()))

    def _periods(self) -> list[float]:
        return [every for every in (self.eval_every, self.save_every) if every is not None]


def _completes(first: int, last: int, every: float) -> bool:
    """Return whether one of the updates ``first`` to ``last`` completes a multiple of ``every`` updates."""
    return last // every > (first - 1) // every
