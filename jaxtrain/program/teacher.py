"""The teacher of a distillation: the model of another run or of an artifact, placed on the mesh."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain import checkpoint, sharding
from jaxtrain.checkpoint.warm_start import check_model, load_model, parse_source
from jaxtrain.compress import Distil
from jaxtrain.core import redact, safe_names
from jaxtrain.core.chunked_logits import full_logits
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.outputs import select_output
from jaxtrain.core.types import TEACHER, Batch, Model, Prepare, State
from jaxtrain.data import compose, paths
from jaxtrain.experiment import Experiment, config_text, discover, find, override
from jaxtrain.experiment.record import load as load_record
from jaxtrain.program import check_fields
from jaxtrain.program.artifact_teacher import RAW, ArtifactTeacher, Stage, keep_inputs
from jaxtrain.program.compute_model import compute_model
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID

SETTING = "loss.teacher="
SUFFIX = ".jaxtrain"  # of an artifact, by convention
MAX_LISTED = 3  # differences in a message


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher that fits the student and the batch; its arrays are read by ``load``.

    Attributes:
      source: its run, ``RUN`` or ``RUN:STEP``, or the file of an artifact.
      identity: the step, and the checksum of its checkpoint or artifact.
      model: computes its outputs: in the precision of the student's run, or in that of the artifact.
      abstract: shapes, dtypes and shardings of its ``params`` and ``extra``.
      read: reads and verifies the arrays of ``abstract``. Raises as ``checkpoint.load_model``, or InputError
        for an artifact.
      inputs: of an artifact, the fields that it takes as they are before ``preprocess``.
    """

    source: str
    identity: str
    model: Model
    abstract: State
    read: Callable[[], State]
    inputs: tuple[str, ...] | None = None

    def load(self) -> dict[str, Any]:
        """Read ``params`` and ``extra``, and verify them. Raises as ``read``."""
        state = self.read()
        return {"params": state.params, "extra": state.extra}

    def prepare(self, augment: Sequence[Stage], preprocess: Sequence[Stage]) -> Prepare:
        """Compose the stages of the student, of which there is at least one in ``augment``."""
        if self.inputs is None:
            return compose(*augment, *preprocess)
        return keep_inputs([*augment, *preprocess], len(augment), self.inputs)

    def add_to(self, state: State, held: dict[str, Any] | None = None) -> State:
        """Return ``state`` with the teacher ``held``, from ``load``; with its shapes where that is None."""
        if held is None:
            held = {"params": self.abstract.params, "extra": self.abstract.extra}
        return state.replace(extra={**state.extra, TEACHER: held})


def open_teacher(
    experiment: Experiment, mesh: Mesh, raw: Batch, prepared: Batch, outputs: Any
) -> Teacher | None:
    """Find the teacher of ``experiment.loss``; None for a loss that is not ``compress.Distil``.

    Args:
      experiment: the student's.
      mesh: the devices of its run.
      raw: shapes of its training batch as it is loaded.
      prepared: the same after ``preprocess``.
      outputs: shapes of its outputs for that batch.

    Raises:
      InputError: there is no such run or file, the run's experiment is not found or has changed, or the
        teacher does not fit: other inputs, other preprocessing (of a run), other classes.
      RunError: its record or its checkpoint is damaged.
    """
    distil = experiment.loss
    if not isinstance(distil, Distil):
        return None
    if not distil.teacher:
        raise InputError(
            f"the loss has no teacher: --set {SETTING}RUN, the folder of a trained run, or an artifact's file"
        )
    file = paths.resolve(distil.teacher)
    if file.is_file() or file.suffix == SUFFIX:
        return _open_artifact(file, experiment, distil, mesh, raw, outputs)
    given, step = parse_source(distil.teacher)
    folder = paths.resolve(given)
    source = str(folder) if step is None else f"{folder}:{step}"
    with _errors_of(distil.teacher):
        theirs = _load_experiment(folder, distil, experiment)
        theirs = dataclasses.replace(theirs, precision=experiment.precision, remat="none")
        abstract = _abstract_state(theirs, mesh, prepared)
        check_model(source, abstract, SETTING)
        model = compute_model(theirs, mesh, abstract)
        _check_outputs(distil, model, abstract, prepared, outputs)
        identity = checkpoint.identify_source(source, SETTING)
    return Teacher(source, identity, model, abstract, lambda: load_model(source, abstract, SETTING))


def _open_artifact(
    file: Path, student: Experiment, distil: Distil, mesh: Mesh, raw: Batch, outputs: Any
) -> Teacher:
    with _errors_of(distil.teacher):
        if distil.teacher_experiment is not None:
            raise InputError("an artifact needs no experiment: leave loss.teacher_experiment out")
        raw = {**raw, EPOCH: raw[EXAMPLE_ID]}
        augmented = check_fields.trace(compose(*student.augment), raw, jax.random.key(0), what="the batch")
        name = getattr(distil.loss, "output", None)
        own = select_output(outputs, name, "loss.loss.output")
        opened = ArtifactTeacher(file, mesh, augmented, name, own)
        batch = {RAW: {name: augmented[name] for name in opened.inputs}}
        _check_outputs(distil, opened.model, opened.abstract, batch, outputs)
    return Teacher(str(file), opened.identity, opened.model, opened.abstract, opened.read, opened.inputs)


@contextlib.contextmanager
def _errors_of(source: str) -> Iterator[None]:
    """Say in errors of the block that they are about the teacher."""
    try:
        yield
    except (InputError, RunError) as error:
        if str(error).startswith(SETTING):
            raise
        raise type(error)(f"{SETTING}{source}: {error}") from error


def _load_experiment(folder: Path, distil: Distil, student: Experiment) -> Experiment:
    """Load the teacher's experiment; its model and its preprocessing must be those of its record."""
    record = load_record(folder)
    target = distil.teacher_experiment or safe_names.check(
        record["name"], "its experiment", "set loss.teacher_experiment=PATH"
    )
    if distil.teacher_experiment is None and all(entry.name != target for entry in discover()):
        raise InputError(
            f"its experiment {target} ({record['origin']}) is not in run --list: set "
            "loss.teacher_experiment=FILE, which defines the same EXPERIMENT"
        )
    experiment, _ = find(target).load()
    config_text(experiment)  # registers its secrets, which are redacted from here on
    settings = [pair for pair in record["overrides"] if redact.MARK not in pair]
    experiment = override(experiment, settings)
    _check_same(record["config"], config_text(experiment), "model", "its experiment has changed")
    _check_same(
        record["config"],
        config_text(student),
        "preprocess",
        "its batches were prepared in another way than this experiment's",
    )
    return experiment


def _check_same(recorded: dict[str, str], now: dict[str, str], part: str, what: str) -> None:
    """Raise InputError, naming those that differ, unless all settings of this part are as recorded."""

    def own(texts: dict[str, str]) -> dict[str, str]:
        return {path: text for path, text in texts.items() if path.split(".")[0].split("[")[0] == part}

    before, after = own(recorded), own(now)
    differ = [path for path in {**after, **before} if before.get(path) != after.get(path)]
    # Of a stage that is another one, or absent, not each of its settings too.
    shown = [path for path in differ if not any(path.startswith(f"{other}.") for other in differ)]
    if not shown:
        return
    texts = [
        f"{path} is {before.get(path, 'absent')} in its run and {after.get(path, 'absent')} here"
        for path in shown[:MAX_LISTED]
    ]
    more = f", and {len(shown) - MAX_LISTED} more differ" if len(shown) > MAX_LISTED else ""
    raise InputError(f"{what}: {', '.join(texts)}{more}: make them the same")


def _abstract_state(exp: Experiment, mesh: Mesh, prepared: Batch) -> State:
    """Return shapes, dtypes and shardings of the teacher's ``params`` and ``extra``, as in its own run."""
    model = compute_model(exp, mesh)
    what = "the teacher's model"
    params, extra = check_fields.trace(model.init, jax.random.key(0), prepared, what=what)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = State(step, params, extra, ())
    names = {} if model.axes is None or mesh.size == 1 else model.axes(prepared)
    placement = sharding.place(state, mesh, names if mesh.size > 1 else None, exp.rules, check_used=False)

    def with_sharding(x: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(with_sharding, state, placement.shardings)


def _check_outputs(distil: Distil, model: Model, abstract: State, prepared: Batch, outputs: Any) -> None:
    """Raise InputError unless the teacher's outputs have the shape of the student's."""

    def forward(params: Any, extra: Any, batch: Batch) -> Any:
        return full_logits(model.apply(params, extra, batch, train=False, key=None)[0])

    without_shardings = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract)
    theirs = check_fields.trace(
        forward, without_shardings.params, without_shardings.extra, prepared, what="the teacher's model"
    )
    name = getattr(distil.loss, "output", None)
    student, teacher = (select_output(one, name, "loss.loss.output") for one in (outputs, theirs))
    distil.check_shapes(student, teacher)
