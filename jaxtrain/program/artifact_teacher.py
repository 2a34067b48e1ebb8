"""The teacher of a distillation from an artifact, the file that ``python -m jaxtrain export`` writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.artifact import reader
from jaxtrain.artifact.batch import check_shapes
from jaxtrain.artifact.manifest import Manifest
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Model, Prepare, State
from jaxtrain.data import compose

RAW = "teacher_inputs"
"""The field of a prepared batch with what the artifact takes: a dict of fields before ``preprocess``."""

Stage = Callable[..., Batch]


class ArtifactTeacher:
    """The model of an artifact, whose arrays are replicated on a mesh.

    Args:
      path: the file.
      mesh: the devices of the student's run.
      augmented: shapes of the student's batch after ``augment``.
      output: the one that the loss names; None for a student with one output.
      student: its shape in the student.

    Attributes:
      identity: the step and the checksum of the file's manifest.
      model: its ``apply`` takes a batch with the field ``RAW``.
      abstract: shapes, dtypes and shardings of its ``params``, the artifact's weights by name.
      inputs: names of the fields that it takes.

    Raises:
      InputError: the file is no artifact or is damaged, or takes other inputs than the student's data has.
    """

    def __init__(
        self, path: Path, mesh: Mesh, augmented: Batch, output: str | int | None, student: Any
    ) -> None:
        contents = reader.read(path)
        manifest, call = contents.manifest, contents.exported.call
        _check_platform(contents.exported.platforms, mesh)
        self.inputs = tuple(manifest.inputs)
        missing = [name for name in self.inputs if name not in augmented]
        if missing:
            raise InputError(
                f"it takes {', '.join(self.inputs)}, and the data has no field {missing[0]}: give a teacher "
                "of the same data"
            )
        try:
            check_shapes(manifest, {name: augmented[name] for name in self.inputs})
        except InputError as error:
            raise InputError(f"{error} after augment: give a teacher of such data") from error
        name = _output_name(manifest, output)

        # Exported logits of a binary task are [batch], also where those of its model are [batch, 1].
        column = manifest.task == "binary" and student.shape[1:] == (*manifest.outputs[name].shape[1:], 1)

        def apply(params: Any, extra: Any, batch: Batch, *, train: bool, key: Any) -> tuple[Any, Any]:
            array = call(params, dict(batch[RAW]))[name]
            array = array[..., None] if column else array
            return (array if output is None else {output: array}), extra

        replicated = sharding.replicated(mesh)
        params = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)
            for name, x in contents.weights.items()
        }
        step: Any = jax.ShapeDtypeStruct((), jnp.int32)
        self.identity = _identity(contents)
        self.model = Model(_no_init, apply)
        self.abstract = State(step, params, {}, ())
        self._path = path

    def read(self) -> State:
        """Read the arrays again, onto the devices.

        Raises:
          InputError: the file cannot be read, or is another one now.
        """
        contents = reader.read(self._path)
        if _identity(contents) != self.identity:
            raise InputError(f"{self._path} was replaced after the run started: start it again")
        params = {
            name: _replicate(contents.weights[name], spec.sharding)
            for name, spec in self.abstract.params.items()
        }
        return self.abstract.replace(params=params)


def keep_inputs(stages: Sequence[Stage], before: int, names: Sequence[str]) -> Prepare:
    """Compose ``stages``, and add the field ``RAW``: ``names`` as stage ``before - 1`` returns them.

    The stages after it do not see the field.

    >>> double = lambda batch, key: {"x": batch["x"] * 2}
    >>> keep_inputs([double, double], 1, ["x"])({"x": 1}, None)
    {'x': 4, 'teacher_inputs': {'x': 2}}
    """

    def prepare(batch: Batch, key: jax.Array | None) -> Batch:
        kept: dict[str, Any] = {}

        def last(batch: Batch, key: jax.Array | None) -> Batch:
            batch = stages[before - 1](batch, key)
            kept.update({name: batch[name] for name in names})
            return batch

        prepared = compose(*stages[: before - 1], last, *stages[before:])(batch, key)
        return {**prepared, RAW: kept}

    return prepare


def _identity(contents: reader.Contents) -> str:
    return f"step {contents.manifest.step}, sha256 {contents.digest[:16]}"


def _output_name(manifest: Manifest, output: str | int | None) -> str:
    """Return the name of the artifact's output to compare: the logits, or what ``loss.output`` names."""
    outputs = list(manifest.outputs)
    if manifest.task == "other":
        wanted = ["output"] if output is None else [str(output), f"output_{output}"]
    else:
        wanted = ["logits", "value"]
    found = [name for name in wanted if name in outputs]
    if not found:
        raise InputError(
            f"its outputs are {', '.join(outputs)}, and none of them is {wanted[0]}: set loss.loss.output to "
            "the one that the student has too, or give another teacher"
        )
    return found[0]


def _check_platform(platforms: Sequence[str], mesh: Mesh) -> None:
    device = mesh.devices.flat[0].platform
    name = {"gpu": "cuda"}.get(device, device)
    if name not in platforms:
        raise InputError(f"it runs on {' and '.join(platforms)}, and the devices are {name}")


def _replicate(array: np.ndarray, where: Any) -> jax.Array:
    """Place a host array, the same on every process, on all devices of the mesh."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def _no_init(key: jax.Array, batch: Mapping[str, Any]) -> Any:
    raise InputError("an artifact has no initial state")
