"""Checks of fields, shapes and types: of a split against the others, and of an example against the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Batch, State
from jaxtrain.data import Arrays, Source, compose
from jaxtrain.experiment import Experiment
from jaxtrain.models import as_model
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID


def check_splits(experiment: Experiment) -> None:
    """Raise InputError where splits that a source cuts itself are not cut from the same data.

    A source class names in ``shared`` the settings that its splits must have in common: with another file,
    part or number of rows, training examples would be test examples, or words have other numbers.
    """
    train = experiment.train
    for name, other in (("valid", experiment.valid), ("test", experiment.test)):
        if type(other) is not type(train):
            continue
        for field in getattr(train, "shared", ()):
            ours, theirs = getattr(train, field), getattr(other, field)
            if ours != theirs:
                raise InputError(
                    f"{name}.{field} is {theirs!r} and train.{field} is {ours!r}: both must be the same, "
                    f"because {type(train).__name__} cuts its splits from one set of data"
                )


def check_fields(sources: Mapping[str, Source]) -> None:
    """Raise InputError when a split's fields, shapes or types are no batch's, or not those of ``"train"``."""
    want = _specs("train", sources["train"])
    for field in ("mask", EXAMPLE_ID, EPOCH):
        if field in want:
            raise InputError(
                f"the source gives a field {field!r}, a name that batches use themselves: rename it"
            )
    for name, source in sources.items():
        have = _specs(name, source)
        for field in sorted(want.keys() | have.keys()):
            if want.get(field) != have.get(field):
                raise InputError(
                    f"field {field!r} is {want.get(field, 'absent')} in train and "
                    f"{have.get(field, 'absent')} in {name}: both must give the same examples"
                )


def trace(fn: Callable[..., Any], *args: Any, what: str) -> Any:
    """``jax.eval_shape(fn, *args)``: shapes without computing anything.

    A function made by ``jax.jit`` finds this trace when it is called.

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


def mesh_notes(experiment: Experiment, mesh: Mesh, state: State, whole: Sequence[str]) -> tuple[str, ...]:
    """What changes with the mesh or is not as one may think, a line each.

    Args:
      experiment: what is to be run.
      mesh: the devices.
      state: its shapes.
      whole: paths of arrays that ``fsdp`` could not divide.
    """
    lines = []
    if experiment.accumulate > 1 and "batch_stats" in state.extra:
        lines.append(
            f"BatchNorm statistics are those of a microbatch of {experiment.batch // experiment.accumulate} "
            f"examples (accumulate={experiment.accumulate}), not of the whole batch"
        )
    if whole:
        more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
        lines.append(
            f"fsdp={mesh.shape['fsdp']} divides no dimension of {', '.join(whole[:3])}{more}: "
            "each device holds all of it"
        )
    return tuple(lines)


def _specs(split: str, source: Source) -> dict[str, str]:
    two = source.gather(np.zeros(2, np.int64))
    for name, array in two.items():
        _check_kind(f"{split}: field {name!r}", source.fields[name] if isinstance(source, Arrays) else array)
    return {name: f"{array.dtype}{list(array.shape[1:])}" for name, array in two.items()}


def _check_kind(what: str, array: np.ndarray) -> None:
    """Raise InputError for what a device cannot hold: text, objects, and whole numbers that would wrap."""
    kind = jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool
    if not kind:
        raise InputError(
            f"{what} is {array.dtype}, which is no number: leave it out of what the source gives, or give "
            "numbers for it"
        )
    held = jax.dtypes.canonicalize_dtype(array.dtype)  # 64 bits become 32, and JAX does not say so
    if held != array.dtype and np.issubdtype(held, np.integer) and array.size:
        low, high = int(array.min()), int(array.max())
        if low < np.iinfo(held).min or high > np.iinfo(held).max:
            raise InputError(
                f"{what} holds {low if low < np.iinfo(held).min else high}, and JAX keeps {array.dtype} as "
                f"{held}: give smaller numbers, or leave the field out"
            )


def describe_experiment(experiment: Experiment) -> tuple[str, str, str]:
    """Data set, model and number of parameters, without reading data or starting a backend."""
    source, model = experiment.train, experiment.model
    data = getattr(source, "name", type(source).__name__.lower())
    example = getattr(source, "example", None)
    shapes = example() if example else source.gather(np.zeros(1, np.int64))
    if shapes is None:  # a data set whose shapes are known once it is prepared
        return data, type(model).__name__, "–"
    batch = {k: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype) for k, v in shapes.items()}

    def params(seed: jax.Array, batch: Batch) -> Any:
        batch = compose(*experiment.preprocess)(batch, None)
        return as_model(model).init(jax.random.key(seed), batch)[0]

    tree = trace(params, jax.ShapeDtypeStruct((), np.int32), batch, what="the model")
    return data, type(model).__name__, f"{sum(leaf.size for leaf in jax.tree.leaves(tree)):,}"
