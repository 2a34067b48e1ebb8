"""``Experiment``: everything a run computes, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Literal

from jaxtrain.compress.fake_quantize import Compression, check_compression
from jaxtrain.core.errors import InputError
from jaxtrain.data import Source
from jaxtrain.models import Precision, Remat, check_precision, check_remat
from jaxtrain.sharding import Rule
from jaxtrain.step.gradients import ReduceDtype, check_reduce_dtype
from jaxtrain.step.guard import Policy


def _operational(default: Any) -> Any:
    """Return a field that changes how a run is executed and never what it computes."""
    return dataclasses.field(default=default, metadata={"operational": True})


def _added(default: Any) -> Any:
    """Return a field that is in the config text and its hash only where it differs from its default.

    Hashes of experiments from before the field existed do not change.
    """
    return dataclasses.field(default=default, metadata={"added": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a run depends on: model, data, loss, optimizer and schedule of the run.

    An experiment file defines one of these as ``EXPERIMENT``. The command line can change every number,
    string and boolean in it: ``--set batch=256``, ``--set optimizer.lr=0.1``. The fields from ``workers`` on
    are operational: they never change what is computed, so they are not part of the config hash, and a
    resumed run may change them.

    Attributes:
      model: a Flax Linen module, or an ``(init, apply)`` pair (``jaxtrain.models.as_model``).
      train: source of training examples: any object with ``__len__`` and ``gather(indices)``, such as
        ``data.TFDS("mnist", "train")``.
      test: source of test examples. The test set selects nothing: not the checkpoint, not when to stop.
      loss: ``(outputs, batch) -> (loss, metrics)``, such as ``losses.CrossEntropy()``; ``loss`` is a scalar.
      optimizer: ``optim.SGD``, ``Adam`` or ``AdamW``, or a frozen dataclass with ``build(steps)`` that
        returns an optax transformation.
      batch: global batch size, over all devices; int, at least 1.
      epochs: passes over ``train``, above 0; may be fractional (0.5 is half a pass).
      valid: source of validation examples, on which the best checkpoint is selected. None: no validation
        set, unless ``holdout`` makes one.
      holdout: the part of ``train`` to hold out as the validation set when ``valid`` is None: a fraction in
        (0, 1) or a number of examples. 0: none; without a validation set the last checkpoint is the result.
      augment: stages applied to training batches only, in order, such as ``(data.Flip(),)``. Stages run on
        the device, inside the compiled step.
      preprocess: stages applied to every batch, in order, after ``augment``, such as
        ``(data.Normalise(...),)``.
      post_update: functions ``State -> State`` applied in order after every update, such as
        ``(optim.EMA(),)``. With an EMA, evaluation uses the averaged weights.
      accumulate: microbatches per update (gradient accumulation); int, at least 1, and must divide ``batch``.
        Saves activation memory. The gradient is the same, except that BatchNorm statistics and dropout are
        those of each microbatch. The loss must report itself as a ``metrics.Mean``, whose count weights the
        microbatches.
      precision: dtype of the activations: ``"float32"``, ``"bfloat16"`` or ``"float16"``. Parameters and
        statistics are float32, and sums accumulate in float32. ``"float16"`` adds dynamic loss scaling
        (``optim.LossScale``).
      grad_reduce_dtype: with another precision than float32, the dtype in which devices add up the gradients
        of matrices (kernels of dense layers and attention, embeddings): ``"float32"``, or ``"compute"``, that
        of ``precision``, which moves half the bytes between devices. Gradients of biases, scales and tables
        are added up in float32, those of convolution kernels in ``precision``.
      compress: ``"int8"`` trains with dense layers and convolutions rounded to 8 bits
        (``compress.fake_quantize``): what ``export --quantize int8`` then writes computes what evaluations
        computed. None: no rounding.
      remat: which activations are saved for the backward pass; the rest is recomputed, which costs up to a
        third more time. ``"none"`` saves all; the other values are names in ``jax.checkpoint_policies``:
        ``"nothing_saveable"``, ``"dots_saveable"`` and ``"dots_with_no_batch_dims_saveable"``.
      seed: seed of initialisation, data order, augmentation and dropout; int in [0, 2**31).
      drop_remainder: True drops the examples after the last full batch of an epoch. False lets that batch
        continue into the next epoch, so every epoch visits each example.
      eval_batch: global batch size of evaluation, at least 1. None: the same as ``batch``.
      eval_every: epochs between evaluations during training, above 0; on the validation set if there is one,
        else on the test set (reported only). None: evaluate once, at the end.
      select: the validation metric that selects the best checkpoint, a number; higher is better. A leading
        minus means lower is better: ``"-loss"``.
      data_init: function ``(params, batch) -> params`` that initialises parameters from data, such as
        ``models.Whiten()``. It runs once, at step 0. ``batch`` is the first examples of ``train``, after
        ``preprocess`` and without ``augment``: as many as the function's attribute ``examples`` says, or
        one batch if it has none. The tree structure of ``params`` must not change. None: no change.
      step_factory: replacement for ``jaxtrain.step.make_train_step``. It is called as ``step_factory(model,
        loss, tx, prepare, post_update)`` and returns a pure ``(state, batch, key) -> (state, metrics)``. It
        also gets ``accumulate=`` and ``unroll=`` if ``accumulate`` is above 1, ``loss_scale=`` in float16,
        and ``grad_reduce_dtype=`` if that is ``"compute"``. The guard is added around the result. Optax
        expects the conjugate of what ``jax.grad`` returns for complex parameters. None: ``make_train_step``.
      guard: what to do with a bad update: one whose loss, gradient norm or update norm is not finite, or
        whose batch has labels outside the model's classes. ``"stop"`` ends the run; ``"skip"`` continues with
        the next batch, and ends the run at the sixth bad update in a row; in both the bad update is not
        applied. ``"off"`` does not check.
      steps_per_execution: updates per device program (``step.scan_steps``), to save dispatch time for very
        short steps; int, at least 1. ``"auto"`` measures at the start of the run; it is 1 for most models.
        Never spans an evaluation or a checkpoint. A resumed run keeps the number, since it may change the
        last bits of the result.
      placement: where the training data is stored: ``"device"`` copies all of it to every device,
        ``"stream"`` leaves it on the host and sends one batch at a time, ``"auto"`` selects by size.
      workers: processes that read a streamed source, at least 0; 0 reads in threads of the main process.
      log_every: steps between log lines; int, at least 1.
      save_every: epochs between checkpoints, above 0; may be fractional.
      max_to_keep: number of latest checkpoints to keep, at least 1, in addition to the best one.
      max_in_flight: compiled calls, each of ``steps_per_execution`` updates, that may be queued on the
        device; at least 1.
      max_loss_spike: end the run when the loss exceeds this many times its running average over about 50
        steps; above 1, and needs ``guard``. None: no limit.
      report: what ``python -m jaxtrain evaluate`` reports besides the loss's own metrics: a task report
        such as ``metrics.Binary()``, or a function ``(outputs, batch) -> metrics``. None: the report that
        the loss names (its attribute ``report``), and none for a loss without one.
      rules: how to shard parameters over the mesh, as a tuple of ``sharding.Rule``, where the built-in rules
        do not fit.

    Raises:
      InputError: a field has the wrong type or is out of range.

    >>> from jaxtrain import data, losses, models, optim
    >>> experiment = Experiment(
    ...     model=models.MLP(widths=(64,), classes=10),
    ...     train=data.Digits("train"),
    ...     test=data.Digits("test"),
    ...     loss=losses.CrossEntropy(),
    ...     optimizer=optim.SGD(lr=0.1, momentum=0.9),
    ...     batch=128,
    ...     epochs=5,
    ... )
    >>> experiment.seed, experiment.precision
    (0, 'float32')
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
    grad_reduce_dtype: ReduceDtype = "float32"
    compress: Compression | None = _added(None)  # noqa: RUF009 - a field
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
    report: Callable[..., Any] | None = _operational(None)  # noqa: RUF009 - a frozen default
    rules: tuple[Rule, ...] = _operational(())

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("batch", "accumulate", "log_every", "max_to_keep", "max_in_flight"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.steps_per_execution != "auto" and self.steps_per_execution < 1:
            raise InputError(
                f"steps_per_execution is {self.steps_per_execution}: it must be at least 1, or auto"
            )
        check_precision(self.precision)
        check_reduce_dtype(self.grad_reduce_dtype)
        check_remat(self.remat)
        check_compression(self.compress)
        _check_guard(self)
        for name in ("epochs", "save_every", "eval_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} is {value}: it must be above 0 and finite")
        for name in ("holdout", "workers"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.eval_batch is not None and self.eval_batch < 1:
            raise InputError(f"eval_batch is {self.eval_batch}: it must be at least 1")
        for name in ("batch", "eval_batch"):
            if (getattr(self, name) or 1) >= 2**31:
                raise InputError(f"{name} is {getattr(self, name)}: it must be below 2**31")
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


def _check_types(experiment: Experiment) -> None:
    """Raise InputError for a field of the wrong type, which would otherwise fail somewhere inside JAX."""
    _check_numbers(experiment)
    _check_functions(experiment)
    if not isinstance(experiment.rules, tuple) or not all(isinstance(r, Rule) for r in experiment.rules):
        raise InputError(f"rules is {experiment.rules!r}: it must be a tuple of sharding.Rule")
    if not hasattr(experiment.optimizer, "build") or isinstance(experiment.optimizer, type):
        raise InputError(
            f"optimizer is a {type(experiment.optimizer).__name__}, whose settings cannot be recorded: use "
            "optim.SGD, Adam or AdamW, or a frozen dataclass with build(steps) -> optax"
        )
    for name in ("train", "test", "valid"):
        source = getattr(experiment, name)
        if not isinstance(source, Source) and not (name == "valid" and source is None):
            raise InputError(f"{name} is {source!r}: it must have __len__ and gather(indices)")


def _check_numbers(experiment: Experiment) -> None:
    for name in ("batch", "accumulate", "seed", "log_every", "max_to_keep", "max_in_flight", "workers"):
        if type(getattr(experiment, name)) is not int:
            raise InputError(f"{name} is {getattr(experiment, name)!r}: it must be an int")
    for name in ("epochs", "save_every", "holdout", "eval_every"):
        value = getattr(experiment, name)
        may_be_none = name == "eval_every" and value is None
        if not may_be_none and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"{name} is {value!r}: it must be a number")
    size, updates = experiment.eval_batch, experiment.steps_per_execution
    if size is not None and type(size) is not int:
        raise InputError(f"eval_batch is {size!r}: it must be an int or None")
    if updates != "auto" and type(updates) is not int:
        raise InputError(f"steps_per_execution is {updates!r}: it must be an int or 'auto'")


def _check_functions(experiment: Experiment) -> None:
    if not callable(experiment.loss):
        raise InputError(
            f"loss is {experiment.loss!r}: it must be a function (outputs, batch) -> (loss, metrics)"
        )
    report = experiment.report
    if report is not None and (not callable(report) or isinstance(report, type)):
        raise InputError(f"report is {report!r}: it must be a task report, such as metrics.Classification()")
    for name in ("augment", "preprocess"):
        stages = getattr(experiment, name)
        if not isinstance(stages, tuple) or not all(callable(s) and not isinstance(s, type) for s in stages):
            raise InputError(
                f"{name} is {stages!r}: it must be a tuple of functions (batch, key) -> batch, such as "
                "(data.Normalise(),)"
            )
    for name in ("data_init", "step_factory"):
        function = getattr(experiment, name)
        if function is not None and not callable(function):
            raise InputError(f"{name} is {function!r}: it must be a function or None")
    if not isinstance(experiment.post_update, tuple) or not all(
        callable(stage) or hasattr(stage, "build") for stage in experiment.post_update
    ):
        raise InputError(
            f"post_update is {experiment.post_update!r}: it must be a tuple of functions State -> State, "
            "such as (optim.EMA(),)"
        )
