"""Load an artifact and run it: needs JAX, NumPy and flatbuffers, and no code of the experiment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export

from jaxtrain.artifact import parts, program, tensors
from jaxtrain.artifact.batch import check_batch
from jaxtrain.artifact.manifest import InputSpec, Manifest, parse
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


class Contents(NamedTuple):
    """The checked parts of an artifact.

    Attributes:
      manifest: what the model takes and returns.
      exported: the program, ``(weights, inputs) -> outputs``.
      weights: arrays by name, on the host.
      words: the vocabulary of a model of words.
      digest: SHA-256 of the manifest, which has those of all other parts.
    """

    manifest: Manifest
    exported: export.Exported
    weights: dict[str, np.ndarray]
    words: bytes | None
    digest: str


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
    contents = read(path)
    return Artifact(contents.manifest, contents.exported, contents.weights, contents.words)


def read(path: str | os.PathLike[str]) -> Contents:
    """Read and check an artifact, and place nothing on a device. Raises as ``load``."""
    path = Path(path)
    contents = parts.read(path)
    manifest = parse(contents[parts.MANIFEST], str(path))
    manifest.check_parts(contents, str(path))
    weights = tensors.decode(contents[parts.WEIGHTS], f"{path}: {parts.WEIGHTS}")
    exported = program.load_program(contents[parts.PROGRAM], str(path))
    _check_signature(exported, weights, manifest, str(path))
    digest = parts.sha256(contents[parts.MANIFEST])
    return Contents(manifest, exported, weights, contents.get(parts.VOCABULARY), digest)


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
        avals = [*exported.in_avals[len(expected) :], *exported.out_avals]
        specs = [each[name] for each in (manifest.inputs, manifest.outputs) for name in sorted(each)]
        fits = found == expected and all(map(_fits, specs, avals))
    if not fits:
        raise InputError(f"{where} is damaged: its program, weights and manifest do not fit together")


def _fits(spec: InputSpec, aval: Any) -> bool:
    """Return whether an input or output of the program has this dtype and shape, where sizes are fixed."""
    same_rank = aval.dtype == spec.numpy_dtype and len(aval.shape) == len(spec.shape)
    return same_rank and all(
        a == b if isinstance(a, int) or isinstance(b, int) else True
        for a, b in zip(aval.shape, spec.shape, strict=True)
    )
