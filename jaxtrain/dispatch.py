"""How many updates are dispatched at once: carried out, and chosen by measurement.

Starting a program costs the host some tens of microseconds, which is more than the computation of a small
step takes. ``step.scan_steps`` makes one program of several updates. On CPUs convolutions run several times
slower inside such a loop, so that a choice for all models is wrong for some of them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxtrain import plan
from jaxtrain.packed import Packed
from jaxtrain.program import Program
from jaxtrain.recompile import OneCompile
from jaxtrain.sharding import processes
from jaxtrain.stop import alive
from jaxtrain.types import Metrics, State

SHORTEST = 5_000  # updates of a run that are worth a second compilation: up to 0.2 ms are won at each
LONGEST = 5e-3  # seconds of a step, from which on dispatching it is too little of it
FEW = 2  # updates that are timed to see how long one takes at all: it may be seconds
MANY = 32  # updates tried at once: at most 0.16 s, which is how long a signal may have to wait
GAIN = 1.05  # how much faster several at once must be
ROUNDS = 5


class InFlight:
    """Bounds the dispatches queued on the device by reading the metrics of an earlier one.

    Waiting for dispatch k - 2 costs nothing, and an unbounded queue of programs with collectives deadlocks.
    Nothing else in a run reads a metric.

    Args:
      most: dispatches that may be unfinished.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._queue: collections.deque[Packed] = collections.deque()
        self._far = jax.default_backend() != "cpu"

    def add(self, metrics: Packed) -> list[list[Metrics]]:
        """Note what was just dispatched; returns once at most ``most`` are unfinished.

        Returns:
          Of each dispatch that is finished now, and was not told of before, the metrics of its updates.
        """
        if self._far:
            with jax.transfer_guard_device_to_host("allow"):
                for vector in metrics.vectors:
                    vector.copy_to_host_async()
        self._queue.append(metrics)
        alive()
        return list(self._read(self._most))

    def settle(self) -> Iterator[list[Metrics]]:
        """The rest of what ``add`` returns, each of which is waited for when it is asked for."""
        return self._read(0)

    def _read(self, most: int) -> Iterator[list[Metrics]]:
        while len(self._queue) > most:
            with jax.transfer_guard_device_to_host("allow") if self._far else contextlib.nullcontext():
                rows = self._queue.popleft().rows()
            yield rows


class Dispatch:
    """Carries out the updates of ``program``, one or several at once.

    Args:
      program: what is run.
      note: shows a line, about a second compilation.
      strict: make that an error.
      mark: ``(phase, function) -> function`` whose calls a profile shows as that phase.
    """

    def __init__(
        self,
        program: Program,
        note: Callable[[str], None],
        strict: bool = False,
        mark: Callable[[str, Any], Any] = lambda phase, function: function,
    ) -> None:
        self._program, data = program, program.train
        self._batch, self._batches = (mark("waiting for data", each) for each in (data.batch, data.batches))
        one, several = (OneCompile(fn, 0, note, strict) for fn in (program.train_step, program.train_steps))
        self._one, self._several = mark("dispatch", one), mark("dispatch", several)

    def __call__(self, state: State, step: int, count: int) -> tuple[State, Packed]:
        """Dispatch the ``count`` updates after update ``step``; with several, metrics have a leading axis.

        Raises:
          RunError: as ``OneCompile``.
        """
        program = self._program
        if count == 1:
            return self._one(state, self._batch(step), program.key, at=step + 1)
        batches, shared = self._batches(step, count)
        return self._several(state, batches, program.key, shared, at=step + count)


@contextlib.contextmanager
def ahead(program: Program) -> Iterator[None]:
    """Compile what ``Dispatch`` will call while this block goes on; done when it is left.

    An error in it is left to the call. Several processes, which may compile together, do it with the call.
    """

    def compile() -> None:
        with contextlib.suppress(Exception):
            program.train_step.lower(*plan.call_like(program)).compile()  # type: ignore[attr-defined]

    if processes.count() > 1:
        yield
        return
    thread = threading.Thread(target=compile, name="compile")
    thread.start()
    try:
        yield
    finally:
        thread.join()


@dataclasses.dataclass(frozen=True)
class Choice:
    """How many updates are dispatched at once, and why; ``seconds`` an update for each number measured."""

    count: int
    why: str
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For ``config.json``."""
        measured = {"dispatch_seconds": self.seconds} if self.seconds else {}
        return {"steps_per_dispatch": self.count, "steps_per_dispatch_why": self.why, **measured}


def decide(program: Program, begun: Mapping[str, Any] | None, deterministic: bool) -> Choice:
    """How many updates of ``program`` are dispatched at once.

    Args:
      program: what is run; its setting counts unless it is ``"auto"``.
      begun: the record of the run (``config.json``) where it has begun: then nothing is decided again.
      deterministic: what is measured may not decide anything.
    """
    asked = program.experiment.steps_per_dispatch
    if begun is not None:
        return Choice(begun.get("steps_per_dispatch", 1), begun.get("steps_per_dispatch_why", "as it began"))
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
    one = processes.agree(trial.seconds(1, FEW), "seconds of an update")
    if one >= LONGEST:
        return Choice(1, f"{1e3 * one:.1f} ms an update", {1: one})
    count = _even(program.uninterrupted(), MANY)
    if count == 1:
        return Choice(1, "an evaluation or a checkpoint after every update", {1: one})
    trial.seconds(count)
    several = processes.agree(trial.seconds(count), "seconds of several")
    times = {1: [one], count: [several]}
    if several < 2 * one:  # convolutions on a CPU are slower still, and need no second look
        for number in range(ROUNDS):
            for each in (1, count) if number % 2 else (count, 1):
                times[each].append(trial.seconds(each))
    found = processes.agree([statistics.median(times[1]), statistics.median(times[count])], "medians")
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

    def _dispatch(self, count: int) -> Packed:
        program = self._program
        if count == 1:
            self._state, metrics = program.train_step(self._state, self._batch, program.key)
            return metrics
        if count not in self._batches:
            self._batches[count] = program.train.batches(0, count)
        batches, shared = self._batches[count]
        self._state, metrics = program.train_steps(self._state, batches, program.key, shared)
        return metrics
