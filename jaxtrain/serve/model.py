"""A loaded model as the service runs it: batch sizes that are few, the same for every load, and warm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxtrain.artifact.bench import random_inputs
from jaxtrain.artifact.engines import Engine, OnnxModel
from jaxtrain.artifact.examples import Reader
from jaxtrain.artifact.manifest import BATCH, Manifest
from jaxtrain.core.errors import InputError
from jaxtrain.core.safe_names import is_name
from jaxtrain.serve.protocol import DATATYPES, describe_model

SHORTEST_TEXT = 32
"""Texts of fewer tokens are padded to this length, where a model takes any."""


class Servable:
    """A model that is run with few batch sizes, so that JAX compiles few programs.

    Batches are padded to the next power of two with copies of their last example, and texts of a language
    model that takes any length to the next power of two with copies of their last token; outputs are cut
    again. onnxruntime compiles nothing, and its batches are not padded.

    Args:
      engine: of ``artifact.engines.open_model``.
      max_batch: examples in a batch at most.

    Raises:
      InputError: an input or output has a dtype that the protocol lacks.
    """

    def __init__(self, engine: Engine, max_batch: int) -> None:
        for name, spec in [*engine.manifest.inputs.items(), *engine.manifest.outputs.items()]:
            if spec.dtype not in DATATYPES:
                raise InputError(
                    f"{name} is {spec.dtype}, for which the Open Inference Protocol has no datatype"
                )
        self.engine, self.manifest, self.max_batch = engine, engine.manifest, max_batch
        self.name = self.manifest.name if is_name(self.manifest.name) else "model"
        self.onnx = isinstance(engine, OnnxModel)
        self.reader = Reader(self.manifest, engine.words, resize=True)
        self.kind = _kind(self.manifest)
        self.padded_axis = _padded_axis(self.manifest)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that are compiled.

        >>> _powers(1, 12)
        (1, 2, 4, 8, 12)
        """
        return _powers(1, self.max_batch)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of texts that are compiled, of a language model that takes any."""
        if self.padded_axis is None:
            return ()
        longest = self.manifest.sizes[self.padded_axis]
        return _powers(min(SHORTEST_TEXT, longest), longest)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the Open Inference Protocol."""
        platform = "onnxruntime_onnx" if self.onnx else "jaxtrain"
        return describe_model(self.manifest, self.name, platform, self.kind, self.max_batch)

    def warm_up(self) -> Iterator[int]:
        """Run every size once, with random inputs, and yield the batch size after it has run."""
        for batch, length in itertools.product(self.batches, self.lengths or (None,)):
            inputs = random_inputs(self.manifest, batch)
            if length is not None:
                inputs = {
                    name: array[:, :length] if array.ndim == 2 else array for name, array in inputs.items()
                }
            self.run(inputs)
            yield batch

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of a batch, by name, for inputs that ``check_batch`` accepts.

        Raises:
          InputError: the engine cannot run them.
        """
        rows, padded = len(next(iter(inputs.values()))), dict(inputs)
        length = None
        if not self.onnx:
            size = next(n for n in self.batches if n >= rows)
            padded = {name: _pad_rows(array, size) for name, array in inputs.items()}
        if self.padded_axis is not None:
            length = next(a.shape[1] for a in padded.values() if a.ndim == 2)
            to = next(n for n in self.lengths if n >= length)
            padded = {n: _pad_texts(a, to) if a.ndim == 2 else a for n, a in padded.items()}
        outputs = {name: np.asarray(array)[:rows] for name, array in self.engine(padded).items()}
        if self.padded_axis is None:
            return outputs
        specs = self.manifest.outputs
        return {
            name: array[_cut(specs[name].shape, self.padded_axis, length)] for name, array in outputs.items()
        }


def _kind(manifest: Manifest) -> str:
    """Return what the page asks for: ``image``, ``text`` or ``array``."""
    if manifest.text is not None and any(len(spec.shape) == 2 for spec in manifest.inputs.values()):
        return "text"
    [*specs] = manifest.inputs.values()
    image = len(specs) == 1 and len(specs[0].shape) == 4 and specs[0].shape[3] in (1, 3)
    return "image" if image and specs[0].white is not None else "array"


def _padded_axis(manifest: Manifest) -> str | None:
    """Return the axis of texts of any length, where padding at their end changes nothing before it."""
    axes = {axis for spec in manifest.inputs.values() for axis in spec.shape[1:] if isinstance(axis, str)}
    if manifest.task != "language_model" or len(axes) != 1:
        return None
    axis = next(iter(axes))
    return axis if all(axis in spec.shape for spec in manifest.outputs.values()) else None


def _powers(low: int, high: int) -> tuple[int, ...]:
    """Return low, 2·low, 4·low, … below ``high``, and ``high``."""
    return (*itertools.takewhile(lambda n: n < high, (low * 2**k for k in itertools.count())), high)


def _pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])


def _pad_texts(array: np.ndarray, length: int) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, length - array.shape[1])), mode="edge")


def _cut(shape: tuple[int | str, ...], axis: str, length: int | None) -> tuple[Any, ...]:
    assert shape[0] == BATCH
    return tuple(slice(length) if n == axis else slice(None) for n in shape)
