"""Assemble an experiment on a mesh: open and check its data, build and trace its jitted steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.checkpoint.paths import check_paths
from jaxtrain.compress import Distil, with_teacher
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Metrics, Model, Names, State
from jaxtrain.data import Order, Sequential, Source, compose
from jaxtrain.experiment import Experiment
from jaxtrain.models.attention_choices import AttentionChoice, record_attention
from jaxtrain.program import check_contract, check_fields, check_values, splits, update
from jaxtrain.program.cadence import Cadence
from jaxtrain.program.check_values import ValueCheck
from jaxtrain.program.compute_model import compute_model
from jaxtrain.program.loader import EXAMPLE_ID, Check, Loader, Resident
from jaxtrain.program.program import Program, Split
from jaxtrain.program.teacher import Teacher, open_teacher
from jaxtrain.sharding import described
from jaxtrain.sharding.cards import Card
from jaxtrain.step import make_eval_step, make_init, scan_steps
from jaxtrain.step.contract import check_names, check_pair
from jaxtrain.step.packing import PackedMetrics, pack_metrics

_PackedStep = Callable[..., tuple[State, PackedMetrics]]


def assemble(
    experiment: Experiment,
    mesh: Mesh,
    metrics_fn: Callable[[Any, Batch], Metrics] | None = None,
    inspect: splits.Inspect | None = None,
) -> Program:
    """Open and check the data of ``experiment``, and build and trace its jitted steps.

    Small data sets are copied to the devices. Each step is compiled at its first call. Call
    ``Program.close()`` when done: loaders may have started threads or processes.

    Args:
      experiment: what to run.
      mesh: the devices. For described ones (``sharding.described``) the steps can be compiled and nothing can
        run: the key and the batches are shapes.
      metrics_fn: ``(outputs, batch) -> metrics`` to report in evaluations, in addition to the loss's own.
      inspect: called with the opened sources by the name of their split, before anything is made of them; it
        may raise an error to refuse them.

    Raises:
      InputError: the data, the model, the loss and the mesh do not fit together.
    """
    exp = without_teacher(experiment)  # only the train step has a teacher
    model = compute_model(exp, mesh)
    eval_batch = exp.eval_batch or exp.batch
    check_fields.check_splits(exp)
    sharding.check_batch(exp.batch, mesh, accumulate=exp.accumulate)
    sharding.check_batch(eval_batch, mesh, "eval_batch" if exp.eval_batch else "batch")
    sources, replicated = splits.open_sources(exp, mesh, inspect), sharding.replicated(mesh)
    check_fields.check_fields(sources)
    outputs, raw, prepared = _abstract_outputs(exp, model, sources["train"])
    teacher = open_teacher(experiment, mesh, raw, prepared, outputs)
    checks = check_values.value_checks(exp, model, outputs, sources)
    data_notes = check_values.check_values(checks, exp, sources)

    order = Order(exp.seed, len(sources["train"]), exp.batch, exp.drop_remainder)
    steps = order.steps(exp.epochs)
    train = _loader("train", sources["train"], order, exp, mesh, checks["train"])
    make_keys = _compile_keys(mesh)
    init_key, key = make_keys(exp.seed)
    tx, post_update = update.build_optimizer(exp, steps), update.build_post_update(exp, steps)
    examples = splits.first_examples(exp, sources["train"])
    init_fn = make_init(
        model, tx, compose(*exp.preprocess), exp.data_init, post_update, **update.loss_scaling(exp)
    )
    abstract, not_sharded = _abstract_state(init_fn, examples, mesh, exp, model)
    init_state = sharding.compile(init_fn, args=(replicated, replicated), out=_shardings(abstract))
    traced, model = model, compute_model(exp, mesh, abstract)  # the shardings are known now
    if teacher is not None:
        abstract, model = teacher.add_to(abstract), with_teacher(model, teacher.model)
    augment = (lambda batch, _: train.fetch(batch), *exp.augment)
    prepare = (
        compose(*augment, *exp.preprocess) if teacher is None else teacher.prepare(augment, exp.preprocess)
    )
    loss_metric = check_contract.find_loss_metric(exp, model, sources["train"])
    step = update.build_train_step(
        experiment, mesh, model, tx, prepare, post_update, loss_metric, _shardings(abstract.params)
    )

    def init_with(key: jax.Array) -> State:
        return _with_teacher(init_state(key, examples), teacher)

    pure_step = pack_metrics(step)
    train_step, train_steps, attention = _compile_train_steps(
        pure_step, train, mesh, abstract, key, update.compiler_options(exp, mesh, abstract)
    )
    report = check_fields.find_report(exp)
    if report is not None:  # an error now, after those of the loss, is better than one after the training
        check_fields.check_report(report, outputs, prepared)
    evals = {}
    for name in [name for name in sources if name != "train"]:
        rows = Sequential(len(sources[name]), eval_batch)
        loader = _loader(name, sources[name], rows, exp, mesh, checks[name])
        eval_step = _compile_eval_step(exp, model, loader, mesh, abstract, metrics_fn)
        evals[name] = Split(loader, batches=len(rows), examples=rows.n, step=eval_step)
    loaders = {"train": train, **{name: split.loader for name, split in evals.items()}}
    resident = {name: isinstance(loader, Resident) for name, loader in loaders.items()}
    steps_per_epoch = order.n // order.batch if exp.drop_remainder else order.n / order.batch
    program = Program(
        experiment=experiment,
        cadence=Cadence.of(exp, steps, steps_per_epoch, validates="valid" in evals),
        key=key,
        init=functools.partial(init_with, init_key),
        init_with=init_with,
        make_keys=make_keys,
        abstract_state=abstract,
        train_step=train_step,
        train_steps=train_steps,
        pure_step=pure_step,
        train=train,
        order=order,
        evals=evals,
        choices={"steps": steps, "resident": resident},
        notes=(
            *data_notes,
            *check_contract.sown_notes(traced),
            *check_values.series_notes(exp.train),
            *check_values.image_notes(exp, sources["train"]),
            *check_fields.mesh_notes(exp, mesh, abstract, not_sharded),
        ),
        learning_rates=update.learning_rates(exp, steps),
        abstract_outputs=outputs,
        attention=attention,
        teacher=teacher,
    )
    card = described.card_of(mesh)
    return program if card is None else _compile_only(program, card)


def _compile_only(program: Program, card: Card) -> Program:
    """Return ``program`` with functions that refuse to run: its devices are described."""

    def refuse(fn: Callable[..., Any]) -> Callable[..., Any]:
        return described.compile_only(fn, card)

    splits = {name: dataclasses.replace(one, step=refuse(one.step)) for name, one in program.evals.items()}
    return dataclasses.replace(
        program,
        init=refuse(program.init),
        train_step=refuse(program.train_step),
        train_steps=refuse(program.train_steps),
        evals=splits,
    )


def without_teacher(experiment: Experiment) -> Experiment:
    """Return ``experiment`` with the labels' loss alone, to evaluate what it has trained."""
    if not isinstance(experiment.loss, Distil):
        return experiment
    return dataclasses.replace(experiment, loss=experiment.loss.loss)


def _with_teacher(state: State, teacher: Teacher | None) -> State:
    return state if teacher is None else teacher.add_to(state, teacher.load())


def abstract_state(experiment: Experiment, mesh: Mesh, example: Batch) -> State:
    """Return shapes, dtypes and shardings of ``experiment``'s state, to restore it without its data.

    Args:
      experiment: what the state is of.
      mesh: the devices to restore to.
      example: arrays of one raw example's shapes, with a leading axis.
    """
    exp, steps = experiment, 1000  # any number: no shape depends on it
    model, prepare = compute_model(exp, mesh), compose(*exp.preprocess)
    init_fn = make_init(
        model,
        update.build_optimizer(exp, steps),
        prepare,
        None,
        update.build_post_update(exp, steps),
        **update.loss_scaling(exp),
    )
    example = {EXAMPLE_ID: np.zeros(len(next(iter(example.values()))), np.int32), **example}
    return _abstract_state(init_fn, example, mesh, exp, model)[0]


def _loader(
    name: str, source: Source, order: Order | Sequential, exp: Experiment, mesh: Mesh, check: ValueCheck
) -> Loader:
    every: Check = check.unchanged if name == "train" else check  # no guard covers an evaluation
    first, every = (
        check_values.with_split_name(name, one, check_values.source_indices(exp, name))
        for one in (check_values.check_first(exp, check), every)
    )
    return splits.make_loader(source, order, exp, mesh, every, first)


def _abstract_outputs(exp: Experiment, model: Model, source: Source) -> tuple[Any, Batch, Batch]:
    """Return the shapes of the model's outputs, of the raw batch of ``source`` and of the prepared batch."""
    one = {**source.gather(np.zeros(1, np.int64)), EXAMPLE_ID: np.zeros(1, np.int32)}
    batch = {k: jax.ShapeDtypeStruct((exp.batch, *v.shape[1:]), v.dtype) for k, v in one.items()}

    def forward(key: jax.Array, batch: Batch) -> Any:
        batch = compose(*exp.preprocess)(batch, None)
        params, extra = check_pair(model.init(key, batch), "init", "(params, extra)")
        check_names(extra)
        result = model.apply(params, extra, batch, train=False, key=None)
        outputs, _ = check_pair(result, "apply", "(outputs, extra)")
        return outputs, batch

    outputs, prepared = check_fields.trace(forward, jax.random.key(0), batch, what="the model")
    if not jax.tree.leaves(outputs):
        raise InputError("the model returns nothing (None, or no array): return its outputs for the loss")
    return outputs, batch, prepared


@functools.cache
def _compile_keys(mesh: Mesh) -> Callable[[int], tuple[Any, Any]]:
    """Return ``seed -> (init key, step key)``, replicated; for described devices they are shapes.

    It is compiled, because no process can place an array on the devices of another.
    """
    where = sharding.replicated(mesh)
    if described.card_of(mesh) is not None:
        return lambda seed: (described.abstract_key(where),) * 2
    split = sharding.compile(
        lambda seed: tuple(jax.random.split(jax.random.key(seed))), args=(where,), out=where
    )

    def keys(seed: int) -> tuple[Any, Any]:
        init_key, step_key = split(np.int32(seed))
        return init_key, step_key

    return keys


def _abstract_state(
    init_fn: Callable[[jax.Array, Batch], State], examples: Batch, mesh: Mesh, exp: Experiment, model: Model
) -> tuple[State, tuple[str, ...]]:
    """Return the abstract state with its shardings, and the paths that ``fsdp`` could not divide."""
    shapes = check_fields.trace(init_fn, jax.random.key(0), examples, what="the state")
    check_paths(shapes)
    names: Mapping[str, Names] | None = None
    if mesh.size > 1:
        prepared = jax.eval_shape(lambda batch: compose(*exp.preprocess)(batch, None), examples)
        names = model.axes(prepared) if model.axes is not None else {}
    placement = sharding.place(shapes, mesh, names, exp.rules)

    def with_sharding(x: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(with_sharding, shapes, placement.shardings), placement.unsplit


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


def _compile_train_steps(
    step: _PackedStep,
    train: Loader,
    mesh: Mesh,
    abstract: State,
    key: jax.Array,
    options: dict[str, str],
) -> tuple[_PackedStep, _PackedStep, tuple[AttentionChoice, ...]]:
    """Compile ``step`` for one update and, scanned, for several; both donate the state.

    Also returns the kernels that its attention layers chose while it was traced.
    """
    replicated, state = sharding.replicated(mesh), _shardings(abstract)
    batches, shared = train.stacked_shardings
    one, several = (
        sharding.compile(fn, args=(state, *args), out=(state, replicated), donate=(0,), options=options)
        for fn, args in (
            (step, (train.shardings, replicated)),
            (scan_steps(step), (batches, replicated, shared)),
        )
    )
    with record_attention() as choices:
        check_fields.trace(one, abstract, train.batch(0), key, what="the train step")
    return one, several, tuple(choices)


def _compile_eval_step(
    exp: Experiment,
    model: Model,
    loader: Loader,
    mesh: Mesh,
    abstract: State,
    metrics_fn: Callable[[Any, Batch], Metrics] | None,
) -> Callable[[State, Any], PackedMetrics]:
    """Compile the eval step of a split; its metrics must include the one that ``exp.select`` names."""
    prepare = compose(lambda batch, _: loader.fetch(batch), *exp.preprocess)
    unpacked = make_eval_step(model, exp.loss, prepare, metrics_fn)

    def eval_step(state: State, batch: Any) -> PackedMetrics:
        return PackedMetrics.of(unpacked(state, batch))

    step = sharding.compile(
        eval_step,
        args=(_shardings(abstract), loader.shardings),
        out=sharding.replicated(mesh),
    )
    metrics = check_fields.trace(step, abstract, loader.batch(0), what="the evaluation")
    if exp.valid is not None or exp.holdout:
        check_fields.check_select(exp.select, metrics)
    return step
