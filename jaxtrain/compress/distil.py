"""Distillation: a loss that also compares the outputs with those of a teacher, and a model that has one."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.core.chunked_logits import full_logits
from jaxtrain.core.errors import InputError
from jaxtrain.core.outputs import select_output
from jaxtrain.core.types import TEACHER, Batch, Metrics, Model
from jaxtrain.losses import MSE, BinaryCrossEntropy, CrossEntropy
from jaxtrain.metrics import Mean
from jaxtrain.metrics.mean import expand_mask
from jaxtrain.models import as_model

Match = Literal["kl", "mse"]


class DistilOutputs(NamedTuple):
    """What the model of ``with_teacher`` returns in training.

    Attributes:
      student: the outputs of the trained model.
      teacher: those of the teacher for the same batch; no gradient passes through them.
    """

    student: Any
    teacher: Any


@dataclasses.dataclass(frozen=True)
class Distil:
    """Train on the labels and on the outputs of a trained model, the teacher (Hinton, arXiv:1503.02531).

    The loss is ``(1 - alpha) * loss + alpha * distil_loss``. With ``match="kl"``, for class logits,
    ``distil_loss = T**2 * KL(softmax(teacher / T) || softmax(student / T))``, averaged over the examples
    whose labels count; the factor ``T**2`` keeps the size of its gradient when the temperature ``T`` changes.
    With ``match="mse"``, for any outputs, it is the mean squared difference of student and teacher.

    As ``loss=`` of an ``Experiment`` it is all that is needed: the teacher's parameters are read from its run
    into ``state.extra["teacher"]`` and sharded as in a run of its own. They are arguments of the train step,
    not constants, and not in the checkpoints: a resumed run reads them again, and refuses a teacher that has
    changed. The teacher sees the batch that the student sees, after ``augment`` and ``preprocess``, in
    evaluation mode and in the run's ``precision``. An artifact, the file that ``export`` writes, may be the
    teacher too: it prepares the augmented batch itself, in its own precision, and is replicated. Training
    reports ``loss``, ``hard_loss`` (that of the labels), ``distil_loss`` and the other metrics of the labels'
    loss; evaluations use that loss alone, and no teacher.

    In a loop of your own give ``make_train_step`` the model ``with_teacher(student, teacher)``.

    Attributes:
      loss: the loss of the labels, such as ``losses.CrossEntropy()``.
      teacher: the teacher's run, ``RUN`` or ``RUN:STEP``; without a step, the best on its validation set or
        else the latest. Averages of its parameters are used where it has them. Or the file of an artifact,
        such as ``"model.jaxtrain"``, which needs no code of its experiment.
      temperature: T, above 0; of ``"kl"`` only.
      alpha: weight of the teacher, in [0, 1]: 0 is training without it, 1 without labels.
      match: ``"kl"``, for a softmax over the last axis, or ``"mse"``.
      teacher_experiment: the file of the teacher's experiment, where ``run --list`` does not show it. The
        file is executed.

    >>> outputs = DistilOutputs(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 2.0]]))
    >>> loss, metrics = Distil(temperature=2.0, alpha=0.25)(outputs, {"label": jnp.array([0])})
    >>> [round(metrics[name].compute(), 4) for name in ("hard_loss", "distil_loss", "loss")]
    [0.1269, 1.8485, 0.5573]
    """

    loss: Callable[..., Any] = CrossEntropy()  # noqa: RUF009 - frozen
    teacher: str = ""
    temperature: float = 4.0
    alpha: float = 0.5
    match: Match = "kl"
    teacher_experiment: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss) or isinstance(self.loss, type | Distil):
            raise InputError(f"loss.loss is {self.loss!r}: it must be the loss of the labels")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"loss.temperature is {self.temperature}: it must be above 0")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"loss.alpha is {self.alpha}: it must be in [0, 1]")
        if self.match not in typing.get_args(Match):
            raise InputError(
                f"loss.match is {self.match!r}: it must be one of {', '.join(typing.get_args(Match))}"
            )
        if self.match == "kl" and isinstance(self.loss, MSE | BinaryCrossEntropy):
            raise InputError(
                f"loss.match is 'kl', which is for the logits of classes, and loss.loss is "
                f"{type(self.loss).__name__}: use match='mse'"
            )

    @property
    def report(self) -> Any:
        """The report that the labels' loss names; None where it names none."""
        return getattr(self.loss, "report", None)

    @property
    def label(self) -> str:
        """The name of the field with the labels."""
        return getattr(self.loss, "label", "label")

    @property
    def ignore(self) -> int | None:
        """The label that counts nowhere."""
        return getattr(self.loss, "ignore", None)

    def __call__(self, outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Return the loss and its metrics.

        Args:
          outputs: ``DistilOutputs``, from the model of ``with_teacher``.
          batch: as for the labels' loss.

        Raises:
          InputError: there are no outputs of a teacher, or they have another shape.
        """
        if not isinstance(outputs, DistilOutputs):
            raise InputError(
                "compress.Distil needs the outputs of a teacher: train compress.with_teacher(student, "
                "teacher), and evaluate with the labels' loss, Distil.loss"
            )
        hard, metrics = self.loss(outputs.student, batch)
        student, teacher = (self._selected(one) for one in outputs)
        self.check_shapes(student, teacher)
        values = self._values(_at_least_float32(student), _at_least_float32(teacher))
        soft = Mean.of(values, self._mask(batch, values.ndim))
        loss = (1 - self.alpha) * hard + self.alpha * soft.total / jnp.maximum(soft.count, 1)
        count = getattr(metrics.get("loss"), "count", jnp.ones((), loss.dtype))  # weights microbatches
        hard_loss = metrics.get("loss", Mean.of(hard))
        return loss, {
            **metrics,
            "loss": Mean(loss * count, count),
            "hard_loss": hard_loss,
            "distil_loss": soft,
        }

    def check_shapes(self, student: Any, teacher: Any) -> None:
        """Raise InputError unless both outputs, arrays or their shapes, have the same shape."""
        if student.shape == teacher.shape:
            return
        if self.match == "kl" and student.shape[:-1] == teacher.shape[:-1]:
            raise InputError(
                f"the teacher has {teacher.shape[-1]} classes and the student {student.shape[-1]}: give a "
                "teacher of the same classes"
            )
        raise InputError(
            f"the teacher's outputs have shape {list(teacher.shape)} and the student's "
            f"{list(student.shape)}: give a teacher of the same task"
        )

    def outside(self, outputs: Any, batch: Batch) -> jax.Array:
        """Return how many labels are out of range: int32 ``[]``, 0 where the labels' loss does not say."""
        outside = getattr(self.loss, "outside", None)
        student = outputs.student if isinstance(outputs, DistilOutputs) else outputs
        return jnp.int32(0) if outside is None else outside(student, batch)

    def _selected(self, outputs: Any) -> Any:
        return select_output(outputs, getattr(self.loss, "output", None), "loss.loss.output")

    def _values(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        """Return the divergence of each prediction ``[batch, ...]``, or the squared error of each output."""
        if self.match == "mse":
            return (student - teacher) ** 2
        ours = jax.nn.log_softmax(student / self.temperature)
        theirs = jax.nn.log_softmax(teacher / self.temperature)
        return self.temperature**2 * (jnp.exp(theirs) * (theirs - ours)).sum(-1)

    def _mask(self, batch: Batch, ndim: int) -> jax.Array | None:
        """Return which predictions count: those whose labels do."""
        mask = batch.get("mask")
        if self.ignore is None:
            return mask
        for name in (self.label, "label_mixed"):
            if name in batch:
                included = batch[name] != self.ignore
                included = expand_mask(included, max(ndim, included.ndim))
                mask = included if mask is None else included & (expand_mask(mask, included.ndim) > 0)
        return mask


def with_teacher(student: Any, teacher: Any) -> Model:
    """Return ``student`` with an ``apply`` that in training also computes the outputs of ``teacher``.

    The teacher's ``params`` and ``extra`` are those in ``state.extra["teacher"]``, a dict of these two, which
    must be added to the state that ``make_init`` made. They are not trained: the teacher is applied in
    evaluation mode, and no gradient passes through it.

    Args:
      student: a Linen module or an ``(init, apply)`` pair.
      teacher: the same; its ``init`` is not used.

    >>> from jaxtrain.models import MLP
    >>> student, teacher = MLP(widths=(8,), classes=3), MLP(widths=(64,), classes=3)
    >>> model, batch, key = with_teacher(student, teacher), {"image": jnp.ones((2, 4))}, jax.random.key(0)
    >>> params, extra = as_model(teacher).init(key, batch)
    >>> own, _ = model.init(key, batch)
    >>> held = {"teacher": {"params": params, "extra": extra}}
    >>> outputs, _ = model.apply(own, held, batch, train=True, key=key)
    >>> outputs.student.shape, outputs.teacher.shape
    ((2, 3), (2, 3))
    """
    own, other = as_model(student), as_model(teacher)

    def apply(
        params: Any, extra: dict[str, Any], batch: Batch, *, train: bool, key: jax.Array | None
    ) -> tuple[Any, dict[str, Any]]:
        statistics = {name: tree for name, tree in extra.items() if name != TEACHER}
        outputs, updated = own.apply(params, statistics, batch, train=train, key=key)
        if not train:
            return outputs, extra
        held = extra[TEACHER]
        theirs, _ = other.apply(held["params"], held["extra"], batch, train=False, key=None)
        theirs = jax.lax.stop_gradient(full_logits(theirs))
        return DistilOutputs(full_logits(outputs), theirs), {**updated, TEACHER: held}

    return own._replace(apply=apply, flops=None)  # a formula would leave the teacher out


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
