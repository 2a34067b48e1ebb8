"""An experiment made ready to run on a mesh: data opened, shapes checked, functions compiled on first use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Metrics, Model, Names, State
from jaxtrain.data import Order, Sequential, Source, compose, holdout
from jaxtrain.experiment import Experiment
from jaxtrain.models import as_model, compute_in
from jaxtrain.program import check_fields, check_values, splits, update
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID, Check, Loader, Resident
from jaxtrain.step import make_eval_step, make_init, scan_steps
from jaxtrain.step.packing import PackedMetrics, pack_metrics


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples to evaluate on: ``batches`` padded batches that hold each of ``examples`` once."""

    loader: Loader
    batches: int
    examples: int
    step: Callable[[State, Any], PackedMetrics]


@dataclasses.dataclass(frozen=True)
class Program:
    """What the loop needs.

    Attributes:
      experiment: what it was made from.
      steps: updates of the whole run.
      key: the run's random key; steps fold their number into it.
      init: makes the state of step 0, sharded.
      abstract_state: that state's shapes, dtypes and shardings.
      train_step: compiled ``(state, batch, key) -> (state, metrics)``; the state is donated.
      train_steps: compiled ``(state, batches, key, shared) -> (state, metrics)`` for several updates at once
        (``step.scan_steps``); the state is donated.
      train: training batches.
      order: which examples they are of.
      evals: ``"valid"`` (where there is one) and ``"test"``.
      choices: what was decided by measurement or size, for the run's record.
      notes: what whoever starts the run should know, a line each.
      epoch: batches in one pass over the training examples.
      rates: the learning rate of every update, float [steps]; None when the optimizer has none to tell.
      outputs: the shapes that the model gives for a training batch.
      steps_per_execution: updates in one compiled call, where ``dispatched`` allows it.
    """

    experiment: Experiment
    steps: int
    key: jax.Array
    init: Callable[[], State]
    abstract_state: State
    train_step: Callable[[State, Any, jax.Array], tuple[State, PackedMetrics]]
    train_steps: Callable[[State, Any, jax.Array, Any], tuple[State, PackedMetrics]]
    train: Loader
    order: Order
    evals: dict[str, Split]
    choices: dict[str, Any]
    notes: tuple[str, ...]
    epoch: float
    rates: np.ndarray | None
    outputs: Any
    steps_per_execution: int = 1

    def evaluates(self, step: int) -> bool:
        """Is there an evaluation after update ``step``? The final one on the test set is not counted."""
        if step == self.steps:
            return "valid" in self.evals
        every = self.experiment.eval_every
        return every is not None and _completes(step, step, self._period(every))

    def saves(self, step: int) -> bool:
        """Is there a checkpoint after update ``step``?"""
        return step == self.steps or _completes(step, step, self._period(self.experiment.save_every))

    def dispatched(self, step: int) -> int:
        """How many updates are dispatched at once after update ``step``: ``steps_per_execution`` or 1.

        No evaluation, no checkpoint and not the end of the run is among them, except after the last: so all
        of these are where they are without dispatches of several. A function of the step alone, so a run
        that is resumed has the same dispatches.
        """
        if self.steps_per_execution == 1:
            return 1
        first, last = step + 1, step + self.steps_per_execution - 1
        between = last >= self.steps or any(_completes(first, last, period) for period in self._periods())
        return 1 if between else self.steps_per_execution

    def uninterrupted(self) -> int:
        """How many updates there are, at least, from one evaluation or checkpoint to the next."""
        return min(self.steps, *(int(period) for period in self._periods()))

    def examples(self, step: int) -> np.ndarray:
        """Places in ``experiment.train`` of the examples of update ``step``: int64 ``[batch]``."""
        ids = self.order.indices(step - 1)
        if self.experiment.holdout:  # training is on what was not held out
            ids = holdout(len(self.experiment.train), self.experiment.holdout)[0][ids]
        return ids

    def raw(self, step: int) -> dict[str, Any]:
        """The examples of update ``step`` as the source gives them, with what a loader adds to them."""
        (ids, epochs), source = self.order.ids_and_epochs(step - 1), self.experiment.train
        draw, where = getattr(source, "draw", None), self.examples(step)
        fields = source.gather(where) if draw is None else draw(where, epochs, self.order.seed)
        return {**fields, EXAMPLE_ID: ids.astype(np.int32), EPOCH: epochs.astype(np.int32)}

    def close(self) -> None:
        """Stop the threads and processes that read the data."""
        for loader in (self.train, *(split.loader for split in self.evals.values())):
            loader.close()

    def _periods(self) -> list[float]:
        """Of evaluations and of checkpoints."""
        exp = self.experiment
        return [self._period(every) for every in (exp.eval_every, exp.save_every) if every is not None]

    def _period(self, epochs: float) -> float:
        """Updates in so many epochs, at least 1; a multiple of it may end within a batch."""
        return max(1.0, epochs * self.epoch)

    def position(self, step: int) -> dict[str, float]:
        """Where update ``step`` stands: the epoch and the learning rate, for the records."""
        rate = {} if self.rates is None else {"learning_rate": float(self.rates[step - 1])}
        return {"epoch": step / self.epoch, **rate}

    def score(self, values: dict[str, Any]) -> float | None:
        """How good a validation result is, higher is better; None when it is not finite."""
        name = self.experiment.select
        score: float = -values[name[1:]] if name.startswith("-") else values[name]
        return score if math.isfinite(score) else None


def _completes(first: int, last: int, period: float) -> bool:
    """Does an update of ``first`` to ``last`` complete a multiple of ``period`` updates?"""
    return last // period > (first - 1) // period


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
    exp, model = experiment, _model(experiment)
    eval_batch = exp.eval_batch or exp.batch
    check_fields.check_splits(exp)
    sharding.check_batch(exp.batch, mesh, accumulate=exp.accumulate)
    sharding.check_batch(eval_batch, mesh, "eval_batch" if exp.eval_batch else "batch")
    sources, whole = splits.open_sources(exp, mesh), sharding.replicated(mesh)
    check_fields.check_fields(sources)
    outputs = _outputs(exp, model, sources["train"])
    check = check_values.value_check(model, exp.loss, outputs)
    found = check_values.check_values(check, exp, sources)

    order = Order(exp.seed, len(sources["train"]), exp.batch, exp.drop_remainder)
    steps = order.steps(exp.epochs)
    train = _loader("train", sources["train"], order, exp, mesh, check)
    init_key, key = _keys(exp.seed, mesh)
    tx, post_update = exp.optimizer.build(steps), update.build_post_update(exp, steps)
    sample = splits.first_examples(exp, sources["train"])
    start = make_init(
        model, tx, compose(*exp.preprocess), exp.data_init, post_update, **update.loss_scaling(exp)
    )
    abstract, unsplit = _abstract(start, sample, mesh, exp, model)
    init = sharding.compile(start, args=(whole, whole), out=_shardings(abstract))
    model = _model(exp, abstract)
    prepare = compose(lambda batch, _: train.fetch(batch), *exp.augment, *exp.preprocess)
    pure = update.build_train_step(exp, mesh, model, tx, prepare, post_update)
    train_step, train_steps = _train_functions(
        pure, train, mesh, abstract, key, update.compiler_options(exp, mesh)
    )
    evals = {}
    for name in [name for name in sources if name != "train"]:
        rows = Sequential(len(sources[name]), eval_batch)
        loader = _loader(name, sources[name], rows, exp, mesh, check)
        step = _eval_function(exp, model, loader, mesh, abstract, metrics_fn)
        evals[name] = Split(loader, len(rows), rows.n, step)
    loaders = {"train": train, **{name: split.loader for name, split in evals.items()}}
    resident = {name: isinstance(loader, Resident) for name, loader in loaders.items()}
    choices = {"steps": steps, "resident": resident}
    epoch = order.n // order.batch if exp.drop_remainder else order.n / order.batch
    return Program(
        experiment=exp,
        steps=steps,
        key=key,
        init=lambda: init(init_key, sample),
        abstract_state=abstract,
        train_step=train_step,
        train_steps=train_steps,
        train=train,
        order=order,
        evals=evals,
        choices=choices,
        notes=(
            *found,
            *check_values.image_notes(exp, sources["train"]),
            *check_fields.mesh_notes(exp, mesh, abstract, unsplit),
        ),
        epoch=epoch,
        rates=update.learning_rates(exp, steps),
        outputs=outputs,
        steps_per_execution=1 if exp.steps_per_execution == "auto" else exp.steps_per_execution,
    )


def abstract_state(experiment: Experiment, mesh: Mesh, example: Batch) -> State:
    """Shapes, dtypes and shardings of ``experiment``'s state, for restoring it where its data is not needed.

    Args:
      experiment: what the state is of.
      mesh: the devices to restore to.
      example: arrays of one raw example's shapes, with a leading axis.
    """
    exp, steps = experiment, 1000  # how many there are changes no shape
    model, prepare = _model(exp), compose(*exp.preprocess)
    start = make_init(
        model,
        exp.optimizer.build(steps),
        prepare,
        None,
        update.build_post_update(exp, steps),
        **update.loss_scaling(exp),
    )
    return _abstract(start, example, mesh, exp, model)[0]


def _loader(
    name: str, source: Source, order: Order | Sequential, exp: Experiment, mesh: Mesh, check: Check
) -> Loader:
    first = check_values.check_first(name, exp)
    return splits.make_loader(source, order, exp, mesh, check_values.with_split_name(name, check), first)


def _outputs(exp: Experiment, model: Model, source: Source) -> Any:
    """Shapes of the model's outputs for a batch of ``source``."""
    one = source.gather(np.zeros(1, np.int64))
    batch = {k: jax.ShapeDtypeStruct((exp.batch, *v.shape[1:]), v.dtype) for k, v in one.items()}

    def forward(key: jax.Array, batch: Batch) -> Any:
        batch = compose(*exp.preprocess)(batch, None)
        params, extra = model.init(key, batch)
        return model.apply(params, extra, batch, train=False, key=None)[0]

    return check_fields.trace(forward, jax.random.key(0), batch, what="the model")


def _model(exp: Experiment, abstract: State | None = None) -> Model:
    """The model as it is computed; with the state's shardings, as it is computed on their mesh."""
    model = as_model(exp.model, exp.remat)
    if abstract is not None:
        model = sharding.gather_params(model, _shardings(abstract.params), regather=exp.remat != "none")
    return compute_in(model, exp.precision)


def _keys(seed: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Of the initialisation and of the steps. Compiled: no process can place an array on others' devices."""
    split = sharding.compile(
        lambda: tuple(jax.random.split(jax.random.key(seed))), args=(), out=sharding.replicated(mesh)
    )
    first, second = split()
    return first, second


def _abstract(
    start: Callable[[jax.Array, Batch], State], sample: Batch, mesh: Mesh, exp: Experiment, model: Model
) -> tuple[State, tuple[str, ...]]:
    """The state of step 0 without its values, and the paths of what ``fsdp`` could not split."""
    shapes = check_fields.trace(start, jax.random.key(0), sample, what="the state")
    names: Mapping[str, Names] | None = None
    if mesh.size > 1:
        prepared = jax.eval_shape(lambda batch: compose(*exp.preprocess)(batch, None), sample)
        names = model.axes(prepared) if model.axes is not None else {}
    placement = sharding.place(shapes, mesh, names, exp.rules)

    def placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(placed, shapes, placement.shardings), placement.unsplit


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


def _train_functions(
    step: update.Update,
    train: Loader,
    mesh: Mesh,
    abstract: State,
    key: jax.Array,
    options: dict[str, str],
) -> tuple[Callable[..., tuple[State, PackedMetrics]], Callable[..., tuple[State, PackedMetrics]]]:
    """``step`` compiled, alone and scanned; the buffers of their first argument are reused for the result."""
    whole, state = sharding.replicated(mesh), _shardings(abstract)
    batches, shared = train.many
    one, several = (
        sharding.compile(fn, args=(state, *args), out=(state, whole), donate=(0,), options=options)
        for fn, args in (
            (pack_metrics(step), (train.shardings, whole)),
            (scan_steps(pack_metrics(step)), (batches, whole, shared)),
        )
    )
    check_fields.trace(one, abstract, train.batch(0), key, what="the train step")
    return one, several


def _eval_function(
    exp: Experiment,
    model: Model,
    loader: Loader,
    mesh: Mesh,
    abstract: State,
    metrics_fn: Callable[[Any, Batch], Metrics] | None,
) -> Callable[[State, Any], PackedMetrics]:
    prepare = compose(lambda batch, _: loader.fetch(batch), *exp.preprocess)
    evaluated = make_eval_step(model, exp.loss, prepare, metrics_fn)

    def eval_step(state: State, batch: Any) -> PackedMetrics:
        return PackedMetrics.of(evaluated(state, batch))

    step = sharding.compile(
        eval_step,
        args=(_shardings(abstract), loader.shardings),
        out=sharding.replicated(mesh),
    )
    metrics = check_fields.trace(step, abstract, loader.batch(0), what="the evaluation")
    if exp.select.removeprefix("-") not in metrics and (exp.valid is not None or exp.holdout):
        raise InputError(f"select={exp.select} is no metric of this loss: it gives {', '.join(metrics)}")
    return step
