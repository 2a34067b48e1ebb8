"""``--profile START:STOP``: trace some updates of a run and show where their time went."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxtrain.core.errors import InputError
from jaxtrain.core.files import write_json
from jaxtrain.core.signals import heartbeat
from jaxtrain.monitor import Console, Recorder, make_console, op_names, xplane
from jaxtrain.monitor.time_shares import Shares, shares
from jaxtrain.sharding import multihost

F = TypeVar("F", bound=Callable[..., Any])

FILE = "where.json"
FOLDER = "profile"
TOP = 10  # rows of the printed table
WARMUP = 3  # updates traced before the window, which keep the profiler's own startup out of it


def parse_window(text: str | None, steps: int | None = None) -> tuple[int, int] | None:
    """Parse ``"20:40"`` into (20, 40), the first and the last update to profile; None stays None.

    Args:
      text: the value of ``--profile``.
      steps: updates of the entire run, where they are known.

    Raises:
      InputError: the text is no such range, or the range begins after the run's end.

    >>> parse_window("20:40")
    (20, 40)
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(
            f"--profile {text}: give the first and the last update to profile as START:STOP, "
            "with 1 <= START <= STOP, below 10^18"
        )
    first, last = int(match[1]), int(match[2])
    if steps is not None and first > steps:
        raise InputError(f"--profile {text}: the run has only {steps} updates; choose an earlier range")
    return first, last


def mark(phase: str) -> Callable[[F], F]:
    """Return a decorator that shows calls of a function in a trace as ``phase`` of the loop.

    A call costs some microseconds even while no trace is taken, so use it on functions that are called
    rarely; ``Trace.mark`` is for what every update calls.
    """
    return functools.partial(jax.profiler.annotate_function, name=xplane.MARK + phase)


class Trace:
    """Traces the updates ``first`` to ``last`` and shows where their time went.

    The window begins and ends with an empty device queue, so it holds exactly the work of these updates; the
    device's wait for the first dispatch is part of it. Tracing begins some updates early. The figures are of
    this process's devices.

    Args:
      updates: the first and the last update, numbered from 1 in the entire run; None takes no trace.
      folder: the run's folder; the trace goes to ``profile`` in it.
      console: where the table is shown.
      devices: how many of this process's devices the run uses.
    """

    def __init__(
        self,
        updates: tuple[int, int] | None,
        folder: Path,
        console: Console,
        devices: int,
    ) -> None:
        self._updates, self._console, self._devices = updates, console, devices
        self._folder = folder / FOLDER
        self._trace_from: int | None = None  # the first update to trace; None: nothing (more) to trace
        self._first = self._last = self._latest = 0
        self._planned = (0, 0)
        self._running = False
        self._seen: set[int] = set()  # how many updates the dispatches so far computed
        self._marks: list[jax.profiler.TraceAnnotation] = []  # open ones: the window's, and the update's

    def mark(self, phase: str, function: F) -> F:
        """Show calls of ``function`` in the trace as ``phase``; without ``--profile`` return it unchanged."""
        return function if self._updates is None else mark(phase)(function)

    def flag(self, step: int) -> dict[str, float]:
        """Return ``{"profiled": 1}`` for records of traced updates, which are slower; else nothing."""
        return {"profiled": 1.0} if self._running else {}

    def begin(self, start: int, steps: int) -> None:
        """Choose the updates to profile in a run that resumes after ``start`` of ``steps`` updates."""
        if self._updates is None:
            return
        first, last = max(self._updates[0], start + 1), min(self._updates[1], steps)
        flag = f"--profile {self._updates[0]}:{self._updates[1]}"
        if first > last:
            self._console.note(f"{flag}: nothing to profile, the run resumes after update {start} of {steps}")
            return
        if (first, last) != self._updates:
            self._console.note(
                f"{flag}: this run computes updates {start + 1} to {steps}, so it profiles {first} to {last}"
            )
        self._trace_from = max(first - WARMUP, start + 1)
        self._first, self._last = self._planned = first, last

    def step(self, step: int, count: int, state: Any, record: Recorder, drain: Callable[[], None]) -> None:
        """Start, continue or end the trace before a dispatch of ``count`` updates.

        Args:
          step: the first of them, from 1.
          count: updates that one dispatch computes.
          state: the state so far; waited for where a trace begins or ends.
          record: does not count that wait as training.
          drain: waits for all updates so far and checks them, before their record is written.
        """
        if self._trace_from is None:
            return
        if step + count <= self._trace_from:
            self._seen.add(count)
            return
        if step > self._last:
            self._last = step - 1  # a dispatch may have computed updates beyond the range
            self.end(state, record, drain)
            return
        self._latest = step + count - 1
        if not self._running and not self._start(state, record, drain):
            return
        if self._latest >= self._first and not self._marks:
            drain()
            jax.block_until_ready(state)
            self._enter(jax.profiler.TraceAnnotation(xplane.WINDOW))
            self._first = step
        if self._marks and count not in self._seen:
            what = f"update {step} is" if count == 1 else f"updates {step} to {self._latest} are"
            self._console.note(
                f"--profile: {what} the first call of the step, so the profile includes compilation"
            )
        self._seen.add(count)
        if len(self._marks) == 2:
            self._leave(1)
        if self._marks:
            self._enter(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def end(self, state: Any, record: Recorder, drain: Callable[[], None]) -> None:
        """End the trace after the last update of the range: wait for queued updates, show the table."""
        if not self._running:
            return
        with jax.profiler.TraceAnnotation(xplane.MARK + "waiting for the device"):
            jax.block_until_ready(state)
        self._leave(2)
        drain()
        with record.paused():
            self._finish()

    def abandon(self) -> None:
        """End the trace where the run ends within the range; what was traced is written and shown."""
        if self._marks:
            self._last = self._latest
            self._leave(2)
            self._finish(complete=False)
        elif self._trace_from is not None:
            if self._running:
                jax.profiler.stop_trace()
            self._console.note(f"--profile: the run ended before update {self._first}; nothing was profiled")

    def _enter(self, annotation: jax.profiler.TraceAnnotation) -> None:
        annotation.__enter__()
        self._marks.append(annotation)

    def _leave(self, count: int) -> None:
        for _ in range(min(count, len(self._marks))):
            self._marks.pop().__exit__(None, None, None)

    def _start(self, state: Any, record: Recorder, drain: Callable[[], None]) -> bool:
        several = multihost.process_count() > 1
        name = f"updates-{self._first}-{self._last}"
        self._folder = self._folder / name / (f"process-{multihost.process_index()}" if several else "")
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it slows down every call, and so shows another program
        drain()
        with record.paused():
            jax.block_until_ready(state)
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(self._folder, profiler_options=options)
            except (OSError, RuntimeError) as error:
                self._trace_from = None
                self._console.note(f"--profile: no trace can be taken ({error}); training continues without")
                return False
        self._running = True
        return True

    def _finish(self, complete: bool = True) -> None:
        """Write the trace and its table."""
        self._running, self._trace_from = False, None
        heartbeat()
        try:
            jax.profiler.stop_trace()
            heartbeat()
            path = xplane.newest(self._folder)
            names = op_names.op_names(op_names.loaded_programs())
            found = shares(xplane.read(path, self._devices, names))
            updates = self._last - self._first + 1
            about = {"updates": [self._first, self._last], "devices": self._devices, "complete": complete}
            write_json(path.with_name(FILE), {**about, **as_json(found)})
        except Exception as error:  # a profile that fails must not end the run
            self._console.note(f"--profile: {error}; training continues")
            return
        heartbeat()
        title = f"where the time went, updates {self._first} to {self._last} ({found.seconds:.3f} s)"
        self._console.summary(title, table(found, updates))
        if not complete:
            self._console.note("--profile: the run ended within the range, so the profile is shorter")
        elif (self._first, self._last) != self._planned:
            self._console.note("--profile: the range was widened to the updates that one dispatch computes")
        self._console.note(
            f"trace: {self._folder}; open it with tensorboard --logdir {self._folder} (needs xprof), or its "
            f"*.trace.json.gz in https://ui.perfetto.dev; all rows of the table: {path.with_name(FILE)}"
        )


OFF = Trace(None, Path(), make_console(quiet=True), 0)
"""Takes no trace."""


@contextlib.contextmanager
def trace_updates(
    updates: tuple[int, int] | None,
    folder: Path,
    console: Console,
    devices: int,
) -> Iterator[Trace]:
    """Yield a ``Trace`` and end it when the block ends or raises, except by an interrupt."""
    trace = Trace(updates, folder, console, devices)
    try:
        yield trace
    except Exception:
        trace.abandon()
        raise
    trace.abandon()


def table(found: Shares, updates: int) -> dict[str, str]:
    """Return the rows to print: the ten greatest shares, the rest, and how busy the devices were."""
    rows = {}

    def add(name: str, share: float) -> None:
        rows[name] = f"{100 * share:5.1f} %  {1e3 * share * found.seconds / updates:.3f} ms per update"

    for place, what, share in found.rows[:TOP]:
        add(f"{place}: {what}", share)
    rest = found.rows[TOP:]
    if rest:
        add(f"{len(rest)} smaller rows", sum(share for *_, share in rest))
    add("total device busy", 1 - found.idle)
    add("total device idle", found.idle)
    return rows


def as_json(found: Shares) -> dict[str, Any]:
    """Return ``found`` as ``where.json`` holds it."""
    return {
        "seconds": found.seconds,
        "idle": found.idle,
        "rows": [{"place": place, "what": what, "share": share} for place, what, share in found.rows],
        "host": found.host,
        "versions": {"jax": jax.__version__},
        "device": jax.local_devices()[0].device_kind,
    }


def idle(folder: Path, devices: int = 1) -> float:
    """Return the share of the newest profile in ``folder`` in which no operation ran on a device, 0..1.

    Args:
      folder: such as ``RUN/profile``; folders below it count.
      devices: how many of the process's devices the run uses; those missing from the trace were idle.

    Raises:
      RunError: there is no trace of a training loop.
    """
    return shares(xplane.read(xplane.newest(folder), devices)).idle
