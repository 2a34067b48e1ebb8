"""Train many members together, one update of all of them at a time; each keeps its own run folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxtrain import checkpoint, monitor
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.signals import Request, Stopped, on_signals
from jaxtrain.core.types import Metrics, State
from jaxtrain.monitor import Console
from jaxtrain.program.throughput import throughput
from jaxtrain.sweep.stacked import Stacked
from jaxtrain.sweep.table import Outcome
from jaxtrain.train import loop
from jaxtrain.train.autotune import Choice
from jaxtrain.train.bad_updates import BadUpdateMonitor
from jaxtrain.train.dispatch import InFlight
from jaxtrain.train.session import OpenRun

TOGETHER = Choice(1, "members of a sweep that train together")


class Member:
    """The files of one member while it trains: what ``loop.fit`` opens for a run of its own.

    Args:
      opened: the run, which is not finished.

    Raises:
      InputError, RunError: it cannot start.
    """

    def __init__(self, opened: OpenRun) -> None:
        with contextlib.ExitStack() as stack:
            self._open(opened, stack)
            self._files = stack.pop_all()

    def _open(self, opened: OpenRun, stack: contextlib.ExitStack) -> None:
        session = opened.session
        self.opened, self.console, self.folder = opened, session.console, session.folder
        self.program, changed = opened.prepare(TOGETHER)
        stack.enter_context(self.folder.locked(self.console.note))
        self.error: RunError | None = None
        metadata = loop.run_metadata(self.program, self.folder, session.name)
        exp = self.program.experiment
        self._checkpoints = stack.enter_context(
            checkpoint.open(self.folder.path, exp.max_to_keep, metadata, self.console.note)
        )
        self.state, self.start = loop.restore_or_init(
            self.program, self.folder, self._checkpoints, session.resume, opened.init_from, self.console
        )
        if self.start and changed:
            self.folder.add_resumed(self.start, changed)
        self._speed = throughput(self.program)
        self._recorder = stack.enter_context(
            monitor.open(
                self.folder.path,
                _RecordsOnly(self.console),
                start=self.start,
                log_every=exp.log_every,
                examples=exp.batch,
                position=self.program.position,
                guarded=exp.guard == "skip",
                rates=self._speed.rates,
            )
        )
        bad_updates = BadUpdateMonitor(self.program, self.folder.path, self.console.note)
        self._consumer = loop.MetricsConsumer(self.start, bad_updates, self._recorder)
        self._best = self._checkpoints.best_score()

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def fail(self, error: RunError) -> None:
        """Close the files of a member that cannot continue."""
        self.error = error
        self.console.note(f"failed: {error}")
        self._files.__exit__(type(error), error, error.__traceback__)

    def consume(self, metrics: Metrics) -> None:
        """Check and record the metrics of the next update."""
        self._consumer.take([[metrics]])
        self._checkpoints.poll()

    def evaluate_and_save(self, state: State, step: int, stopping: bool) -> None:
        """Do what follows update ``step``, in the order of ``loop``: evaluate, then save."""
        cadence, score = self.program.cadence, None
        if cadence.evaluates_after(step):
            with self._recorder.paused():
                score = loop.evaluate_mid_run(self.program, state, step, self._recorder, self.console)
        improved = score is not None and (self._best is None or score > self._best)
        if cadence.saves_after(step) or improved or stopping:
            self._recorder.flush()
            self._checkpoints.save(step, state, score)
            self._checkpoints.wait()  # Orbax cannot save to two places of one process at a time
            self._best = score if improved else self._best

    def finish(self, state: State) -> dict[str, Any]:
        """Evaluate the last and the best state; write and return the result."""
        result = loop.final_evaluation(self.program, state, self._checkpoints, self._recorder, self.console)
        result |= self._speed.record() | self._recorder.step_times.overall()
        seconds = time.perf_counter() - self.opened.start_time
        result |= {"seconds": seconds, "resumed_from": self.start, "folder": str(self.folder)}
        return self.folder.write_result(result, self.console.note)


class _RecordsOnly:
    """A console that shows notes; of many members no progress."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)

    def train(self, *_: Any) -> None:
        pass


def fit(
    members: Sequence[Member],
    make_stacked: Callable[[Sequence[Member]], Stacked],
    console: Console,
    grace: float | None,
) -> list[Outcome]:
    """Train members to their last update, each from where it is; returns their outcomes in order.

    Members that resume at different updates train one group after the other. A member that fails, such as by
    a loss that is not finite, ends alone.

    Args:
      members: whose programs have the same cadence.
      make_stacked: makes the step of a group of them.
      console: shows the progress of all.
      grace: as ``loop.fit``.

    Raises:
      Stopped: a signal asked for it; every member is saved.
    """
    outcomes: dict[int, Outcome] = {}
    with on_signals(grace) as request:
        for start in sorted({member.start for member in members}):
            group = [member for member in members if member.start == start]
            found = _fit_group(group, make_stacked(group), console, request)
            outcomes |= dict(zip(map(id, group), found, strict=True))
    return [outcomes[id(member)] for member in members]


def _fit_group(
    members: Sequence[Member], stacked: Stacked, console: Console, request: Request
) -> list[Outcome]:
    first, step = members[0].program, members[0].start
    in_flight = InFlight(first.experiment.max_in_flight)
    states = stacked.stack([member.state for member in members])
    for member in members:
        del member.state  # donated
    cadence = first.cadence
    console.begin(step, cadence.steps)
    while step < cadence.steps and _alive(members):
        states, metrics = stacked(states, step)
        step += 1
        _consume(members, in_flight.add(metrics))
        console.advance(step)
        stopping = request.signum is not None
        if cadence.evaluates_after(step) or cadence.saves_after(step) or stopping:
            _consume(members, in_flight.drain())
            for number, member in enumerate(members):
                if member.error is None:
                    with _failure(member):
                        member.evaluate_and_save(stacked.member(states, number), step, stopping)
        if stopping and step < cadence.steps:
            raise Stopped(f"stopped after step {step} of {cadence.steps}", request.signum or 0)
    console.end()
    outcomes: list[Outcome] = []
    for number, member in enumerate(members):
        result: dict[str, Any] = {}
        if member.error is None:
            with _failure(member):
                result = member.finish(stacked.member(states, number))
        outcomes.append(member.error or result)
    return outcomes


def _consume(members: Sequence[Member], finished: Any) -> None:
    """Give each member its own metrics of the calls that have finished."""
    for rows in finished:
        for member, metrics in zip(members, rows, strict=True):
            if member.error is None:
                with _failure(member):
                    member.consume(metrics)


def _alive(members: Sequence[Member]) -> bool:
    return any(member.error is None for member in members)


@contextlib.contextmanager
def _failure(member: Member) -> Iterator[None]:
    """Note an error of one member, which the others survive."""
    try:
        yield
    except (RunError, InputError) as error:  # InputError: labels out of range in an evaluation
        member.fail(error if isinstance(error, RunError) else RunError(str(error)))
