"""Choosing ``steps_per_execution`` by measurement, once, when a run begins.

On CPUs convolutions run several times slower inside ``lax.scan`` than outside, so one choice for all models
would be wrong for some of them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxtrain.program import Program
from jaxtrain.sharding import multihost
from jaxtrain.step.packing import PackedMetrics
from jaxtrain.train.dispatch import InFlight

MIN_UPDATES = 5_000  # shorter runs are not worth a second compilation: at most 0.2 ms is saved per update
MAX_STEP_SECONDS = 5e-3  # dispatching is a small part of steps that take longer
WARMUP_UPDATES = 2  # timed to see how long an update takes at all: it may be seconds
MAX_COUNT = 32  # updates per call: at most 0.16 s, which a signal may have to wait
MIN_SPEEDUP = 1.05
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Choice:
    """How many updates one compiled call runs.

    Attributes:
      count: updates per call.
      why: the reason, for the record.
      seconds: median seconds per update, by updates per call, where they were measured.
    """

    count: int
    why: str
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The choice as JSON for ``config.json``."""
        measured = {"execution_seconds": self.seconds} if self.seconds else {}
        return {"steps_per_execution": self.count, "steps_per_execution_why": self.why, **measured}


def decide(program: Program, existing: Mapping[str, Any] | None, deterministic: bool) -> Choice:
    """Decide how many updates one compiled call runs.

    Args:
      program: what is run; its setting decides unless it is ``"auto"``.
      existing: the record of the run (``config.json``) where it has begun: its choice is reused.
      deterministic: nothing that is measured may decide.
    """
    setting = program.experiment.steps_per_execution
    if existing is not None:
        why = existing.get("steps_per_execution_why", "as the run began")
        return Choice(existing.get("steps_per_execution", 1), why)
    if setting != "auto":
        return Choice(setting, "as set")
    return Choice(1, "--deterministic") if deterministic else choose(program)


def choose(program: Program) -> Choice:
    """Measure whether several updates per call are faster; every process gets the same answer.

    Short runs and steps of 5 ms or more keep one update per call without compiling a second program.
    """
    if program.steps < MIN_UPDATES:
        return Choice(1, f"a run of fewer than {MIN_UPDATES:,} updates")
    trial = _Trial(program)
    trial.seconds(1, WARMUP_UPDATES)  # compiles
    one = multihost.broadcast_from_0(trial.seconds(1, WARMUP_UPDATES), "seconds of one update")
    if one >= MAX_STEP_SECONDS:
        return Choice(1, f"{1e3 * one:.1f} ms an update", {1: one})
    count = _even_count(program.cadence.shortest_interval(), MAX_COUNT)
    if count == 1:
        return Choice(1, "an evaluation or a checkpoint after every update", {1: one})
    trial.seconds(count)
    several = multihost.broadcast_from_0(trial.seconds(count), "seconds of several updates")
    times = {1: [one], count: [several]}
    if several < 2 * one:  # convolutions on a CPU are slower still and need no second look
        for number in range(ROUNDS):
            for each in (1, count) if number % 2 else (count, 1):
                times[each].append(trial.seconds(each))
    medians = [statistics.median(times[1]), statistics.median(times[count])]
    medians = multihost.broadcast_from_0(medians, "medians")
    why = f"{1e6 * medians[0]:.0f} µs an update one by one, {1e6 * medians[1]:.0f} µs {count} at once"
    faster = medians[0] > MIN_SPEEDUP * medians[1]
    return Choice(count if faster else 1, why, dict(zip((1, count), medians, strict=True)))


def _even_count(updates: int, most: int) -> int:
    """The largest count up to ``most`` that divides ``updates`` with a small remainder.

    >>> _even_count(196, 32), _even_count(23, 32), _even_count(100_000, 32), _even_count(1, 32)
    (28, 23, 32, 1)
    """
    return updates // -(-updates // most)


class _Trial:
    """Updates of a throw-away state, over the same batches again and again."""

    def __init__(self, program: Program) -> None:
        self._program, self._state = program, program.init()
        self._most = program.experiment.max_in_flight
        self._batch = program.train.batch(0)
        self._batches: dict[int, tuple[Any, Any]] = {}

    def seconds(self, count: int, updates: int = MAX_COUNT) -> float:
        """Seconds per update with ``count`` per call, over ``updates`` of them or one call."""
        updates = max(count, updates)
        in_flight, began = InFlight(self._most), time.perf_counter()
        for _ in range(updates // count):
            in_flight.add(self._dispatch(count))
        jax.block_until_ready(self._state)
        return (time.perf_counter() - began) / updates

    def _dispatch(self, count: int) -> PackedMetrics:
        program = self._program
        if count == 1:
            self._state, metrics = program.train_step(self._state, self._batch, program.key)
            return metrics
        if count not in self._batches:
            self._batches[count] = program.train.batches(0, count)
        batches, shared = self._batches[count]
        self._state, metrics = program.train_steps(self._state, batches, program.key, shared)
        return metrics
