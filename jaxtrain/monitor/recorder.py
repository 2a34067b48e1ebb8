"""Record a run: merge the metrics of finished updates and write them to the files and the console."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrain import metrics as metric_states
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import not_finite, null_line
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Metrics
from jaxtrain.monitor.console import Console
from jaxtrain.monitor.files import Files
from jaxtrain.monitor.observers import Observers
from jaxtrain.monitor.step_times import StepTimes

Position = Callable[[int], dict[str, float]]
Rates = Callable[[float], Mapping[str, float]]


def merge_all(rows: Iterable[Metrics]) -> dict[str, Any]:
    """Merge metrics of several updates or batches on the host and compute them: ``{"loss": 1.2, ...}``.

    A metric is a number, or a table: an array, a list or a dict.

    Raises:
      RunError: ``compute`` of a metric raises.
    """
    return {name: _compute(name, metric) for name, metric in _merge(rows).items()}


def split_tables(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split computed metrics into numbers and tables.

    >>> split_tables({"loss": 0.5, "recall": [0.25, 1.0]})
    ({'loss': 0.5}, {'recall': [0.25, 1.0]})
    """
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return numbers, {name: value for name, value in values.items() if name not in numbers}


def _merge(rows: Iterable[Metrics]) -> Metrics:
    total: dict[str, Any] | None = None
    for row in rows:
        total = metric_states.merge(total, row)
    return total or {}


def _compute(name: str, metric: Any) -> Any:
    """Return a computed metric, with the numbers of NumPy and JAX as Python numbers."""
    try:
        value = metric.compute()
    except (InputError, RunError):
        raise
    except Exception as error:  # user code: anything may come out of it
        raise RunError(
            f"the metric {name!r} cannot be computed: {type(error).__name__}: {first_line(error)}; let its "
            "compute() return NaN where it is undefined"
        ) from error
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


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
    rates: Rates = lambda seconds: {},
    observers: Observers | None = None,
) -> Iterator[Recorder]:
    """Open a recorder that continues the run's files at step ``start``.

    Args:
      workdir: the run's folder; None writes no files (process 0 does).
      console: where records are shown.
      start: the step the run resumes from; later records of an interrupted run are dropped.
      log_every: steps between records.
      examples: global batch size.
      position: ``step -> numbers`` to add to the record of that step (epoch, learning rate).
      guarded: with ``guard="skip"``, non-finite values come from skipped updates and are dropped.
      rates: ``seconds per update -> numbers`` to add to the record with the examples per second.
      observers: of the run; only where files are written.
    """
    recorder = Recorder(workdir, console, start, log_every, examples, position, guarded, rates, observers)
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
        rates: Rates = lambda seconds: {},
        observers: Observers | None = None,
    ) -> None:
        self._console, self._log_every, self._examples = console, log_every, examples
        self._position, self._guarded, self._rates = position, guarded, rates
        self._files = None if workdir is None else Files(workdir, start)
        self._observers = observers or Observers()
        if self._files is not None:
            self._observers.begin(start)
        self._window: list[Metrics] = []  # not yet written; ``_last`` is their last update
        self._last = start
        self._clock: float | None = None
        self._ticked = 0  # updates since the clock started
        self._steps, self._seconds = 0, 0.0
        self._null_shown = False
        self.step_times = StepTimes()

    def speed(self) -> dict[str, float | None]:
        """Return the speed of training by this process so far, without compilation, evaluation and saving.

        The keys are ``examples_per_second``, None where nothing was timed, and those of ``rates``.
        """
        return {"examples_per_second": None, **self._speed(self._steps, self._seconds)}

    def step(self, step: int, rows: Sequence[Metrics]) -> None:
        """Add the metrics of the finished updates of one dispatch, on the host.

        Args:
          step: the last of these updates, from 1.
          rows: the metrics of each update.

        Raises:
          RunError: the loss or the gradient is not finite.
        """
        self.step_times.tick(len(rows))
        if self._clock is None:  # the first step compiled before it returned
            self._clock, self._ticked = time.perf_counter(), -len(rows)
        self._ticked += len(rows)
        speed: dict[str, float] | None = None  # shared by all records of this dispatch
        for self._last, metrics in enumerate(rows, start=step - len(rows) + 1):
            self._window.append(metrics)
            if self._last % self._log_every == 0:
                speed = self._speed_since_last() if speed is None else speed
                self._write(speed)

    def flush(self) -> None:
        """Write a record of the updates since the last record.

        Raises:
          RunError: the loss or the gradient is not finite.
        """
        if self._window:
            self._write(self._speed_since_last())

    def _write(self, speed: Mapping[str, float]) -> None:
        merged, step = _merge(self._window), self._last
        values, self._window = merge_all([merged]), []
        if self._guarded:
            values = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        for name in ("loss", "grad_norm"):
            metric, value = merged.get(name), values.get(name)
            if isinstance(metric, metric_states.Mean) and not metric.count:
                continue  # every label of these updates was ignored
            if isinstance(value, float) and not math.isfinite(value):
                raise RunError(
                    f"{name} is {values[name]} by step {step}: lower the learning rate, clip gradients "
                    "(--set optimizer.clip=1), or check the data; earlier checkpoints are kept"
                )
        record = self._position(step) | {f"train/{name}": value for name, value in values.items()}
        self.scalars(step, {**record, **speed})
        self._console.train(step, values, speed.get("examples_per_second"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write computed numbers of ``step`` to the files; tables are left out."""
        if self._files is None:
            return
        numbers = {name: float(value) for name, value in split_tables(values)[0].items()}
        self._files.write(step, numbers)
        self._observers.recorded()
        names = [] if self._null_shown else not_finite(numbers)
        if names:
            self._null_shown = True
            self._console.note(f"step {step}: {null_line('metrics.jsonl', names)} (shown once)")

    def evaluation(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Write the metrics of an evaluation, and show them to the observers."""
        self.scalars(step, {f"{split}/{name}": value for name, value in values.items()})
        if self._files is not None:
            self._observers.evaluated(step, split, values)

    def pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Write PNGs of ``step`` by name, for TensorBoard."""
        if self._files is not None:
            self._files.write_pictures(step, pictures)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of this block from training."""
        self.flush()
        yield
        self._clock, self._ticked = time.perf_counter(), 0
        self.step_times.pause()

    def close(self) -> None:
        """Close the files."""
        if self._files is not None:
            self._files.close()

    def _speed_since_last(self) -> dict[str, float]:
        """Return the speed since the last record; empty before anything was timed."""
        now = time.perf_counter()
        seconds, steps = now - (self._clock or now), self._ticked
        self._clock, self._ticked = now, 0
        found = self._speed(steps, seconds)
        if found:
            self._steps += steps
            self._seconds += seconds
        return {**found, **self.step_times.window()}

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        if steps <= 0 or seconds <= 0:
            return {}
        return {"examples_per_second": steps * self._examples / seconds, **self._rates(seconds / steps)}
