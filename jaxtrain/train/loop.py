"""fit() and evaluate(): the only owners of the state, and of input and output between steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain import __version__, checkpoint, monitor
from jaxtrain.core.signals import GRACE, Request, Stopped, on_signals, watchdog
from jaxtrain.core.types import Metrics, State
from jaxtrain.experiment import config_hash
from jaxtrain.monitor import Console
from jaxtrain.program import Program
from jaxtrain.program.throughput import throughput
from jaxtrain.sharding import multihost
from jaxtrain.train import out_of_memory
from jaxtrain.train.bad_updates import BadUpdateMonitor
from jaxtrain.train.dispatch import Dispatch, InFlight, compile_in_background
from jaxtrain.train.run_folder import RunFolder


def fit(
    program: Program,
    folder: Path,
    console: Console,
    name: str = "experiment",
    began: float | None = None,
    *,
    resume: str = "newest",
    init_from: Sequence[Any] | None = None,
    grace: float = GRACE,
    hang_after: float | None = None,
    strict: bool = False,
    updates: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Train to the last step, from wherever ``folder`` stands, and evaluate.

    Args:
      program: what to run (``jaxtrain.program.assemble``).
      folder: the run's folder, which must belong to it (``workdir.claim``).
      console: where a person is watching.
      name: the experiment's name, for the records.
      began: the ``time.perf_counter()`` from which wall time is counted; None is now.
      resume: which checkpoint to go on from (``Checkpoints.restore_or``).
      init_from: ``(source, renames)`` of the parameters to begin with (``checkpoint.init_from``).
      grace: seconds from a signal to the end of the process, at most (``stop.on_signals``).
      hang_after: end the process when nothing has moved for so many seconds (``stop.watchdog``).
      strict: a train step that is compiled a second time is an error, not a warning.
      updates: the first and the last update to profile (``profile.Trace``); None profiles none.

    Returns:
      The result, as it is written to ``result.json``.

    Raises:
      Stopped: a signal asked for it; the state is saved.
      InputError, RunError: as they say.
    """
    began = time.perf_counter() if began is None else began
    experiment = program.experiment
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"experiment": name, "hash": config_hash(experiment), "jaxtrain": __version__}
    about |= {"jax": jax.__version__, "run": RunFolder(folder).run_id()}
    writes = multihost.is_process_0()
    everywhere = program.key.sharding.device_set
    mine = [device for device in jax.local_devices() if device in everywhere]
    with (
        out_of_memory.explain_out_of_memory(program, name, folder, console),
        on_signals(grace) as request,
        watchdog(hang_after, folder / f"hang-{multihost.process_index()}.txt"),
        checkpoint.open(folder, experiment.max_to_keep, about, console.note) as saved,
        monitor.measure_devices(mine, len(mine) / len(everywhere)) as meter,
        monitor.trace_updates(updates, folder, console, len(mine)) as trace,
    ):
        speed = throughput(program)
        with compile_in_background(program):  # compiles the step meanwhile
            state, start = _restore_or_init(program, folder, saved, resume, init_from, console)

        def told(step: int) -> dict[str, float]:
            taken = meter.record((step - start) * experiment.batch)
            return program.position(step) | taken | trace.flag(step)

        with monitor.open(
            folder if writes else None,
            console,
            start=start,
            log_every=experiment.log_every,
            examples=experiment.batch,
            position=told,
            guarded=experiment.guard == "skip",
            rates=speed.rates,
        ) as record:
            state = _train(program, state, start, saved, record, console, request, folder, strict, trace)
            found = _result(program, state, saved, record, console)
            found |= (
                speed.record()
                | record.pace.overall()
                | meter.result((program.steps - start) * experiment.batch)
            )
    found |= {"seconds": time.perf_counter() - began, "resumed_from": start, "folder": str(folder)}
    RunFolder(folder).write_result(found)
    return found


def _restore_or_init(
    program: Program,
    folder: Path,
    saved: checkpoint.Checkpoints,
    resume: str,
    init_from: Sequence[Any] | None,
    console: Console,
) -> tuple[State, int]:
    """The state to go on from and its step, 0 for a new one; what was found is told."""
    saved.clean()

    def init() -> State:
        if init_from is None:
            return program.init()
        source, renames = init_from
        return checkpoint.init_from(source, renames, program.init(), console.note)

    state, start = saved.restore_or(init, program.abstract_state, resume)
    recorded = 0 if start else RunFolder(folder).recorded_steps()
    if recorded:
        console.note(f"there are records to step {recorded} and no checkpoint: starting again from step 1")
    how = f"going on from step {start} of" if start else "starting:"
    console.note(f"{how} {program.steps} steps of {program.experiment.batch} examples")
    return state, start


def _train(
    program: Program,
    state: State,
    start: int,
    saved: checkpoint.Checkpoints,
    record: monitor.Recorder,
    console: Console,
    request: Request,
    folder: Path | None = None,
    strict: bool = False,
    trace: monitor.Trace = monitor.OFF,
) -> State:
    """The loop. Every line of it is ordered: evaluate, then save what the evaluation chose, then stop."""
    flight, votes = InFlight(program.experiment.max_in_flight), multihost.Votes()
    finished = MetricsConsumer(start, BadUpdateMonitor(program, folder, console.note), record)
    dispatch = Dispatch(program, console.note, strict, trace.mark)
    wait, save = trace.mark("waiting for the device", flight.add), trace.mark("checkpoint", saved.save)
    take = trace.mark("records", finished.take)

    def drain() -> None:
        finished.take(flight.drain())

    top, step = saved.best_score(), start
    trace.begin(start, program.steps)
    console.begin(start, program.steps)
    while step < program.steps:
        count = program.cadence.updates_per_call(step)
        trace.step(step + 1, count, state, record, drain)
        state, metrics = dispatch(state, step, count)
        step += count
        take(wait(metrics))  # of updates before these, which run meanwhile
        console.advance(step)
        saved.poll()
        score = None
        if program.cadence.evaluates_after(step):
            drain()
            with record.paused():
                score = _evaluate_mid_run(program, state, step, record, console)
        improved = score is not None and (top is None or score > top)
        stop = votes.any_process(request.signum or 0)  # what any process has been asked
        if program.cadence.saves_after(step) or improved or stop:
            drain()  # raises on a bad update: nothing after one is ever saved
            record.flush()  # with the guard off, raises on a loss that is not finite
            save(step, state, score)
            top = score if improved else top
        if stop and step < program.steps:
            saved.wait()
            raise Stopped(f"stopped after step {step} of {program.steps}", stop)
    trace.end(state, record, drain)
    drain()
    console.end()
    saved.wait()
    return state


class MetricsConsumer:
    """Takes the metrics of finished updates in their order: judged first, then recorded."""

    def __init__(self, start: int, watch: BadUpdateMonitor, record: monitor.Recorder) -> None:
        self._step, self._watch, self._record = start, watch, record

    def take(self, dispatches: Iterable[Sequence[Metrics]]) -> None:
        """What ``InFlight`` tells.

        Raises:
          RunError: an update was bad.
        """
        for rows in dispatches:
            for metrics in rows:
                self._step += 1
                self._watch.judge(self._step, metrics)
            self._record.step(self._step, rows)


@monitor.mark("evaluation")
def _evaluate_mid_run(
    program: Program, state: State, step: int, record: monitor.Recorder, console: Console
) -> float | None:
    """Evaluate in mid-run; the validation score, or None when only the test set was looked at."""
    split = "valid" if "valid" in program.evals else "test"
    values = evaluate(program, state, split, console)
    record.scalars(step, {f"{split}/{name}": value for name, value in values.items()})
    console.note(f"step {step}/{program.steps}  {split}  {monitor.format_metrics(values, None)}")
    return program.score(values) if split == "valid" else None


def evaluate(program: Program, state: State, split: str, console: Console) -> dict[str, Any]:
    """Metrics of ``state`` over every example of ``split`` (``"valid"`` or ``"test"``), each counted once."""
    part = program.evals[split]
    flight = InFlight(program.experiment.max_in_flight)
    found = []
    with console.task(f"evaluate {split}", part.batches) as advance:
        for number in range(part.batches):
            found += flight.add(part.step(state, part.loader.batch(number)))
            advance(number + 1)
        found += flight.drain()
    return monitor.merge_all(itertools.chain.from_iterable(found))


def _result(
    program: Program,
    state: State,
    saved: checkpoint.Checkpoints,
    record: monitor.Recorder,
    console: Console,
) -> dict[str, Any]:
    """Test figures of the last state and, where a validation set chose one, of the best."""
    with record.paused():
        last = evaluate(program, state, "test", console)
    record.scalars(program.steps, {f"test/{name}": value for name, value in last.items()})
    found: dict[str, Any] = {"steps": program.steps, "test": last}
    found |= record.speed()
    best = saved.best()
    if best is not None:
        chosen = state if best.step == program.steps else saved.restore(best, program.abstract_state)
        test = last if chosen is state else evaluate(program, chosen, "test", console)
        found["best"] = {"step": best.step, "valid": best.score, "test": test}
    return found
