"""What of a run lies on each device between two steps: known exactly, from shapes and shardings."""

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
from jaxtrain.program import Program
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID, Resident
from jaxtrain.sharding import rules


@dataclasses.dataclass(frozen=True)
class DeviceArray:
    """One array, of which each device holds all or a part.

    Attributes:
      path: ``params/head/kernel``, ``opt_state/0/mu/head/kernel``, ``batch/rows``, ``data/train/image``.
      dtype: its name.
      shape: of the whole array.
      sharding: one word for each dimension that is split or stands before one that is (``rules.spec_text``);
        empty for an array that is whole on each device.
      bytes: on one device.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    sharding: str
    bytes: int

    @property
    def array(self) -> str:
        """``float32[256,384]``."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def device_arrays(
    program: Program, resident: Mapping[str, bool] | None = None
) -> dict[str, list[DeviceArray]]:
    """The arrays of a run by part: ``params``, ``optimizer``, ``other_state``, ``batch``, ``data``.

    ``other_state`` is the step, the statistics and the averages; ``data`` is what is kept on every device.
    Nothing is placed on a device.

    Args:
      program: the run.
      resident: whether a split is kept on the devices, where that is not to be as in ``program``.
    """
    state, batch = program.abstract_state, abstract_batch(program)
    parts = {
        "params": {"params": state.params},
        "optimizer": {"opt_state": state.opt_state},
        "other_state": {"step": state.step, "extra": state.extra},
        "batch": {"batch": {name: x for name, x in batch.items() if not _is_data(program, name)}},
        "data": {"data": _data(program, batch, resident)},
    }
    return {part: [_held(*item) for item in leaf_paths(tree).items()] for part, tree in parts.items()}


def bytes_per_device(x: Any) -> int:
    """Of an array, or of its shape, dtype and sharding.

    >>> from jax.sharding import PartitionSpec
    >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    >>> x = jax.ShapeDtypeStruct((6, 2), "float32", sharding=NamedSharding(mesh, PartitionSpec("data")))
    >>> bytes_per_device(x)
    48
    """
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def abstract_batch(program: Program) -> dict[str, Any]:
    """Shapes, dtypes and shardings of what the train step takes as its batch; nothing is placed."""
    shapes = jax.eval_shape(lambda batch: batch, program.train.abstract_batch())
    where = jax.tree.broadcast(program.train.shardings, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def abstract_args(program: Program) -> tuple[Any, Any, jax.Array]:
    """Arguments of ``program.train_step`` as the loop gives them, for tracing and compiling it ahead.

    What is sent with the call has no sharding: with one it would be another trace.
    """
    return program.abstract_state, program.train.abstract_batch(), program.key


def mesh_of(program: Program) -> Mesh:
    """The devices that ``program`` was made for."""
    mesh: Mesh = program.abstract_state.step.sharding.mesh  # type: ignore[attr-defined]
    return mesh


def bytes_stored(source: Source, n: int) -> int:
    """Bytes on a device that keeps ``n`` examples of ``source``."""
    return n * sum(math.prod(x.shape) * x.dtype.itemsize for x in _example(source).values())


def abstract_examples(source: Source, n: int) -> dict[str, Any]:
    """Shapes of ``n`` raw examples of ``source`` as a training batch has them, with their ids and epochs."""
    ids = {name: jax.ShapeDtypeStruct((1,), np.int32) for name in (EXAMPLE_ID, EPOCH)}
    return _rows({**_example(source), **ids}, n)


def _data(program: Program, batch: dict[str, Any], resident: Mapping[str, bool] | None) -> dict[str, Any]:
    """The kept arrays of each split."""
    kept = {}
    loaders = {"train": program.train, **{name: split.loader for name, split in program.evals.items()}}
    for name, loader in loaders.items():
        if not (isinstance(loader, Resident) if resident is None else resident[name]):
            continue
        if name == "train":
            kept[name] = batch["data"]
        else:
            source = getattr(program.experiment, name) or program.experiment.train  # held out of it
            kept[name] = {
                field: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh_of(program)))
                for field, x in _rows(_example(source), program.evals[name].examples).items()
            }
    return kept


def _is_data(program: Program, name: str) -> bool:
    return isinstance(program.train, Resident) and name == "data"


def _example(source: Source) -> dict[str, Any]:
    """Shapes of one example as a device holds it."""
    one: dict[str, Any] = jax.eval_shape(lambda batch: batch, source.gather(np.zeros(1, np.int64)))
    return one


def _rows(example: Mapping[str, Any], n: int) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for name, x in example.items()}


def _held(path: str, x: Any) -> DeviceArray:
    where = x.sharding
    split = rules.spec_text(where) if isinstance(where, NamedSharding) else ""
    return DeviceArray(path, x.dtype.name, tuple(x.shape), split, bytes_per_device(x))
