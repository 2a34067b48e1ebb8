"""Run an experiment from start to result: check it, acquire its folder, then call ``loop.fit``."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtrain import checkpoint, monitor, sharding
from jaxtrain.core.errors import InputError
from jaxtrain.core.signals import GRACE, Stopped
from jaxtrain.data import paths
from jaxtrain.experiment import Experiment
from jaxtrain.experiment import code as experiment_code
from jaxtrain.monitor import Console, make_console
from jaxtrain.monitor.trackers import RunInfo, Tracker, Trackers, make_tracker
from jaxtrain.program import Program, assemble
from jaxtrain.sharding import described, multihost
from jaxtrain.train import capacity, environment, loop, out_of_memory, run_length
from jaxtrain.train.autotune import Choice, decide
from jaxtrain.train.dispatch import compile_in_background
from jaxtrain.train.first_evaluation import check_first_evaluation
from jaxtrain.train.identity import RunCheck
from jaxtrain.train.layer_pictures import LayerPictures
from jaxtrain.train.run_folder import RunFolder, default_folder
from jaxtrain.train.summary import show_summary

CODE_UNKNOWN = "code unknown: not run from a file, so later changes of the code are not noticed"
RESUME = ("newest", "last-good")
"""Which checkpoint a run resumes from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """Settings of one run that do not change what it computes.

    Attributes:
      name: the experiment's name.
      folder: the run's folder.
      mesh: its devices.
      console: shows progress to a person.
      record: further entries of ``config.json``, such as where the experiment came from.
      deterministic: do not choose settings by timing.
      extend: allow more epochs than the run started with when that changes its schedule.
      accept_changed_data: continue on other data than the run started with.
      file: the experiment's file, beside which its data may be; None where it has none.
      code: checksums of the experiment's code (``experiment.code.digests``); None where they are unknown.
      resume: which checkpoint to resume from: ``"newest"`` or ``"last-good"``.
      init_from: another run, ``RUN`` or ``RUN:STEP``, whose parameters this one starts from.
      init_map: ``OLD=NEW`` names of its parameters.
      grace: seconds from a signal to the end of the process, at most; None never ends it.
      hang_after: end the process when no step finishes for so many seconds; None never does.
      strict: a second compilation of the train step is an error, and so is code that has changed.
      profile: ``START:STOP`` updates to trace.
      monitor_layers: write pictures of the layers at every checkpoint.
      trackers: what gets the records of the run, such as W&B.
      on_evaluation: called with each evaluation.
      on_save: called with each checkpoint that is complete.
      notes: warnings printed before training, one per line.
      resume_command: what to type to resume the run, for the line that is shown when a signal stops it.
    """

    name: str
    folder: RunFolder
    mesh: Mesh
    console: Console
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    deterministic: bool = False
    extend: bool = False
    accept_changed_data: bool = False
    file: Path | None = None
    code: dict[str, str] | None = None
    resume: str = "newest"
    init_from: str | None = None
    init_map: Sequence[str] = ()
    grace: float | None = GRACE
    hang_after: float | None = None
    strict: bool = False
    profile: str | None = None
    monitor_layers: bool = False
    resume_command: str = "the same call of jaxtrain.fit"
    trackers: Sequence[Tracker] = ()
    on_evaluation: Callable[[monitor.Evaluation], object] | None = None
    on_save: Callable[[monitor.Save], object] | None = None
    notes: tuple[str, ...] = ()

    def observe(self) -> contextlib.AbstractContextManager[monitor.Observers]:
        """Return what observes the run in ``folder``, which is acquired; ended by the end of its block."""
        note, record, found = self.console.note, self.folder.record(), None
        if self.trackers and record and multihost.is_process_0():
            found = Trackers(self.trackers, RunInfo.of(self.folder.path, record), note)
        return monitor.observe(monitor.Observers(note, found, self.on_evaluation, self.on_save))


def fit(
    experiment: Experiment,
    *,
    folder: str | Path | None = None,
    mesh: Mesh | str | Mapping[str, int] | None = None,
    name: str = "experiment",
    extend: bool = False,
    init_from: str | Path | None = None,
    resume: str = "newest",
    accept_changed_data: bool = False,
    strict: bool = False,
    console: Console | None = None,
    trackers: Sequence[str | Tracker] = (),
    on_evaluation: Callable[[monitor.Evaluation], object] | None = None,
    on_save: Callable[[monitor.Save], object] | None = None,
) -> dict[str, Any]:
    """Train ``experiment``, evaluate it and return its result; resume if ``folder`` has an unfinished run.

    Checks, checkpoints, metrics files, progress bar and summary are those of ``python -m jaxtrain.run``. The
    same call again resumes an interrupted run, and returns the result of a finished one. With ``workers`` in
    the experiment a script must call it under ``if __name__ == "__main__":``. ``python -m jaxtrain evaluate``
    reads such a run with ``--experiment FILE``, a file that defines the same ``EXPERIMENT``.

    Args:
      experiment: what to run.
      folder: the run's folder; None is ``runs/NAME/HASH-seedS``.
      mesh: the devices: ``"data=2,fsdp=4"`` or sizes by name, of all devices, or a ``jax.sharding.Mesh`` with
        axes ``data``, ``fsdp`` and ``model``; None is data parallelism over all of them.
      name: the experiment's name, for the folder and the records.
      extend: allow more epochs than the run started with when that changes its schedule.
      init_from: folder of another run, whose parameters this one starts from; ``RUN:STEP`` names a step.
      resume: ``"newest"`` checkpoint, or ``"last-good"`` to move corrupt ones aside.
      accept_changed_data: continue a run in ``folder`` although its data have changed since it started, and
        record that; otherwise that is an InputError.
      strict: an InputError instead of a line where the code of a run in ``folder`` has changed, and a
        RunError where the train step compiles a second time.
      console: where progress is shown; None is a progress bar on a terminal or in a notebook, else lines.
      trackers: what gets the records of the run: ``"wandb"``, ``"wandb:offline"``, ``"mlflow:URI"``, or an
        object with ``start(run)``, ``write(records)`` and ``finish(status)``, in a thread of its own
        (docs/trackers.md). One that fails or hangs is a line, and training goes on.
      on_evaluation: called after each evaluation with its ``step``, ``split`` and ``values``, on process 0,
        in the training thread. It cannot change the run: its result is ignored and an error is a line.
      on_save: called with the ``step`` and the ``path`` of each checkpoint when it is complete, on process 0,
        in the thread that writes it; otherwise as ``on_evaluation``.

    Returns:
      What ``result.json`` holds: ``steps``, ``seconds``, ``examples_per_second``, ``test`` with the metrics
      of the last step and ``tables`` with those that are tables, ``best`` where a validation set chose one,
      ``folder``.

    Raises:
      InputError: a setting, the data or the folder is wrong; the message is one line.
      RunError: the run failed (NaN, disk, data).
      Stopped: SIGINT, as a notebook's stop button sends it, or SIGTERM; the state is saved.

    >>> import tempfile, jaxtrain
    >>> from jaxtrain import data, losses, models, optim
    >>> digits = jaxtrain.Experiment(
    ...     model=models.MLP(widths=(32,), classes=10), train=data.Digits("train"), test=data.Digits("test"),
    ...     loss=losses.CrossEntropy(), optimizer=optim.Adam(lr=1e-3), batch=128, epochs=1,
    ... )
    >>> result = jaxtrain.fit(digits, folder=tempfile.mkdtemp())  # doctest: +ELLIPSIS
    experiment in ...
    >>> result["steps"]
    12
    """
    _check_arguments(experiment, resume)
    mesh = sharding.as_mesh(mesh)
    if (card := described.card_of(mesh)) is not None:
        raise InputError(
            f"mesh describes GPUs that are not here ({card.device_kind}), to compile for: fit needs devices "
            "of this machine"
        )
    script = experiment_code.main_module()
    session = Session(
        name=name,
        folder=RunFolder(default_folder(name, experiment) if folder is None else folder),
        mesh=mesh,
        console=make_console(quiet=not multihost.is_process_0()) if console is None else console,
        extend=extend,
        accept_changed_data=accept_changed_data,
        strict=strict,
        file=None if script is None else Path(str(script.__file__)),
        code=experiment_code.digests(script, experiment),
        init_from=None if init_from is None else str(init_from),
        resume=resume,
        grace=None,  # the process belongs to the caller
        trackers=[make_tracker(one) for one in trackers],
        on_evaluation=on_evaluation,
        on_save=on_save,
        notes=(CODE_UNKNOWN,) if experiment_code.is_interactive() else (),
    )
    return run(session, experiment)


def _check_arguments(experiment: Experiment, resume: str) -> None:
    """Raise InputError for arguments of ``fit`` of the wrong kind, and in a process of its workers."""
    if not isinstance(experiment, Experiment):
        raise InputError(
            f"fit takes an Experiment and not a {type(experiment).__name__}: an experiment of a file is its "
            "EXPERIMENT, or python -m jaxtrain.run --experiment NAME"
        )
    if resume not in RESUME:
        raise InputError(f"resume is {resume!r}: it must be {' or '.join(RESUME)}")
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as Python itself finds it out
        raise InputError(
            f"workers={experiment.workers} starts processes that import this script again: put the call of "
            'jaxtrain.fit under if __name__ == "__main__":'
        )


def _working_directory() -> str:
    """Return the working directory; where it was deleted, the shell's name of it."""
    try:
        return str(Path.cwd())
    except OSError:
        return os.environ.get("PWD") or Path("/").anchor


def run(session: Session, experiment: Experiment) -> dict[str, Any]:
    """Train ``experiment`` as ``session`` says; returns its result, which the console has shown.

    Raises:
      InputError, RunError, Stopped: as ``fit``.
    """
    with open_run(session, experiment, assemble) as opened:
        result = opened.stored_result() or opened.train()
    show_summary(session.console, session.name, str(session.folder), result)
    return result


@contextlib.contextmanager
def open_run(
    session: Session, experiment: Experiment, assemble: Callable[..., Program] = assemble
) -> Iterator[OpenRun]:
    """Compare ``experiment`` with what is recorded in the run's folder, and assemble it.

    Args:
      session: the settings of the run.
      experiment: what to run.
      assemble: ``(experiment, mesh, inspect=) -> program``.

    Raises:
      InputError, RunError: it is another run, or cannot be assembled.
    """
    start_time, mesh, folder = time.perf_counter(), session.mesh, session.folder
    multihost.on_process_0(lambda: capacity.check_folder(folder.path), "folder")
    record = {
        "origin": "jaxtrain.fit",
        "overrides": [],
        **session.record,
        "devices": [device.device_kind for device in mesh.devices.flat],
        "mesh": dict(mesh.shape),
        "bits": environment.bitwise_settings(mesh, session.deterministic),
        "started_in": _working_directory(),
    }
    existing = folder.record()
    check = RunCheck(
        folder, existing, experiment, session.console, session.strict, session.accept_changed_data
    )
    first_folder = record["started_in"] if existing is None else existing.get("started_in")
    paths.set_base_folders(session.file and session.file.parent, first_folder)
    notes = environment.changes(existing, record) if existing else []
    source = folder.init_from(session.init_from, session.init_map)
    sharding.check_batch(experiment.batch, mesh, accumulate=experiment.accumulate)
    if existing is not None:  # another run is refused before any data is opened
        folder.check(experiment)
    record |= check.code(session.code)
    record |= check.init_from(source)
    program = assemble(experiment, mesh, inspect=lambda sources: record.update(check.data(sources)))
    try:
        record |= check.teacher(program.teacher)
        yield OpenRun(session, program, start_time, record, existing, source, notes, check)
    finally:
        session.console.end()
        program.close()


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """An assembled run, before its first update.

    Attributes:
      session: its settings.
      program: what it runs.
      start_time: the ``time.perf_counter()`` that wall time is counted from.
      record: what its ``config.json`` would say of a start now.
      existing: its ``config.json``; None for a new run.
      init_from: ``[source, renames]`` of the parameters it starts from; None where it has its own.
      notes: warnings about a resumed run, one per line.
      check: compares its code and its data with ``existing``.
    """

    session: Session
    program: Program
    start_time: float
    record: dict[str, Any]
    existing: dict[str, Any] | None
    init_from: list[Any] | None
    notes: Sequence[str]
    check: RunCheck

    def stored_result(self, about: bool = True) -> dict[str, Any] | None:
        """Show the notes of the run, and with ``about`` what it is; return its result if it is finished."""
        session, console, program = self.session, self.session.console, self.program
        monitor.parse_window(session.profile, program.steps)  # an error before anything is shown
        result = session.folder.result(program.steps)
        if about:
            where = f"{session.name} in {session.folder} on {sharding.describe_mesh(session.mesh)}"
            console.note(f"{where}, batch {_batch_text(program.experiment, session.mesh)}")
        for note in (*session.notes, *program.notes, *(self.notes if result is None else ())):
            console.note(note)
        if result is None:
            return None
        self.check.keep_result()
        if about:
            console.note(
                f"this run is finished{_mesh_note(self.existing)}: to train again use --new, or more epochs "
                "with --extend --workdir DIR (in jaxtrain.fit: another folder, or extend=True)"
            )
        if session.profile:
            console.note(f"--profile {session.profile}: nothing to profile, no update is left")
        return result

    def prepare(self, choice: Choice | None = None) -> tuple[Program, dict[str, Any]]:
        """Check everything that can be checked, measure what is to be measured, then acquire the folder.

        Args:
          choice: how many updates one compiled call runs; None decides it.

        Returns:
          The program, and the conditions that differ from those of the last start.
        """
        session, program, existing = self.session, self.program, self.existing
        folder, console = session.folder, session.console
        if existing is not None:
            run_length.check_length(program, existing, folder.path, session.extend)
        multihost.on_process_0(lambda: capacity.check_disk(program, folder.path), "disk")
        capacity.check_memory(program)
        if self.init_from and existing is None:  # a run that cannot begin leaves no folder
            checkpoint.check_init_from(self.init_from[0], self.init_from[1], program.abstract_state)
        notes: list[str] = []
        with out_of_memory.explain_out_of_memory(program, session.name, folder.path, console):
            if existing is None:
                with compile_in_background(program):
                    notes = check_first_evaluation(program)
            choice = choice or decide(program, existing, session.deterministic)
        for note in notes:
            console.note(note)
        if choice.count > 1:
            console.note(f"{choice.count} updates per compiled call: {choice.why}")
        record = self.record | program.choices | choice.record()
        changed = folder.acquire(session.name, program.experiment, record)
        return program.with_cadence(steps_per_execution=choice.count), changed

    def train(self) -> dict[str, Any]:
        """Train with the folder locked; returns the result.

        Raises:
          InputError, RunError, Stopped: as ``fit``.
        """
        session = self.session
        profile_window = monitor.parse_window(session.profile, self.program.steps)
        layer_pictures = LayerPictures(self.program) if session.monitor_layers else None
        program, changed = self.prepare()
        try:
            with session.folder.locked(session.console.note), session.observe() as observers:
                return loop.fit(
                    program,
                    session.folder.path,
                    session.console,
                    session.name,
                    self.start_time,
                    resume=session.resume,
                    init_from=self.init_from,
                    changed=changed,
                    grace=session.grace,
                    hang_after=session.hang_after,
                    strict=session.strict,
                    profile_window=profile_window,
                    layer_pictures=layer_pictures,
                    observers=observers,
                )
        except Stopped as stopped:
            raise Stopped(f"{stopped}; resume with: {session.resume_command}", stopped.signum) from None


def _batch_text(experiment: Experiment, mesh: Mesh) -> str:
    each = experiment.batch // sharding.batch_parts(mesh)
    parts = f", in {experiment.accumulate} microbatches" if experiment.accumulate > 1 else ""
    return f"{experiment.batch} ({each} per device{parts})"


def _mesh_note(record: dict[str, Any] | None) -> str:
    """Return the mesh that a finished run started on, where its record has one."""
    sizes = (record or {}).get("mesh")
    return f" (it began on {sharding.mesh_text(sizes)})" if isinstance(sizes, dict) else ""
