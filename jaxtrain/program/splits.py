"""The examples of an experiment, opened: which sources, where they are kept, and how batches are made."""

from __future__ import annotations

import sys

import numpy as np
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Batch
from jaxtrain.data import Arrays, Order, Sequential, Source, Subset, holdout, in_memory
from jaxtrain.experiment import Experiment
from jaxtrain.program.loader import Check, Loader, Resident, Streamed
from jaxtrain.sharding import multihost

RESIDENT_PART = 10  # a set of at most this part of a device's memory is kept on it


def open_sources(exp: Experiment, mesh: Mesh) -> dict[str, Source]:
    """``train``, ``test`` and perhaps ``valid``; what is small enough comes back as Arrays."""
    limit = {
        "auto": multihost.broadcast_from_0(sharding.device_memory(mesh), "memory") // RESIDENT_PART,
        "device": sys.maxsize,
        "stream": 0,
    }[exp.placement]

    def opened(name: str, source: Source) -> Source:
        if len(source) < 1:
            raise InputError(f"{name}: the data set {type(source).__name__} is empty")
        try:
            _check_rows(name, source)
            return in_memory(source, limit) or source
        except (InputError, RunError):
            raise
        except Exception as error:  # a user's own source: anything may come out of it
            raise RunError(
                f"{name}: {type(source).__name__}.gather failed: {type(error).__name__}: {first_line(error)} "
                "(--debug shows where)"
            ) from error

    train, valid = opened("train", exp.train), exp.valid
    if exp.holdout:
        kept, held = holdout(len(train), exp.holdout)
        train, valid = opened("train", Subset(train, kept)), Subset(train, held)
    splits = {"train": train, "test": opened("test", exp.test)}
    return splits if valid is None else {**splits, "valid": opened("valid", valid)}


def make_loader(
    source: Source,
    order: Order | Sequential,
    exp: Experiment,
    mesh: Mesh,
    check: Check,
    first: Check | None = None,
) -> Loader:
    """Batches of ``source`` in that order: resident where it is in memory, else streamed.

    Raises:
      InputError: it is to be resident and larger than a device's memory.
    """
    if isinstance(source, Arrays) and exp.placement != "stream":
        size, limit = sum(array.nbytes for array in source.fields.values()), sharding.device_memory(mesh)
        if size > limit:
            raise InputError(
                f"placement={exp.placement} would keep {size / 1e9:.2f} GB of examples on each device, which "
                f"has {limit / 1e9:.2f} GB: use --set placement=stream"
            )
        return Resident(source, order, mesh)
    return Streamed(source, order, mesh, exp.workers, check, first)


def _check_rows(split: str, source: Source) -> None:
    """Raise InputError unless ``gather`` gives a leading axis: an unbatched image would pass for a batch."""
    for name, array in source.gather(np.zeros(2, np.int64)).items():
        if np.shape(array)[:1] != (2,):
            raise InputError(
                f"{split}: field {name!r} has shape {list(np.shape(array))} for 2 examples: "
                f"{type(source).__name__}.gather must give arrays with a leading axis of that length, as "
                "np.stack makes of single ones"
            )


def first_examples(exp: Experiment, source: Source) -> Batch:
    """What initialisation sees: parameters need one example's shapes; ``data_init`` asks for more."""
    examples = 1 if exp.data_init is None else getattr(exp.data_init, "examples", exp.batch)
    return source.gather(np.arange(min(examples, len(source))))
