"""The recorder: takes the metrics of every step, reads them one step late, writes them everywhere."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain import metrics as merging
from jaxtrain.errors import RunError
from jaxtrain.recorder.console import Console
from jaxtrain.recorder.files import Files
from jaxtrain.recorder.pace import Pace
from jaxtrain.types import Metrics

Position = Callable[[int], dict[str, float]]
Rates = Callable[[float], Mapping[str, float]]


def fetch(batches: Sequence[Metrics]) -> dict[str, Any]:
    """Merge the metrics of several steps on the host and finish them: ``{"loss": 1.2, ...}``.

    Waits for the device. Nothing else in a run reads a metric's value, but ``watch`` the guard's.
    """
    return _merged(_read(batches))


def _read(batches: Sequence[Metrics]) -> list[Metrics]:
    """The same on the host, in float64 where they are no integers."""
    leaves, tree = jax.tree.flatten(list(batches))
    with jax.transfer_guard_device_to_host("allow"):
        if jax.default_backend() != "cpu":  # start every copy before waiting for the first
            for leaf in leaves:
                leaf.copy_to_host_async()
        # Not jax.device_get, which for 300 scalars on a CPU takes eight times as long.
        arrays = [np.asarray(leaf) for leaf in leaves]
    # float32 counts up to 2^24 only: add in float64.
    arrays = [a.astype(np.float64) if np.issubdtype(a.dtype, np.floating) else a for a in arrays]
    return list(jax.tree.unflatten(tree, arrays))


def _merged(hosts: Sequence[Metrics]) -> dict[str, Any]:
    """Metrics of several steps, merged and finished."""
    total: dict[str, Any] | None = None
    for host in hosts:
        total = merging.merge(total, host)
    return {name: metric.compute() for name, metric in (total or {}).items()}


@contextlib.contextmanager
def open(
    workdir: Path | None,
    console: Console,
    *,
    start: int,
    log_every: int,
    examples: int,
    position: Position = lambda step: {},
    guarded: bool = False,
    queued: int = 2,
    rates: Rates = lambda seconds: {},
) -> Iterator[Recorder]:
    """A recorder that continues the run's files at step ``start``.

    Args:
      workdir: the run's folder; None writes no files (another process does).
      console: where a person is watching.
      start: the step the run goes on from; later lines of an interrupted run are dropped.
      log_every: steps between records.
      examples: global batch size.
      position: ``step -> numbers`` to write beside the metrics of that step (epoch, learning rate).
      guarded: bad updates were left out of the metrics (``guard="skip"``), so that one which is not finite is
        that of no update at all: it is not written, and no error.
      queued: dispatches that the device may be behind (``max_in_flight``), for the step times.
      rates: ``seconds of an update -> numbers`` to write beside the examples a second.
    """
    recorder = Recorder(workdir, console, start, log_every, examples, position, guarded, queued, rates)
    try:
        yield recorder
        recorder.flush()
    finally:
        recorder.close()


class Recorder:
    """Collects metrics and writes one record every ``log_every`` steps. Made by ``open``."""

    def __init__(
        self,
        workdir: Path | None,
        console: Console,
        start: int,
        log_every: int,
        examples: int,
        position: Position,
        guarded: bool = False,
        queued: int = 2,
        rates: Rates = lambda seconds: {},
    ) -> None:
        self._console, self._log_every, self._examples = console, log_every, examples
        self._position, self._guarded, self._rates = position, guarded, rates
        self._files = None if workdir is None else Files(workdir, start)
        self._window: list[tuple[int, int, Metrics]] = []  # the last update, how many, theirs
        self._ready: list[tuple[int, Metrics]] = []  # read, and not yet written
        self._due = False
        self._clock: float | None = None
        self._ticked = 0  # steps since the clock started
        self._steps, self._seconds = 0, 0.0
        self.pace = Pace(queued)

    def speed(self) -> dict[str, float | None]:
        """Of training by this process so far, without compilation, evaluation and saving.

        ``examples_per_second``, None where nothing was timed, and the ``rates``.
        """
        return {"examples_per_second": None, **self._speed(self._steps, self._seconds)}

    @property
    def due(self) -> bool:
        """Will the next ``step`` read those before it?"""
        return self._due

    def step(self, step: int, metrics: Metrics, count: int = 1) -> None:
        """Take the metrics of update ``step`` (from 1) without waiting for them.

        Args:
          step: the update, the last of ``count``.
          metrics: of the update; with a leading axis where they are of several.
          count: updates that were dispatched at once.
        """
        if self._due:
            self._write(whole=True)
        self.pace.tick(count)
        if self._clock is None:  # the first step compiled before it returned
            self._clock, self._ticked = time.perf_counter(), -count
        self._window.append((step, count, metrics))
        self._ticked += count
        self._due = step // self._log_every > (step - count) // self._log_every

    def flush(self) -> None:
        """Read and write the steps taken so far.

        Raises:
          RunError: the loss or the gradient is not finite.
        """
        self._write(whole=False)

    def _write(self, whole: bool) -> None:
        """A record for every ``log_every`` steps; of those that are left too, unless only ``whole`` ones."""
        self._due = False
        hosts = _read([metrics for _, _, metrics in self._window])
        for (last, count, _), host in zip(self._window, hosts, strict=True):
            self._ready += [(last, host)] if count == 1 else _apart(last, count, host)
        self._window = []
        ends = [k for k, (step, _) in enumerate(self._ready, start=1) if step % self._log_every == 0]
        if not whole and self._ready and len(self._ready) not in ends:
            ends.append(len(self._ready))
        told: dict[str, float] = {}
        start = 0
        if ends:
            told = {**self._lap(), **self.pace.lap()}
        for end in ends:
            self._record(self._ready[start:end], told)
            start = end
        self._ready = self._ready[start:]

    def _record(self, taken: Sequence[tuple[int, Metrics]], speed: Mapping[str, float]) -> None:
        values, step = _merged([metrics for _, metrics in taken]), taken[-1][0]
        if self._guarded:
            values = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values.get(name, 0.0)):
                raise RunError(
                    f"{name} is {values[name]} by step {step}: lower the learning rate, clip "
                    "gradients (--set optimizer.clip=1), or look at the data; earlier checkpoints are kept"
                )
        record = self._position(step) | {f"train/{name}": value for name, value in values.items()}
        self.scalars(step, {**record, **speed})
        self._console.train(step, values, speed.get("examples_per_second"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write finished numbers for ``step`` to the files; anything but numbers is left out."""
        if self._files is not None:
            self._files.write(step, {k: float(v) for k, v in values.items() if isinstance(v, int | float)})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block does not count as training."""
        self.flush()
        yield
        self._clock, self._ticked = time.perf_counter(), 0
        self.pace.pause()

    def close(self) -> None:
        """Close the files."""
        if self._files is not None:
            self._files.close()

    def _lap(self) -> dict[str, float]:
        """The speed since the last record, nothing before anything was timed."""
        now = time.perf_counter()
        seconds, steps = now - (self._clock or now), self._ticked
        self._clock, self._ticked = now, 0
        found = self._speed(steps, seconds)
        if found:
            self._steps += steps
            self._seconds += seconds
        return found

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        if steps <= 0 or seconds <= 0:
            return {}
        return {"examples_per_second": steps * self._examples / seconds, **self._rates(seconds / steps)}


def _apart(last: int, count: int, host: Metrics) -> list[tuple[int, Metrics]]:
    """The metrics of ``count`` updates, ``last`` the last of them, each by itself."""
    leaves, tree = jax.tree.flatten(host)
    rows = zip(*leaves, strict=True)
    return [(last - count + 1 + k, jax.tree.unflatten(tree, row)) for k, row in enumerate(rows)]
