"""How many updates are dispatched at once: carried out, and chosen by measurement.

Starting a program costs the host some tens of microseconds, which is more than the computation of a small
step takes. ``step.scan_steps`` makes one program of several updates. On CPUs convolutions run several times
slower inside such a loop, so that a choice for all models is wrong for some of them.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxtrain.core.signals import heartbeat
from jaxtrain.core.types import Metrics, State
from jaxtrain.program import Program, memory
from jaxtrain.sharding import multihost
from jaxtrain.step.packing import PackedMetrics
from jaxtrain.train.recompile import OneCompile


class InFlight:
    """Bounds the dispatches queued on the device by reading the metrics of an earlier one.

    Waiting for dispatch k - 2 costs nothing, and an unbounded queue of programs with collectives deadlocks.
    Nothing else in a run reads a metric.

    Args:
      most: dispatches that may be unfinished.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._queue: collections.deque[PackedMetrics] = collections.deque()
        self._far = jax.default_backend() != "cpu"

    def add(self, metrics: PackedMetrics) -> list[list[Metrics]]:
        """Note what was just dispatched; returns once at most ``most`` are unfinished.

        Returns:
          Of each dispatch that is finished now, and was not told of before, the metrics of its updates.
        """
        if self._far:
            with jax.transfer_guard_device_to_host("allow"):
                for vector in metrics.vectors:
                    vector.copy_to_host_async()
        self._queue.append(metrics)
        heartbeat()
        return list(self._read(self._most))

    def drain(self) -> Iterator[list[Metrics]]:
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

    def __call__(self, state: State, step: int, count: int) -> tuple[State, PackedMetrics]:
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
def compile_in_background(program: Program) -> Iterator[None]:
    """Compile what ``Dispatch`` will call while this block goes on; done when it is left.

    An error in it is left to the call. Several processes, which may compile together, do it with the call.
    """

    def compile() -> None:
        with contextlib.suppress(Exception):
            program.train_step.lower(*memory.abstract_args(program)).compile()  # type: ignore[attr-defined]

    if multihost.process_count() > 1:
        yield
        return
    thread = threading.Thread(target=compile, name="compile")
    thread.start()
    try:
        yield
    finally:
        thread.join()
