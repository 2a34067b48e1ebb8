"""``--profile START:STOP``: a trace of some updates of a run, and where their time went."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import write_json
from jaxtrain.core.signals import heartbeat
from jaxtrain.monitor import Console, Recorder, make_console, xplane
from jaxtrain.monitor.time_shares import Shares, shares
from jaxtrain.sharding import multihost

F = TypeVar("F", bound=Callable[..., Any])

FILE = "where.json"
FOLDER = "profile"
TOP = 10
LEAD = 3  # updates that are traced before the window, or the profiler's own beginnings would be in it


def parse_window(text: str | None, steps: int | None = None) -> tuple[int, int] | None:
    """``"20:40"`` as (20, 40): the first and the last update to profile; None is none.

    Args:
      text: what ``--profile`` was given.
      steps: updates of the whole run, where they are known.

    Raises:
      InputError: it is no such range, or begins after the run's end.

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
        raise InputError(
            f"--profile {text}: the run has {steps} updates, and so ends before: give earlier ones"
        )
    return first, last


def mark(phase: str) -> Callable[[F], F]:
    """Decorator: show calls of the function in a trace as ``phase`` of the loop.

    Costs a call some microseconds even while no trace is taken, so it is for what is called seldom;
    ``Trace.mark`` marks what every update calls.
    """
    return functools.partial(jax.profiler.annotate_function, name=xplane.MARK + phase)


class Trace:
    """Takes a trace of the updates ``first`` to ``last``, and tells where their time went.

    The window begins and ends with nothing queued, so that what was computed in it is what it is said to be
    of; that the device waits for the first dispatch is part of it. Tracing begins some updates early. The
    figures are of this process's devices.

    Args:
      updates: the first and the last, numbered from 1 in the whole run; None takes no trace.
      folder: the run's; the trace goes to ``profile`` in it.
      console: where it is told.
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
        self._begin: int | None = None  # the first update to be traced
        self._first = self._last = self._at = 0
        self._asked = (0, 0)
        self._running = False
        self._known: set[int] = set()  # numbers of updates a call computed so far
        self._marks: list[jax.profiler.TraceAnnotation] = []  # that are open: the window's, and the update's

    def mark(self, phase: str, function: F) -> F:
        """``function``, whose calls a trace shows as ``phase``; itself where no trace is asked for."""
        return function if self._updates is None else mark(phase)(function)

    def flag(self, step: int) -> dict[str, float]:
        """``{"profiled": 1}`` for records of traced updates, which a trace makes slower; else nothing."""
        return {"profiled": 1.0} if self._running else {}

    def begin(self, start: int, steps: int) -> None:
        """Training goes on after ``start`` of ``steps`` updates; tells what of the range is in it."""
        if self._updates is None:
            return
        first, last = max(self._updates[0], start + 1), min(self._updates[1], steps)
        asked = f"--profile {self._updates[0]}:{self._updates[1]}"
        if first > last:
            self._console.note(
                f"{asked}: nothing to profile, the run goes on after update {start} of {steps}"
            )
            return
        if (first, last) != self._updates:
            self._console.note(
                f"{asked}: this run computes {start + 1} to {steps}, so {first} to {last} of it"
            )
        self._begin = max(first - LEAD, start + 1)
        self._first, self._last = self._asked = first, last

    def step(self, step: int, count: int, state: Any, record: Recorder, settle: Callable[[], None]) -> None:
        """The loop's turn for ``count`` updates begins.

        Args:
          step: the first of them, from 1.
          count: updates that one call computes.
          state: the state so far; waited for where a trace begins or ends.
          record: does not count the time for that.
          settle: waits for all updates so far and judges them, before their record is written.
        """
        if self._begin is None:
            return
        if step + count <= self._begin:
            self._known.add(count)
            return
        if step > self._last:
            self._last = step - 1  # a call may have computed updates beyond the range
            self.end(state, record, settle)
            return
        self._at = step + count - 1
        if not self._running and not self._open(state, record, settle):
            return
        if self._at >= self._first and not self._marks:
            settle()
            jax.block_until_ready(state)
            self._enter(jax.profiler.TraceAnnotation(xplane.WINDOW))
            self._first = step
        if self._marks and count not in self._known:
            what = f"update {step} is" if count == 1 else f"updates {step} to {self._at} are"
            self._console.note(f"--profile: {what} the first here of such, so compilation is in the profile")
        self._known.add(count)
        if len(self._marks) == 2:
            self._leave(1)
        if self._marks:
            self._enter(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def end(self, state: Any, record: Recorder, settle: Callable[[], None]) -> None:
        """No update of the range follows: wait for those that are queued, end the trace and tell of it."""
        if not self._running:
            return
        with jax.profiler.TraceAnnotation(xplane.MARK + "waiting for the device"):
            jax.block_until_ready(state)
        self._leave(2)
        settle()
        with record.paused():
            self._close()

    def abandon(self) -> None:
        """The run ends before the range does: what was traced is written and told of."""
        if self._marks:
            self._last = self._at
            self._leave(2)
            self._close("the run ended within it; ")
        elif self._running:
            jax.profiler.stop_trace()
            self._console.note(f"the run ended before update {self._first}: nothing was profiled")
        elif self._begin is not None:
            self._console.note(f"the run ended before update {self._first}: nothing was profiled")

    def _enter(self, annotation: jax.profiler.TraceAnnotation) -> None:
        annotation.__enter__()
        self._marks.append(annotation)

    def _leave(self, count: int) -> None:
        for _ in range(min(count, len(self._marks))):
            self._marks.pop().__exit__(None, None, None)

    def _open(self, state: Any, record: Recorder, settle: Callable[[], None]) -> bool:
        several = multihost.process_count() > 1
        name = f"updates-{self._first}-{self._last}"
        self._folder = self._folder / name / (f"process-{multihost.process_index()}" if several else "")
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it slows down every call, and so shows another program
        settle()
        with record.paused():
            jax.block_until_ready(state)
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(self._folder, profiler_options=options)
            except (OSError, RuntimeError) as error:
                self._begin = None
                self._console.note(f"--profile: no trace can be taken ({error}); the run goes on without")
                return False
        self._running = True
        return True

    def _close(self, told: str = "") -> None:
        self._running, self._begin = False, None
        heartbeat()
        try:
            jax.profiler.stop_trace()
            heartbeat()
            path = xplane.newest(self._folder)
            found = shares(xplane.read(path, self._devices))
            updates = self._last - self._first + 1
            about = {"updates": [self._first, self._last], "devices": self._devices, "complete": not told}
            write_json(path.with_name(FILE), {**about, **as_json(found)})
        except (OSError, RuntimeError, RunError) as error:
            self._console.note(f"--profile: {error}; the run goes on")
            return
        heartbeat()
        if told == "" and (self._first, self._last) != self._asked:
            told = "updates that one call computes are profiled together; "
        title = f"where the time went, updates {self._first} to {self._last} ({found.seconds:.3f} s)"
        self._console.summary(title, table(found, updates))
        self._console.note(
            f"{told}the trace is in {self._folder}: tensorboard --logdir {self._folder} (with xprof), or "
            f"open its *.trace.json.gz in https://ui.perfetto.dev; the whole table is in {FILE} beside it"
        )


OFF = Trace(None, Path(), make_console(quiet=True), 0)
"""No trace."""


@contextlib.contextmanager
def trace_updates(
    updates: tuple[int, int] | None,
    folder: Path,
    console: Console,
    devices: int,
) -> Iterator[Trace]:
    """A ``Trace`` that is ended however the block is left, but by an interrupt."""
    trace = Trace(updates, folder, console, devices)
    try:
        yield trace
    except Exception:
        trace.abandon()
        raise
    trace.abandon()


def table(found: Shares, updates: int) -> dict[str, str]:
    """The ten greatest shares, what is left, and how busy the devices were, for ``Console.summary``."""
    rows = {}

    def row(name: str, share: float) -> None:
        rows[name] = f"{100 * share:5.1f} %  {1e3 * share * found.seconds / updates:.3f} ms an update"

    for place, what, share in found.rows[:TOP]:
        row(f"{place}: {what}", share)
    rest = found.rows[TOP:]
    if rest:
        row(f"{len(rest)} smaller ones", sum(share for *_, share in rest))
    row("device busy, of all", 1 - found.idle)
    row("device idle, of all", found.idle)
    return rows


def as_json(found: Shares) -> dict[str, Any]:
    """``found`` as it is written to ``where.json``."""
    rows = [{"place": place, "what": what, "share": share} for place, what, share in found.rows]
    return {
        "seconds": found.seconds,
        "idle": found.idle,
        "top": rows[:TOP],
        "rows": rows,
        "host": found.host,
        "versions": {"jax": jax.__version__},
        "device": jax.local_devices()[0].device_kind,
    }


def idle(folder: Path, devices: int = 1) -> float:
    """The share of the newest profile in ``folder`` or below in which a device worked on no operation, 0..1.

    Args:
      folder: such as ``RUN/profile``.
      devices: how many of the process's devices were used; those that the trace does not show were idle.

    Raises:
      RunError: there is no trace of a training loop.
    """
    return shares(xplane.read(xplane.newest(folder), devices)).idle
