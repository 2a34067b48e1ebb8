"""How many updates are dispatched at once: chosen by measurement when a run begins."""

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

SHORTEST = 5_000  # updates of a run that are worth a second compilation: up to 0.2 ms are won at each


LONGEST = 5e-3  # seconds of a step, from which on dispatching it is too little of it


FEW = 2  # updates that are timed to see how long one takes at all: it may be seconds


MANY = 32  # updates tried at once: at most 0.16 s, which is how long a signal may have to wait


GAIN = 1.05  # how much faster several at once must be


ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Choice:
    """How many updates are dispatched at once, and why; ``seconds`` an update for each number measured."""

    count: int
    why: str
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For ``config.json``."""
        measured = {"dispatch_seconds": self.seconds} if self.seconds else {}
        return {"steps_per_execution": self.count, "steps_per_execution_why": self.why, **measured}


def decide(program: Program, begun: Mapping[str, Any] | None, deterministic: bool) -> Choice:
    """How many updates of ``program`` are dispatched at once.

    Args:
      program: what is run; its setting counts unless it is ``"auto"``.
      begun: the record of the run (``config.json``) where it has begun: then nothing is decided again.
      deterministic: what is measured may not decide anything.
    """
    asked = program.experiment.steps_per_execution
    if begun is not None:
        return Choice(
            begun.get("steps_per_execution", 1), begun.get("steps_per_execution_why", "as it began")
        )
    if asked != "auto":
        return Choice(asked, "as set")
    return Choice(1, "--deterministic") if deterministic else choose(program)


def choose(program: Program) -> Choice:
    """Measure whether several updates at once are faster; every process gets the same answer.

    Nothing is measured for a run so short that little can be won. Steps of 5 ms and more are timed, and no
    other program is compiled.
    """
    if program.steps < SHORTEST:
        return Choice(1, f"a run of fewer than {SHORTEST:,} updates")
    trial = _Trial(program)
    trial.seconds(1, FEW)  # compiles
    one = multihost.broadcast_from_0(trial.seconds(1, FEW), "seconds of an update")
    if one >= LONGEST:
        return Choice(1, f"{1e3 * one:.1f} ms an update", {1: one})
    count = _even(program.cadence.shortest_interval(), MANY)
    if count == 1:
        return Choice(1, "an evaluation or a checkpoint after every update", {1: one})
    trial.seconds(count)
    several = multihost.broadcast_from_0(trial.seconds(count), "seconds of several")
    times = {1: [one], count: [several]}
    if several < 2 * one:  # convolutions on a CPU are slower still, and need no second look
        for number in range(ROUNDS):
            for each in (1, count) if number % 2 else (count, 1):
                times[each].append(trial.seconds(each))
    found = multihost.broadcast_from_0(
        [statistics.median(times[1]), statistics.median(times[count])], "medians"
    )
    told = f"{1e6 * found[0]:.0f} µs an update one by one, {1e6 * found[1]:.0f} µs {count} at once"
    return Choice(count if found[0] > GAIN * found[1] else 1, told, dict(zip((1, count), found, strict=True)))


def _even(updates: int, most: int) -> int:
    """The largest number up to ``most`` that leaves few of ``updates`` over.

    >>> _even(196, 32), _even(23, 32), _even(100_000, 32), _even(1, 32)
    (28, 23, 32, 1)
    """
    return updates // -(-updates // most)


class _Trial:
    """Updates of a state that nobody needs, over the same batches again and again."""

    def __init__(self, program: Program) -> None:
        self._program, self._state = program, program.init()
        self._most = program.experiment.max_in_flight
        self._batch = program.train.batch(0)
        self._batches: dict[int, tuple[Any, Any]] = {}

    def seconds(self, count: int, updates: int = MANY) -> float:
        """Seconds of an update, ``count`` at once; ``updates`` are timed, or as many as a dispatch has."""
        updates = max(count, updates)
        flight, began = InFlight(self._most), time.perf_counter()
        for _ in range(updates // count):
            flight.add(self._dispatch(count))
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
