"""Dispatching updates: one or several per compiled call, with a bounded number of calls in flight.

Dispatching a compiled call costs the host tens of microseconds, which can be longer than a short step takes.
``step.scan_steps`` puts several updates in one call; ``autotune`` measures whether that is faster.
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
from jaxtrain.program import Program
from jaxtrain.program.memory import abstract_args
from jaxtrain.sharding import multihost
from jaxtrain.step.packing import PackedMetrics
from jaxtrain.train.recompile import OneCompile


class InFlight:
    """Bounds the calls queued on the device by reading the metrics of an earlier one.

    By default it waits for the call before last, so the device always has work. Without a bound, queued
    programs with collectives can deadlock on CPU devices. The training loop reads metrics nowhere else.

    Args:
      most: calls that may be unfinished.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._queue: collections.deque[PackedMetrics] = collections.deque()
        self._on_cpu = jax.default_backend() == "cpu"

    def add(self, metrics: PackedMetrics) -> list[list[Metrics]]:
        """Queue the metrics of the call just dispatched; returns once at most ``most`` calls are unfinished.

        Returns:
          For each newly finished call, the metrics of its updates.
        """
        if not self._on_cpu:
            with jax.transfer_guard_device_to_host("allow"):
                for vector in metrics.vectors:
                    vector.copy_to_host_async()
        self._queue.append(metrics)
        heartbeat()
        return list(self._read(self._most))

    def drain(self) -> Iterator[list[Metrics]]:
        """Wait for every queued call in turn and return its metrics, as ``add`` does."""
        return self._read(0)

    def _read(self, most: int) -> Iterator[list[Metrics]]:
        while len(self._queue) > most:
            allow = contextlib.nullcontext() if self._on_cpu else jax.transfer_guard_device_to_host("allow")
            with allow:
                rows = self._queue.popleft().rows()
            yield rows


class Dispatch:
    """Runs the updates of ``program``, one or several per call.

    Args:
      program: what is run.
      note: shows a warning about a second compilation.
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
    """Compile the train step in a thread while this block runs; finished when the block is left.

    An error is left to the first call, which raises it again. Several processes compile with the first call
    instead, because they may have to compile together.
    """

    def compile() -> None:
        with contextlib.suppress(Exception):
            program.train_step.lower(*abstract_args(program)).compile()  # type: ignore[attr-defined]

    if multihost.process_count() > 1:
        yield
        return
    thread = threading.Thread(target=compile, name="compile")
    thread.start()
    try:
        yield
    finally:
        thread.join()
