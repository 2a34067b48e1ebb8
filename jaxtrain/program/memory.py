"""The arrays of a run on each device between two steps, known exactly from shapes and shardings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxtrain import sharding
from jaxtrain.core.types import leaf_paths
from jaxtrain.data import Source
from jaxtrain.data.checked import to_arrays
from jaxtrain.program import Program
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID, Resident
from jaxtrain.sharding import rules


@dataclasses.dataclass(frozen=True)
class DeviceArray:
    """An array of the run and its size on each device.

    Attributes:
      path: ``params/head/kernel``, ``opt_state/0/mu/head/kernel``, ``batch/rows``, ``data/train/image``.
      dtype: the name of its dtype.
      shape: its global shape.
      sharding: one word per dimension, up to the last one that is sharded (``rules.spec_text``); empty for a
        replicated array.
      bytes: its size on one device.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    sharding: str
    bytes: int

    @property
    def array(self) -> str:
        """Dtype and shape, such as ``float32[256,384]``."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def device_arrays(
    program: Program, resident: Mapping[str, bool] | None = None
) -> dict[str, list[DeviceArray]]:
    """List the arrays of a run by part: ``params``, ``optimizer``, ``other_state``, ``batch``, ``data``.

    ``other_state`` is the step, the statistics and the averages; ``data`` is the resident splits. Nothing is
    placed on a device.

    Args:
      program: the run.
      resident: which splits are resident, to plan for other devices; None takes those of ``program``.
    """
    state, batch = program.abstract_state, abstract_batch(program)
    parts = {
        "params": {"params": state.params},
        "optimizer": {"opt_state": state.opt_state},
        "other_state": {"step": state.step, "extra": state.extra},
        "batch": {"batch": {name: x for name, x in batch.items() if not _is_data(program, name)}},
        "data": {"data": _data(program, batch, resident)},
    }
    return {part: [_device_array(*item) for item in leaf_paths(tree).items()] for part, tree in parts.items()}


def bytes_per_device(x: Any) -> int:
    """Return the size on one device of an array, or of its shape, dtype and sharding.

    >>> from jax.sharding import PartitionSpec
    >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    >>> x = jax.ShapeDtypeStruct((6, 2), "float32", sharding=NamedSharding(mesh, PartitionSpec("data")))
    >>> bytes_per_device(x)
    48
    """
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def abstract_batch(program: Program) -> dict[str, Any]:
    """Return shapes, dtypes and shardings of the train step's ``batch`` argument; places nothing."""
    shapes = jax.eval_shape(lambda batch: batch, program.train.abstract_batch())
    where = jax.tree.broadcast(program.train.shardings, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def abstract_args(program: Program) -> tuple[Any, Any, jax.Array]:
    """Return arguments to compile ``program.train_step`` with, so that the loop's calls hit the cache.

    NumPy arrays, which are sent with the call, have no sharding: with one it would be another trace.
    """
    return program.abstract_state, program.train.abstract_batch(), program.key


def mesh_of(program: Program) -> Mesh:
    """Return the mesh that ``program`` was assembled on."""
    mesh: Mesh = program.abstract_state.step.sharding.mesh  # type: ignore[attr-defined]
    return mesh


def bytes_stored(source: Source, n: int) -> int:
    """Return the size of ``n`` examples of ``source`` on a device."""
    return n * sum(math.prod(x.shape) * x.dtype.itemsize for x in _example(source).values())


def abstract_examples(source: Source, n: int) -> dict[str, Any]:
    """Return shapes of a raw training batch of ``n`` examples of ``source``, with ids and epochs."""
    ids = {name: jax.ShapeDtypeStruct((1,), np.int32) for name in (EXAMPLE_ID, EPOCH)}
    return _rows({**_example(source), **ids}, n)


def _data(program: Program, batch: dict[str, Any], resident: Mapping[str, bool] | None) -> dict[str, Any]:
    """Return the arrays of each resident split."""
    arrays = {}
    loaders = {"train": program.train, **{name: split.loader for name, split in program.evals.items()}}
    for name, loader in loaders.items():
        if not (isinstance(loader, Resident) if resident is None else resident[name]):
            continue
        if name == "train":
            arrays[name] = batch["data"]
        else:
            source = getattr(program.experiment, name) or program.experiment.train  # by holdout
            arrays[name] = {
                field: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh_of(program)))
                for field, x in _rows(_example(source), program.evals[name].examples).items()
            }
    return arrays


def _is_data(program: Program, name: str) -> bool:
    return isinstance(program.train, Resident) and name == "data"


def _example(source: Source) -> dict[str, Any]:
    """Return shapes and dtypes of one example on a device."""
    example: dict[str, Any] = jax.eval_shape(
        lambda batch: batch, to_arrays("", source.gather(np.zeros(1, np.int64)))
    )
    return example


def _rows(example: Mapping[str, Any], n: int) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for name, x in example.items()}


def _device_array(path: str, x: Any) -> DeviceArray:
    where = x.sharding
    split = rules.spec_text(where) if isinstance(where, NamedSharding) else ""
    return DeviceArray(path, x.dtype.name, tuple(x.shape), split, bytes_per_device(x))
