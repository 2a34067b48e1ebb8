"""Open the data of an experiment: its sources, in memory or streamed, and the loaders of their batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import numpy as np
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line, size_text
from jaxtrain.core.types import Batch
from jaxtrain.data import Arrays, Order, Sequential, Source, Subset, holdout, in_memory, paths
from jaxtrain.data.checked import CheckedSource
from jaxtrain.experiment import Experiment
from jaxtrain.program.loader import EXAMPLE_ID, Check, Loader, Resident, Streamed
from jaxtrain.sharding import multihost

RESIDENT_PART = 10  # a data set of at most this part of a device's memory is resident


Inspect = Callable[[Mapping[str, Source]], None]


def open_sources(exp: Experiment, mesh: Mesh, inspect: Inspect | None = None) -> dict[str, Source]:
    """Open ``train``, ``test`` and, where there is one, ``valid``; small sources are returned as Arrays.

    Args:
      exp: the experiment.
      mesh: the devices.
      inspect: called with the opened sources, before anything is held out of ``train``.
    """
    paths.forget()
    limit = {
        "auto": multihost.broadcast_from_0(sharding.device_memory(mesh), "memory") // RESIDENT_PART,
        "device": sys.maxsize,
        "stream": 0,
    }[exp.placement]

    def load(name: str, source: Source) -> Source:
        checked = CheckedSource(name, source)
        if len(checked) < 1:
            raise InputError(f"{name}: the data set {checked.class_name} is empty")
        if isinstance(source, Arrays):
            return source
        try:
            checked.gather(np.zeros(2, np.int64))
            return in_memory(checked, limit) or checked
        except (InputError, RunError):
            raise
        except Exception as error:  # a user's own source: anything may come out of it
            raise RunError(
                f"{name}: {checked.class_name}.gather failed: {type(error).__name__}: {first_line(error)}"
                f"{_length(error, checked)} (--debug shows where)"
            ) from error

    sources = {"train": load("train", exp.train), "test": load("test", exp.test)}
    if exp.valid is not None:
        sources["valid"] = load("valid", exp.valid)
    if inspect is not None:
        inspect(sources)
    if exp.holdout:
        train = sources["train"]
        train_ids, valid_ids = holdout(len(train), exp.holdout)
        sources["train"] = load("train", Subset(train, train_ids))
        sources["valid"] = load("valid", Subset(train, valid_ids))
    return sources


def make_loader(
    source: Source,
    order: Order | Sequential,
    exp: Experiment,
    mesh: Mesh,
    check: Check,
    first: Check | None = None,
) -> Loader:
    """Make the loader of ``source``: resident where it is in memory, else streamed.

    Args:
      source: from ``open_sources``.
      order: which examples make up batch k.
      exp: its ``placement`` and ``workers``.
      mesh: the devices.
      check: checks every raw batch of a stream (``Streamed``).
      first: checks the first batch of a stream.

    Raises:
      InputError: the source must be resident and is larger than a device's memory.
    """
    if isinstance(source, Arrays) and exp.placement != "stream":
        size, limit = sum(array.nbytes for array in source.fields.values()), sharding.device_memory(mesh)
        if size > limit:
            raise InputError(
                f"placement={exp.placement} would put {size_text(size)} of examples on each device, which "
                f"has {size_text(limit)}: use --set placement=stream"
            )
        return Resident(source, order, mesh)
    return Streamed(source, order, mesh, exp.workers, check, first)


def _length(error: Exception, source: Source) -> str:
    return f"; its __len__ says that it has {len(source)} examples" if isinstance(error, IndexError) else ""


def first_examples(exp: Experiment, source: Source) -> Batch:
    """The raw examples that ``init`` gets: one for its shapes, or as many as ``data_init`` asks for."""
    examples = 1 if exp.data_init is None else getattr(exp.data_init, "examples", exp.batch)
    ids = np.arange(min(examples, len(source)))
    return {**source.gather(ids), EXAMPLE_ID: ids.astype(np.int32)}
