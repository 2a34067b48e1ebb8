"""Load an artifact and run it: needs JAX, NumPy and flatbuffers, and no code of the experiment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from jaxtrain.artifact import parts, program, tensors
from jaxtrain.artifact.manifest import BATCH, InputSpec, Manifest, parse
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line


class Artifact:
    """A trained model: call it with a batch of raw inputs. Preprocessing is part of it.

    Attributes:
      manifest: names, shapes, labels, metrics, settings and versions.
    """

    def __init__(
        self,
        manifest: Manifest,
        exported: export.Exported,
        weights: dict[str, Any],
        words: bytes | None = None,
    ) -> None:
        self.manifest = manifest
        self.words = words
        self._weights = jax.device_put(weights)
        self._call = jax.jit(exported.call)

    def __call__(self, inputs: Any) -> dict[str, jax.Array]:
        """Return the outputs for a batch, by name: ``logits``, ``probability``, ``label``, ...

        It is compiled once for every batch size.

        Args:
          inputs: the batch as an array, for a model with one input, or arrays by name. Dtypes and shapes must
            be those of ``manifest.inputs``.

        Raises:
          InputError: inputs are missing or unknown, or have another dtype or shape.
        """
        batch = check_batch(self.manifest, inputs)
        try:
            outputs: dict[str, jax.Array] = self._call(self._weights, batch)
        except ValueError as error:  # of jax.export, such as another platform
            raise InputError(f"{self.manifest.name} cannot run: {first_line(error)}") from error
        return outputs


def load(path: str | os.PathLike[str]) -> Artifact:
    """Load an artifact. It contains a program, so load only files from sources that you trust.

    Nothing is unpickled, sizes are checked before anything is read, and the checksums of all parts before the
    program is. They show damage, and not who wrote the file.

    Args:
      path: a file that ``python -m jaxtrain export`` wrote.

    Raises:
      InputError: the file is no artifact or is damaged, is of a newer format, or contains a call that is not
        allowed.
    """
    path = Path(path)
    contents = parts.read(path)
    manifest = parse(contents[parts.MANIFEST], str(path))
    manifest.check_parts(contents, str(path))
    weights = tensors.decode(contents[parts.WEIGHTS], f"{path}: {parts.WEIGHTS}")
    exported = program.load_program(contents[parts.PROGRAM], str(path))
    _check_signature(exported, weights, manifest, str(path))
    return Artifact(manifest, exported, weights, contents.get(parts.VOCABULARY))


def check_batch(manifest: Manifest, inputs: Any) -> dict[str, Any]:
    """Return a batch as arrays by name, after a check of names, dtypes, shapes and values.

    Raises:
      InputError: they are not those of the manifest; the message says what is expected.
    """
    specs = manifest.inputs
    if not isinstance(inputs, Mapping):
        if len(specs) != 1:
            raise InputError(f"{manifest.name} takes a dict of the arrays {', '.join(specs)}")
        inputs = {next(iter(specs)): inputs}
    if set(inputs) != set(specs):
        raise InputError(
            f"{manifest.name} takes {', '.join(specs)}, and the batch has "
            f"{', '.join(map(str, inputs)) or 'nothing'}"
        )
    sizes: dict[str, int] = {}
    batch = {}
    for name, spec in specs.items():
        array = inputs[name] if isinstance(inputs[name], jax.Array) else np.asarray(inputs[name])
        if array.dtype != spec.numpy_dtype or len(array.shape) != len(spec.shape):
            raise InputError(_expected(name, spec, array))
        for expected, size in zip(spec.shape, array.shape, strict=True):
            if isinstance(expected, str):
                largest = manifest.sizes.get(expected, size)
                if not 1 <= size <= largest or sizes.setdefault(expected, size) != size:
                    raise InputError(_expected(name, spec, array) + _limits(manifest, expected))
            elif expected != size:
                raise InputError(_expected(name, spec, array))
        _check_values(name, spec, array)
        batch[name] = array
    return batch


def _expected(name: str, spec: InputSpec, array: Any) -> str:
    return f"{name} must be {spec.text}, and is {array.dtype} {list(array.shape)}"


def _limits(manifest: Manifest, axis: str) -> str:
    if axis == BATCH:
        return ": at least one example, as many in every input"
    return f": {axis} is from 1 to {manifest.sizes[axis]}"


def _check_values(name: str, spec: InputSpec, array: Any) -> None:
    """Check tokens and ids: the program would replace those out of range by others, silently."""
    if spec.minimum is None and spec.maximum is None:
        return
    lowest, highest = int(array.min()), int(array.max())
    if (spec.minimum is not None and lowest < spec.minimum) or (
        spec.maximum is not None and highest > spec.maximum
    ):
        raise InputError(
            f"{name} has values from {lowest} to {highest}: the model takes {spec.minimum} to {spec.maximum}"
        )


def _check_signature(
    exported: export.Exported, weights: Mapping[str, np.ndarray], manifest: Manifest, where: str
) -> None:
    """Check that the program takes these weights and the manifest's inputs, and returns its outputs."""
    tree: Any = jax.tree.structure(((dict.fromkeys(weights, 0), dict.fromkeys(manifest.inputs, 0)), {}))
    outputs: Any = jax.tree.structure(dict.fromkeys(manifest.outputs, 0))
    expected = [(array.shape, array.dtype) for _, array in sorted(weights.items())]
    fits = exported.in_tree == tree and exported.out_tree == outputs
    if fits:
        found = [(aval.shape, aval.dtype) for aval in exported.in_avals[: len(expected)]]
        fits = found == expected
    if not fits:
        raise InputError(f"{where} is damaged: its program, weights and manifest do not fit together")
