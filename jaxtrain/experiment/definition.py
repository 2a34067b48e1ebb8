"""What a run is, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Literal

from jaxtrain.core.errors import InputError
from jaxtrain.data import Source
from jaxtrain.models import Precision, Remat, check_precision, check_remat
from jaxtrain.sharding import Rule
from jaxtrain.step.guard import Policy


def _operational(default: Any) -> Any:
    """A setting that changes how a run is carried out and never what it computes."""
    return dataclasses.field(default=default, metadata={"operational": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a run depends on. An experiment file holds one, as ``EXPERIMENT``.

    Attributes:
      model: a Linen module or an ``(init, apply)`` pair.
      train: source of training examples.
      test: source of test examples. It chooses nothing.
      loss: ``(outputs, batch) -> (scalar, metrics)``.
      optimizer: an ``optim`` config, or anything with ``build(steps)``.
      batch: global batch size.
      epochs: passes over ``train``, above 0; may be fractional.
      valid: source of validation examples, which choose the best checkpoint.
      holdout: without ``valid``, this part of ``train`` is held out as one: a fraction in (0, 1) or a
        number of examples; 0 holds out none.
      augment: stages for training batches only, such as ``data.Flip()``.
      preprocess: stages for every batch, after ``augment``, such as ``data.Normalise(...)``.
      post_update: ``State -> State`` functions applied in order after every update, such as ``optim.EMA()``,
        whose average is then what is evaluated.
      accumulate: parts that ``batch`` is cut into, one after another, for the memory of one part. Same
        gradients, except that BatchNorm statistics are of each part by itself, and so is dropout.
      precision: of the model's activations; parameters stay float32. With ``"float16"`` the loss is scaled
        (``optim.LossScale``).
      remat: what is kept for the backward pass; all else is computed again, for less memory and up to a third
        more time: ``"none"`` keeps everything, the others are ``jax.checkpoint_policies``.
      seed: of initialisation, order, augmentation and dropout.
      drop_remainder: leave out the examples after an epoch's last whole batch; else that batch runs over into
        the next epoch.
      eval_batch: batch size of evaluation; None is ``batch``.
      eval_every: epochs between evaluations while training; None evaluates at the end only. Scored on the
        validation set where there is one, else on the test set, for looking at only.
      select: the validation metric that says which checkpoint is best; ``-loss`` means lower is better.
      data_init: ``(params, batch) -> params``, run once on the first training examples, preprocessed and not
        augmented: as many as its attribute ``examples`` says, or one batch.
      step_factory: replaces ``jaxtrain.step.make_train_step``, with the same signature.
      guard: what is done about an update whose loss, gradient norm or update norm is not finite, or whose
        batch has a label that is no class: ``"stop"`` ends the run, ``"skip"`` goes on with the next batch
        until six in a row were bad, and neither applies the update. ``"off"`` does not look.
      steps_per_execution: updates that are started at once, as one program (``step.scan_steps``), where no
        evaluation and no checkpoint comes between them. ``"auto"`` is as many as are measured to be faster
        when the run begins, 1 for most; the number is part of the run, for it may change the last bits.
      placement: where training data is kept: on each ``"device"``, on the host (``"stream"``), or
        ``"auto"``, which decides by size.
      workers: processes that read a streamed source; 0 reads in threads.
      log_every: steps between log lines.
      save_every: epochs between checkpoints.
      max_to_keep: latest checkpoints to keep, beside the best.
      max_in_flight: steps that may be queued on the device, at least 1.
      max_loss_spike: a loss above this many times its average of about 50 steps ends the run; above
        1, None never.
      rules: how parameters are split over a mesh, where the built-in rules do not suit (``sharding.Rule``).
    """

    model: Any
    train: Source
    test: Source
    loss: Callable[..., Any]
    optimizer: Any
    batch: int
    epochs: float
    valid: Source | None = None
    holdout: float = 0
    augment: tuple[Any, ...] = ()
    preprocess: tuple[Any, ...] = ()
    post_update: tuple[Any, ...] = ()
    accumulate: int = 1
    precision: Precision = "float32"
    remat: Remat = "none"
    seed: int = 0
    drop_remainder: bool = False
    eval_batch: int | None = None
    eval_every: float | None = 1.0
    select: str = "accuracy"
    data_init: Callable[..., Any] | None = None
    step_factory: Callable[..., Any] | None = None
    guard: Policy = "stop"
    steps_per_execution: int | Literal["auto"] = "auto"
    placement: Literal["auto", "device", "stream"] = "auto"
    workers: int = _operational(0)
    log_every: int = _operational(50)
    save_every: float = _operational(1.0)
    max_to_keep: int = _operational(2)
    max_in_flight: int = _operational(2)
    max_loss_spike: float | None = _operational(None)
    rules: tuple[Rule, ...] = _operational(())

    def __post_init__(self) -> None:
        _check_kinds(self)
        for name in ("batch", "accumulate", "log_every", "max_to_keep", "max_in_flight"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.steps_per_execution != "auto" and self.steps_per_execution < 1:
            raise InputError(
                f"steps_per_execution is {self.steps_per_execution}: it must be at least 1, or auto"
            )
        check_precision(self.precision)
        check_remat(self.remat)
        _check_guard(self)
        for name in ("epochs", "save_every", "eval_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} is {value}: it must be above 0")
        for name in ("holdout", "workers"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.eval_batch is not None and self.eval_batch < 1:
            raise InputError(f"eval_batch is {self.eval_batch}: it must be at least 1")
        if self.valid is not None and self.holdout:
            raise InputError("valid and holdout are both given: a run has one validation set")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}: it must be in [0, 2**31)")


def _check_guard(experiment: Experiment) -> None:
    guard, spike = experiment.guard, experiment.max_loss_spike
    if guard not in typing.get_args(Policy):
        raise InputError(f"guard is {guard!r}: it must be one of {', '.join(typing.get_args(Policy))}")
    if spike is None:
        return
    if isinstance(spike, bool) or not isinstance(spike, int | float) or not 1 < spike < float("inf"):
        raise InputError(f"max_loss_spike is {spike!r}: it must be a number above 1, or None")
    if guard == "off":
        raise InputError(
            "max_loss_spike needs the guard, which is off: use guard=stop or skip, or max_loss_spike=None"
        )


def _check_kinds(experiment: Experiment) -> None:
    """Say in the experiment's own terms what would fail somewhere inside JAX."""
    for name in ("batch", "accumulate", "seed", "log_every", "max_to_keep", "max_in_flight", "workers"):
        if type(getattr(experiment, name)) is not int:
            raise InputError(f"{name} is {getattr(experiment, name)!r}: it must be an int")
    for name in ("epochs", "save_every", "holdout"):
        value = getattr(experiment, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{name} is {value!r}: it must be a number")
    many = experiment.steps_per_execution
    if many != "auto" and type(many) is not int:
        raise InputError(f"steps_per_execution is {many!r}: it must be an int or 'auto'")
    if not callable(experiment.loss):
        raise InputError(
            f"loss is {experiment.loss!r}: it must be a function (outputs, batch) -> (loss, metrics)"
        )
    if not isinstance(experiment.post_update, tuple) or not all(
        callable(stage) or hasattr(stage, "build") for stage in experiment.post_update
    ):
        raise InputError(
            f"post_update is {experiment.post_update!r}: it must be a tuple of functions State -> State, "
            "such as (optim.EMA(),)"
        )
    if not isinstance(experiment.rules, tuple) or not all(isinstance(r, Rule) for r in experiment.rules):
        raise InputError(f"rules is {experiment.rules!r}: it must be a tuple of sharding.Rule")
    if not hasattr(experiment.optimizer, "build"):
        raise InputError(
            f"optimizer is a {type(experiment.optimizer).__name__}, whose settings the run could not record: "
            "use optim.SGD, Adam or AdamW, or a frozen dataclass of your own with build(steps) -> optax"
        )
    for name in ("train", "test", "valid"):
        source = getattr(experiment, name)
        if not isinstance(source, Source) and not (name == "valid" and source is None):
            raise InputError(f"{name} is {source!r}: it must have __len__ and gather(indices)")
