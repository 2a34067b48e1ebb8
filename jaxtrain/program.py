"""An experiment made ready to run on a mesh: data opened, shapes checked, functions compiled on first use."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain import preflight, sharding
from jaxtrain.data import Arrays, Order, Sequential, Source, Subset, compose, holdout, in_memory
from jaxtrain.data.loader import Check, Loader, Resident, Streamed
from jaxtrain.errors import InputError, RunError
from jaxtrain.experiment import Experiment
from jaxtrain.models import compute_in
from jaxtrain.optim import Schedule
from jaxtrain.optim import rate as optim_rate
from jaxtrain.step import make_eval_step, make_init, make_train_step
from jaxtrain.types import Batch, Metrics, Model, State

RESIDENT_PART = 10  # a set of at most this part of a device's memory is kept on it


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples to evaluate on: ``batches`` padded batches that hold each of ``examples`` once."""

    loader: Loader
    batches: int
    examples: int
    step: Callable[[State, Any], Metrics]


@dataclasses.dataclass(frozen=True)
class Program:
    """What the loop needs.

    Attributes:
      experiment: what it was made from.
      steps: updates of the whole run.
      key: the run's random key; steps fold their number into it.
      init: makes the state of step 0, sharded.
      like: that state's shapes, dtypes and shardings.
      train_step: compiled ``(state, batch, key) -> (state, metrics)``; the state is donated.
      train: training batches.
      evals: ``"valid"`` (where there is one) and ``"test"``.
      choices: what was decided by measurement or size, for the run's record.
      epoch: batches in one pass over the training examples.
      rates: the learning rate of every update, float [steps]; None when the optimizer has none to tell.
    """

    experiment: Experiment
    steps: int
    key: jax.Array
    init: Callable[[], State]
    like: State
    train_step: Callable[[State, Any, jax.Array], tuple[State, Metrics]]
    train: Loader
    evals: dict[str, Split]
    choices: dict[str, Any]
    epoch: float
    rates: np.ndarray | None

    def evaluates(self, step: int) -> bool:
        """Is there an evaluation after update ``step``? The final one on the test set is not counted."""
        if step == self.steps:
            return "valid" in self.evals
        every = self.experiment.eval_every
        return every is not None and self._completes(step, every)

    def saves(self, step: int) -> bool:
        """Is there a checkpoint after update ``step``?"""
        return step == self.steps or self._completes(step, self.experiment.save_every)

    def close(self) -> None:
        """Stop the threads and processes that read the data."""
        for loader in (self.train, *(split.loader for split in self.evals.values())):
            loader.close()

    def _completes(self, step: int, epochs: float) -> bool:
        """Does update ``step`` complete a multiple of ``epochs``, which may end within a batch?"""
        period = max(1.0, epochs * self.epoch)
        return step // period > (step - 1) // period

    def position(self, step: int) -> dict[str, float]:
        """Where update ``step`` stands: the epoch and the learning rate, for the records."""
        rate = {} if self.rates is None else {"learning_rate": float(self.rates[step - 1])}
        return {"epoch": step / self.epoch, **rate}

    def score(self, values: dict[str, Any]) -> float | None:
        """How good a validation result is, higher is better; None when it is not finite."""
        name = self.experiment.select
        score: float = -values[name[1:]] if name.startswith("-") else values[name]
        return score if math.isfinite(score) else None


def assemble(
    experiment: Experiment,
    mesh: Mesh,
    metrics_fn: Callable[[Any, Batch], Metrics] | None = None,
) -> Program:
    """Open the data and build the functions of ``experiment``; nothing is compiled or computed yet.

    Args:
      experiment: what to run.
      mesh: the devices.
      metrics_fn: ``(outputs, batch) -> metrics`` to report in evaluations beside the loss's own.

    Raises:
      InputError: whatever the preflight finds.
    """
    exp, model = experiment, compute_in(experiment.model, experiment.compute_dtype)
    eval_batch = exp.eval_batch or exp.batch
    preflight.check_splits(exp)
    sharding.check_batch(exp.batch, mesh)
    sharding.check_batch(eval_batch, mesh, "eval_batch" if exp.eval_batch else "batch")
    sources = _open_sources(exp, mesh)
    preflight.check_fields(sources)
    outputs = _outputs(exp, model, sources["train"])
    check = preflight.value_check(model, exp.loss, outputs)
    preflight.check_values(check, sources)

    order = Order(exp.seed, len(sources["train"]), exp.batch, exp.remainder)
    steps = order.steps(exp.epochs)
    train = _loader(sources["train"], order, exp, mesh, check)
    init_key, key = jax.device_put(jax.random.split(jax.random.key(exp.seed)), sharding.replicated(mesh))
    tx, after = exp.optimizer.build(steps), _after(exp, steps)
    start = make_init(model, tx, compose(*exp.preprocess), exp.data_init, after)
    like, init = _init_function(start, _sample(exp, sources["train"]), mesh, init_key)
    prepare = compose(lambda batch, _: train.fetch(batch), *exp.augment, *exp.preprocess)
    update = (exp.step_factory or make_train_step)(model, exp.loss, tx, prepare, after)
    train_step = _train_function(update, train, mesh, like, key)
    evals = {}
    for name in [name for name in sources if name != "train"]:
        rows = Sequential(len(sources[name]), eval_batch)
        loader = _loader(sources[name], rows, exp, mesh, check)
        step = _eval_function(exp, model, loader, mesh, like, metrics_fn)
        evals[name] = Split(loader, len(rows), rows.n, step)
    loaders = {"train": train, **{name: split.loader for name, split in evals.items()}}
    resident = {name: isinstance(loader, Resident) for name, loader in loaders.items()}
    choices = {"steps": steps, "resident": resident}
    epoch = order.n // order.batch if exp.remainder == "drop" else order.n / order.batch
    return Program(exp, steps, key, init, like, train_step, train, evals, choices, epoch, _rates(exp, steps))


def abstract_state(experiment: Experiment, mesh: Mesh, example: Batch) -> State:
    """Shapes, dtypes and shardings of ``experiment``'s state, for restoring it where its data is not needed.

    Args:
      experiment: what the state is of.
      mesh: the devices to restore to.
      example: arrays of one raw example's shapes, with a leading axis.
    """
    exp, steps = experiment, 1000  # how many there are changes no shape
    model, prepare = compute_in(exp.model, exp.compute_dtype), compose(*exp.preprocess)
    start = make_init(model, exp.optimizer.build(steps), prepare, None, _after(exp, steps))
    return _abstract(start, example, mesh)


def _open_sources(exp: Experiment, mesh: Mesh) -> dict[str, Source]:
    """``train``, ``test`` and perhaps ``valid``; what is small enough comes back as Arrays."""
    limit = {
        "auto": sharding.device_memory(mesh) // RESIDENT_PART,
        "resident": sys.maxsize,
        "stream": 0,
    }[exp.feed]

    def opened(name: str, source: Source) -> Source:
        if len(source) < 1:
            raise InputError(f"{name}: the data set {type(source).__name__} is empty")
        try:
            return in_memory(source, limit) or source
        except (InputError, RunError):
            raise
        except Exception as error:  # a user's own source: anything may come out of it
            line = str(error).partition("\n")[0]
            raise RunError(
                f"{name}: {type(source).__name__}.gather failed: {type(error).__name__}: {line} "
                "(--debug shows where)"
            ) from error

    train, valid = opened("train", exp.train), exp.valid
    if exp.holdout:
        kept, held = holdout(len(train), exp.holdout)
        train, valid = opened("train", Subset(train, kept)), Subset(train, held)
    splits = {"train": train, "test": opened("test", exp.test)}
    return splits if valid is None else {**splits, "valid": opened("valid", valid)}


def _outputs(exp: Experiment, model: Model, source: Source) -> Any:
    """Shapes of the model's outputs for a batch of ``source``."""
    one = source.gather(np.zeros(1, np.int64))
    batch = {k: jax.ShapeDtypeStruct((exp.batch, *v.shape[1:]), v.dtype) for k, v in one.items()}

    def forward(key: jax.Array, batch: Batch) -> Any:
        batch = compose(*exp.preprocess)(batch, None)
        params, extra = model.init(key, batch)
        return model.apply(params, extra, batch, train=False, key=None)[0]

    return preflight.trace(forward, jax.random.key(0), batch, what="the model")


def _loader(source: Source, order: Order | Sequential, exp: Experiment, mesh: Mesh, check: Check) -> Loader:
    if isinstance(source, Arrays) and exp.feed != "stream":
        return Resident(source, order, mesh)
    return Streamed(source, order, mesh, exp.workers, check)


def _sample(exp: Experiment, source: Source) -> Batch:
    """What initialisation sees: parameters need one example's shapes; ``data_init`` asks for more."""
    examples = 1 if exp.data_init is None else getattr(exp.data_init, "examples", exp.batch)
    return source.gather(np.arange(min(examples, len(source))))


def _init_function(
    start: Callable[[jax.Array, Batch], State], sample: Batch, mesh: Mesh, key: jax.Array
) -> tuple[State, Callable[[], State]]:
    """The abstract state, and what makes the one of step 0."""
    whole = sharding.replicated(mesh)
    init = sharding.compile(start, args=(whole, whole), out=whole)
    return _abstract(init, sample, mesh), lambda: init(key, jax.device_put(sample, whole))


def _abstract(start: Callable[[jax.Array, Batch], State], sample: Batch, mesh: Mesh) -> State:
    whole = sharding.replicated(mesh)
    shapes = preflight.trace(start, jax.random.key(0), sample, what="the state")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)


def _train_function(
    update: Callable[[State, Batch, jax.Array], tuple[State, Metrics]],
    train: Loader,
    mesh: Mesh,
    like: State,
    key: jax.Array,
) -> Callable[[State, Any, jax.Array], tuple[State, Metrics]]:
    """``update`` compiled; its first argument's buffers are reused for its result."""
    whole = sharding.replicated(mesh)
    step = sharding.compile(update, args=(whole, train.shardings, whole), out=whole, donate=(0,))
    preflight.trace(step, like, train.batch(0), key, what="the train step")
    return step


def _after(exp: Experiment, steps: int) -> tuple[Callable[[State], State], ...]:
    """The stages after an update; those that depend on the run's length are told it."""
    return tuple(stage.build(steps) if hasattr(stage, "build") else stage for stage in exp.after)


def _rates(exp: Experiment, steps: int) -> np.ndarray | None:
    """Computed once: a schedule called while training would wait behind the steps on the device."""
    lr = getattr(exp.optimizer, "lr", None)
    if not isinstance(lr, float | int | Schedule):
        return None
    rate = optim_rate(lr, steps)
    if not callable(rate):
        return np.full(steps, rate)
    return np.asarray(jax.jit(jax.vmap(rate))(np.arange(steps)))


def _eval_function(
    exp: Experiment,
    model: Model,
    loader: Loader,
    mesh: Mesh,
    like: State,
    metrics_fn: Callable[[Any, Batch], Metrics] | None,
) -> Callable[[State, Any], Metrics]:
    prepare = compose(lambda batch, _: loader.fetch(batch), *exp.preprocess)
    whole = sharding.replicated(mesh)
    step = sharding.compile(
        make_eval_step(model, exp.loss, prepare, metrics_fn),
        args=(whole, loader.shardings),
        out=whole,
    )
    metrics = preflight.trace(step, like, loader.batch(0), what="the evaluation")
    if exp.select.removeprefix("-") not in metrics and (exp.valid is not None or exp.holdout):
        raise InputError(f"select={exp.select} is no metric of this loss: it gives {', '.join(metrics)}")
    return step
