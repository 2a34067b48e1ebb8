"""The training loop and the evaluation loop: dispatch updates, read their metrics, evaluate, save, stop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain import __version__, checkpoint, monitor
from jaxtrain.compress import sparsity
from jaxtrain.core.signals import GRACE, Request, Stopped, on_signals, watchdog
from jaxtrain.core.types import Metrics, State
from jaxtrain.experiment import config_hash
from jaxtrain.monitor import Console
from jaxtrain.program import Program
from jaxtrain.program.throughput import throughput
from jaxtrain.sharding import multihost
from jaxtrain.train.bad_updates import BadUpdateMonitor
from jaxtrain.train.dispatch import Dispatch, InFlight, compile_in_background
from jaxtrain.train.layer_pictures import LayerPictures
from jaxtrain.train.out_of_memory import explain_out_of_memory
from jaxtrain.train.run_folder import RunFolder


def fit(
    program: Program,
    folder: Path,
    console: Console,
    name: str = "experiment",
    start_time: float | None = None,
    *,
    resume: str = "newest",
    init_from: Sequence[Any] | None = None,
    changed: dict[str, Any] | None = None,
    grace: float | None = GRACE,
    hang_after: float | None = None,
    strict: bool = False,
    profile_window: tuple[int, int] | None = None,
    layer_pictures: LayerPictures | None = None,
    observers: monitor.Observers | None = None,
) -> dict[str, Any]:
    """Train to the last step, resuming from a checkpoint in ``folder`` if there is one, and evaluate.

    Args:
      program: what to run (``jaxtrain.program.assemble``).
      folder: the run's folder, already acquired for this run (``RunFolder.acquire``).
      console: shows progress to a person.
      name: the experiment's name, for the records.
      start_time: the ``time.perf_counter()`` that wall time is counted from; None is now.
      resume: which checkpoint to resume from (``Checkpoints.restore_or``).
      init_from: ``(source, renames)`` of the parameters to start with (``checkpoint.init_from``).
      changed: conditions that differ from those of the last start, to record when the state is restored.
      grace: seconds from a signal to the end of the process (``signals.on_signals``); None never ends it.
      hang_after: end the process when no step finishes for this many seconds (``signals.watchdog``).
      strict: a second compilation of the train step is an error, not a warning.
      profile_window: the first and the last update to profile (``monitor.Trace``); None profiles none.
      layer_pictures: draws the layers at every checkpoint, for TensorBoard; None draws nothing.
      observers: trackers, and functions that are called after evaluations and saves.

    Returns:
      The result, as it is written to ``result.json``.

    Raises:
      Stopped: a signal asked for it; the state is saved.
      InputError, RunError: with one line that says what, where and what to do.
    """
    start_time = time.perf_counter() if start_time is None else start_time
    experiment, run_folder = program.experiment, RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata, observers = run_metadata(program, run_folder, name), observers or monitor.Observers()
    mesh_devices = program.key.sharding.device_set
    local_devices = [device for device in jax.local_devices() if device in mesh_devices]
    with (
        explain_out_of_memory(program, name, folder, console),
        on_signals(grace) as request,
        watchdog(hang_after, folder / f"hang-{multihost.process_index()}.txt"),
        checkpoint.open(
            folder, experiment.max_to_keep, metadata, console.note, on_save=observers.saved
        ) as checkpoints,
        monitor.measure_devices(local_devices, len(local_devices) / len(mesh_devices)) as meter,
        monitor.trace_updates(profile_window, folder, console, len(local_devices)) as trace,
    ):
        speed = throughput(program)
        with compile_in_background(program):
            state, start = restore_or_init(program, run_folder, checkpoints, resume, init_from, console)
        if start and changed:
            run_folder.add_resumed(start, changed)

        def step_metadata(step: int) -> dict[str, float]:
            device_readings = meter.record((step - start) * experiment.batch)
            return program.position(step) | device_readings | trace.flag(step)

        with monitor.open(
            folder if multihost.is_process_0() else None,
            console,
            start=start,
            log_every=experiment.log_every,
            examples=experiment.batch,
            position=step_metadata,
            guarded=experiment.guard == "skip",
            rates=speed.rates,
            observers=observers,
        ) as recorder:
            state = _train(
                program,
                state,
                start,
                checkpoints,
                recorder,
                console,
                request,
                folder,
                strict,
                trace,
                layer_pictures,
            )
            result = final_evaluation(program, state, checkpoints, recorder, console)
            result |= speed.record() | recorder.step_times.overall()
            result |= meter.result((program.steps - start) * experiment.batch)
    result |= {"seconds": time.perf_counter() - start_time, "resumed_from": start, "folder": str(folder)}
    return run_folder.write_result(result, console.note)


def run_metadata(program: Program, folder: RunFolder, name: str) -> dict[str, Any]:
    """Return what the manifest of each checkpoint says of its run."""
    about = {"experiment": name, "hash": config_hash(program.experiment)}
    return about | {"jaxtrain": __version__, "jax": jax.__version__, "run": folder.run_id()}


def restore_or_init(
    program: Program,
    folder: RunFolder,
    checkpoints: checkpoint.Checkpoints,
    resume: str,
    init_from: Sequence[Any] | None,
    console: Console,
) -> tuple[State, int]:
    """Restore a checkpoint, or initialise the state; returns the state and its step."""
    checkpoints.clean()

    def init() -> State:
        if init_from is None:
            return program.init()
        source, renames = init_from
        return checkpoint.init_from(source, renames, program.init(), console.note)

    state, start = checkpoints.restore_or(init, program.abstract_state, resume)
    state = program.complete(state)
    recorded = 0 if start else folder.recorded_steps()
    if recorded:
        console.note(
            f"metrics.jsonl reaches step {recorded} and there is no checkpoint: starting from the beginning"
        )
    batch = f"global batch {program.experiment.batch}"
    if start:
        console.note(f"resuming at step {start}/{program.steps} ({batch})")
    else:
        console.note(f"starting: {program.steps} steps ({batch})")
    return state, start


def _train(
    program: Program,
    state: State,
    start: int,
    checkpoints: checkpoint.Checkpoints,
    recorder: monitor.Recorder,
    console: Console,
    request: Request,
    folder: Path | None = None,
    strict: bool = False,
    trace: monitor.Trace = monitor.OFF,
    layer_pictures: LayerPictures | None = None,
) -> State:
    """Run the training loop. The order is fixed: evaluate, then save what the evaluation chose, then stop."""
    in_flight, votes = InFlight(program.experiment.max_in_flight), multihost.StopVotes()
    metrics_consumer = MetricsConsumer(start, BadUpdateMonitor(program, folder, console.note), recorder)
    # trace.mark: --profile shows each of these calls as a named phase.
    dispatch = Dispatch(program, console.note, strict, trace.mark)
    wait, save = (
        trace.mark("waiting for the device", in_flight.add),
        trace.mark("checkpoint", checkpoints.save),
    )
    consume = trace.mark("records", metrics_consumer.take)

    def drain() -> None:
        metrics_consumer.take(in_flight.drain())

    best, step = checkpoints.best_score(), start
    trace.begin(start, program.steps)
    console.begin(start, program.steps)
    while step < program.steps:
        count = program.cadence.updates_per_call(step)
        trace.step(step + 1, count, state, recorder, drain)
        state, metrics = dispatch(state, step, count)
        step += count
        consume(wait(metrics))  # of earlier updates, while this one runs
        console.advance(step)
        checkpoints.poll()
        score = None
        if program.cadence.evaluates_after(step):
            drain()
            with recorder.paused():
                score = evaluate_mid_run(program, state, step, recorder, console)
        improved = score is not None and (best is None or score > best)
        stop_signal = votes.any_process(request.signum or 0)
        if program.cadence.saves_after(step) or improved or stop_signal:
            drain()  # raises on a bad update, so nothing after one is ever saved
            recorder.flush()  # with the guard off, raises on a loss that is not finite
            save(step, state, score)
            best = score if improved else best
            if layer_pictures is not None and program.cadence.saves_after(step):
                with recorder.paused():
                    recorder.pictures(step, layer_pictures(state))
        if stop_signal and step < program.steps:
            checkpoints.wait()
            raise Stopped(f"stopped after step {step} of {program.steps}", stop_signal)
    trace.end(state, recorder, drain)
    drain()
    console.end()
    checkpoints.wait()
    return state


class MetricsConsumer:
    """Takes the metrics of finished updates in order: checks each for a bad update, then records it."""

    def __init__(self, start: int, bad_updates: BadUpdateMonitor, recorder: monitor.Recorder) -> None:
        self._step, self._bad_updates, self._recorder = start, bad_updates, recorder

    def take(self, finished: Iterable[Sequence[Metrics]]) -> None:
        """Consume what ``InFlight.add`` or ``InFlight.drain`` returned.

        Raises:
          RunError: an update was bad.
        """
        for rows in finished:
            for metrics in rows:
                self._step += 1
                self._bad_updates.judge(self._step, metrics)
            self._recorder.step(self._step, rows)


@monitor.mark("evaluation")
def evaluate_mid_run(
    program: Program, state: State, step: int, recorder: monitor.Recorder, console: Console
) -> float | None:
    """Evaluate; returns the validation score, None without a validation set or where it is not finite."""
    split = "valid" if "valid" in program.evals else "test"
    values = evaluate(program, state, split, console)
    recorder.evaluation(step, split, values)
    console.note(f"step {step}/{program.steps}  {split}  {monitor.format_metrics(values, None)}")
    return program.score(values) if split == "valid" else None


def evaluate(program: Program, state: State, split: str, console: Console) -> dict[str, Any]:
    """Evaluate ``state`` on ``split`` (``"valid"`` or ``"test"``), each example once; returns the metrics."""
    part = program.evals[split]
    in_flight = InFlight(program.experiment.max_in_flight)
    rows = []
    with console.task(f"evaluate {split}", part.batches) as advance:
        for number in range(part.batches):
            rows += in_flight.add(part.step(state, part.loader.batch(number)))
            advance(number + 1)
        rows += in_flight.drain()
    return monitor.merge_all(itertools.chain.from_iterable(rows))


def final_evaluation(
    program: Program,
    state: State,
    checkpoints: checkpoint.Checkpoints,
    recorder: monitor.Recorder,
    console: Console,
) -> dict[str, Any]:
    """Evaluate the last state on the test set and, where a validation set chose one, the best state."""
    with recorder.paused():
        last = evaluate(program, state, "test", console)
    recorder.evaluation(program.steps, "test", last)
    result: dict[str, Any] = {"steps": program.steps, **_test_result(last), **_sparsity(state)}
    for path, part in result.get("sparsity", {}).items():
        recorder.scalars(program.steps, {f"sparsity/{path}": part})
        name = "all pruned arrays" if path == "total" else path
        console.note(f"sparsity of {name}: {100 * part:.2f} %")
    result |= recorder.speed()
    best = checkpoints.best()
    if best is not None:
        chosen = state
        if best.step != program.steps:
            chosen = program.complete(checkpoints.restore(best, program.abstract_state), state)
        test = last if chosen is state else evaluate(program, chosen, "test", console)
        result["best"] = {"step": best.step, "valid": best.score, **_test_result(test), **_sparsity(chosen)}
    elif "valid" in program.evals:
        name = program.experiment.select.removeprefix("-")
        console.note(
            f"there is no best checkpoint: {name} was not finite in any evaluation on valid; the result is "
            "that of the last step"
        )
    return result


def _sparsity(state: State) -> dict[str, Any]:
    """Return the entry of a result for a pruned state, which the best one may be less than the last."""
    parts = sparsity(state)
    return {"sparsity": parts} if parts else {}


def _test_result(values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a result for test metrics: numbers as ``test``, the others as ``tables``."""
    numbers, tables = monitor.split_tables(values)
    return {"test": numbers, **({"tables": tables} if tables else {})}
