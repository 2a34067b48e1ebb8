"""Checks of fields, shapes and dtypes: that the splits agree, and that the model accepts an example."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain.core.chunked_logits import full_logits
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Batch, State
from jaxtrain.data import Arrays, Source, compose
from jaxtrain.data.checked import check_dtype, to_arrays
from jaxtrain.experiment import Experiment
from jaxtrain.metrics.figures import GroupedReport
from jaxtrain.models import as_model
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID
from jaxtrain.step.packing import PackedMetrics


def check_splits(experiment: Experiment) -> None:
    """Raise InputError where splits that a source makes itself do not come from the same data.

    A source class lists in ``shared`` the settings that its splits must have in common: with another file,
    fraction or number of rows, training examples would be test examples, or words would have other ids.
    """
    train = experiment.train
    for name, other in (("valid", experiment.valid), ("test", experiment.test)):
        if type(other) is not type(train):
            continue
        for field in getattr(train, "shared", ()):
            expected, actual = getattr(train, field), getattr(other, field)
            if actual != expected:
                raise InputError(
                    f"{name}.{field} is {actual!r} and train.{field} is {expected!r}: both must be the same, "
                    f"because {type(train).__name__} makes its splits from one set of data"
                )


def check_fields(sources: Mapping[str, Source]) -> None:
    """Raise InputError for reserved names, unsupported dtypes and splits that differ from ``"train"``."""
    expected = _specs("train", sources["train"])
    for field in ("mask", EXAMPLE_ID, EPOCH):
        if field in expected:
            raise InputError(f"the source has a field {field!r}, a name reserved for batches: rename it")
    for name, source in sources.items():
        actual = _specs(name, source)
        for field in sorted(expected.keys() | actual.keys()):
            if expected.get(field) != actual.get(field):
                raise InputError(
                    f"field {field!r} is {expected.get(field, 'absent')} in train and "
                    f"{actual.get(field, 'absent')} in {name}: both need the same fields, shapes and dtypes"
                )


def trace(fn: Callable[..., Any], *args: Any, what: str) -> Any:
    """Return ``jax.eval_shape(fn, *args)``, with user errors as InputError; nothing is computed.

    A function made by ``jax.jit`` reuses this trace when it is called.

    Raises:
      InputError: the model, the loss or a stage cannot take these shapes.
    """
    try:
        return fn.trace(*args).out_info if hasattr(fn, "trace") else jax.eval_shape(fn, *args)
    except InputError:
        raise
    except Exception as error:  # user code: anything may come out of it
        raise InputError(
            f"{what} cannot be built: {type(error).__name__}: {first_line(error)[:300]} (--debug shows where)"
        ) from error


def find_report(experiment: Experiment) -> Callable[..., Any] | None:
    """Return the report of an evaluation: the experiment's, or the one that its loss names; None without one.

    A method or a class of the loss that is called ``report`` is something else.
    """
    if experiment.report is not None:
        return experiment.report
    report = getattr(experiment.loss, "report", None)
    return report if callable(report) and not isinstance(report, MethodType | type) else None


def check_report(report: Callable[..., Any], outputs: Any, batch: Batch) -> None:
    """Raise InputError unless ``report`` takes these outputs and this batch, given as shapes."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    added = {"mask": jax.ShapeDtypeStruct((rows,), bool), EXAMPLE_ID: jax.ShapeDtypeStruct((rows,), np.int32)}
    grouped = GroupedReport(report)

    def metrics(outputs: Any, batch: Batch) -> Any:
        return grouped(outputs if grouped.chunked else full_logits(outputs), batch)

    trace(metrics, outputs, {**batch, **added}, what="the report")


def check_select(select: str, metrics: PackedMetrics) -> None:
    """Raise InputError unless ``select`` names a metric of the evaluation that is a number.

    Args:
      select: ``Experiment.select``.
      metrics: the shapes of what the evaluation reports.
    """
    name, names = select.removeprefix("-"), list(metrics)
    if name not in names:
        raise InputError(f"select={select} is not a metric of this loss, which reports {', '.join(names)}")
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), metrics)
    value: Any = 0.0
    with contextlib.suppress(Exception):  # of a metric that cannot compute zeros
        value = zeros[name].compute()
    if not isinstance(value, int | float) and np.ndim(value) + isinstance(value, Mapping):
        others = ", ".join(other for other in names if other != name)
        raise InputError(f"select={select} is a table, not a number: select one of {others}")


def mesh_notes(
    experiment: Experiment, mesh: Mesh, state: State, not_sharded: Sequence[str]
) -> tuple[str, ...]:
    """Warnings about microbatches and the mesh, one per line.

    Args:
      experiment: the run's.
      mesh: the devices.
      state: its shapes.
      not_sharded: paths of arrays that ``fsdp`` could not divide.
    """
    lines = []
    if experiment.accumulate > 1 and "batch_stats" in state.extra:
        rows = experiment.batch // experiment.accumulate
        lines.append(
            f"BatchNorm statistics are over one microbatch, at most {rows} examples "
            f"(accumulate={experiment.accumulate}), not over the full batch"
        )
    if not_sharded:
        more = f" and {len(not_sharded) - 3} more" if len(not_sharded) > 3 else ""
        lines.append(
            f"fsdp={mesh.shape['fsdp']} divides no dimension of {', '.join(not_sharded[:3])}{more}: "
            "replicated on every device"
        )
    return tuple(lines)


def _specs(split: str, source: Source) -> dict[str, str]:
    """Dtype on a device and shape of an example's fields, such as ``uint8[28, 28, 1]``."""
    two = source.gather(np.zeros(2, np.int64))
    for name, array in two.items():
        check_dtype(f"{split}: field {name!r}", source.fields[name] if isinstance(source, Arrays) else array)
    dtypes = {name: jax.dtypes.canonicalize_dtype(array.dtype) for name, array in two.items()}
    return {name: f"{dtypes[name]}{list(array.shape[1:])}" for name, array in two.items()}


def describe_experiment(experiment: Experiment) -> tuple[str, str, str]:
    """Return data set, model and number of parameters, without reading data or starting a backend."""
    source, model = experiment.train, experiment.model
    data = getattr(source, "name", type(source).__name__.lower())
    example = getattr(source, "example", None)
    shapes = example() if example else to_arrays("train: ", source.gather(np.zeros(1, np.int64)))
    if shapes is None:  # its shapes are unknown until the data set is prepared
        return data, type(model).__name__, "–"
    batch = {k: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype) for k, v in shapes.items()}
    batch[EXAMPLE_ID] = jax.ShapeDtypeStruct((1,), np.int32)

    def params(seed: jax.Array, batch: Batch) -> Any:
        batch = compose(*experiment.preprocess)(batch, None)
        return as_model(model).init(jax.random.key(seed), batch)[0]

    tree = trace(params, jax.ShapeDtypeStruct((), np.int32), batch, what="the model")
    return data, type(model).__name__, f"{sum(leaf.size for leaf in jax.tree.leaves(tree)):,}"
