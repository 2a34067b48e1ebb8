"""Run an exported model: with JAX (an artifact) or with onnxruntime (an ONNX file)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtrain.artifact.batch import check_batch
from jaxtrain.artifact.examples import Example
from jaxtrain.artifact.manifest import Manifest, parse
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line

ENGINES = ("jax", "onnxruntime")
METADATA = "jaxtrain_manifest"
"""The key of an ONNX file's metadata that holds the manifest."""
WORDS = "jaxtrain_vocabulary"
"""The key that holds the vocabulary, as Latin-1."""


class Engine(Protocol):
    """A loaded model."""

    manifest: Manifest
    words: bytes | None

    def __call__(self, inputs: Any) -> Mapping[str, Any]:
        """Return the outputs for a batch, by name."""


class OnnxModel:
    """An ONNX file that ``export --format onnx`` wrote, run by onnxruntime on the CPU.

    Args:
      path: the file.

    Raises:
      InputError: onnxruntime is missing, or it cannot read the file, or the file has no manifest.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError("onnxruntime is not installed: pip install 'jaxtrain[onnx]'") from error
        if not path.is_file():
            raise InputError(f"{path}: there is no such file")
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a type for every status
            raise InputError(f"{path}: onnxruntime cannot read it ({first_line(error)[:200]})") from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        if METADATA not in metadata:
            raise InputError(f"{path} was not written by python -m jaxtrain export --format onnx")
        self.manifest = parse(metadata[METADATA], str(path))
        self.words = metadata[WORDS].encode("latin-1") if WORDS in metadata else None
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Any) -> dict[str, np.ndarray]:
        """Return the outputs for a batch; see ``Artifact``."""
        batch = check_batch(self.manifest, inputs)
        try:
            return dict(zip(self._names, self._session.run(None, batch), strict=True))
        except Exception as error:
            raise InputError(
                f"onnxruntime cannot run {self.manifest.name} ({first_line(error)[:200]})"
            ) from error


def open_model(path: Path, engine: str | None) -> Engine:
    """Load a model for ``--engine``, by default the one of the file's kind.

    Raises:
      InputError: the file cannot be loaded, or is not for this engine.
    """
    onnx = path.suffix.lower() == ".onnx"
    if engine == "onnxruntime" and not onnx:
        raise InputError(
            f"--engine onnxruntime needs an .onnx file, and {path} is none: export --format onnx"
        )
    if engine == "jax" and onnx:
        raise InputError(
            f"--engine jax needs an artifact, and {path} is an .onnx file: export --format jaxtrain"
        )
    if onnx:
        return OnnxModel(path)
    from jaxtrain.artifact.reader import load

    return load(path)


class Prediction(NamedTuple):
    """The outputs of one example, by name."""

    example: Example
    outputs: dict[str, np.ndarray]


def predict(
    engine: Callable[[dict[str, np.ndarray]], Mapping[str, Any]], examples: Iterable[Example], batch: int
) -> Iterator[Prediction]:
    """Yield the outputs of every example, in order, computed in batches; memory holds one batch.

    Examples of one batch have one shape. A batch that is not full is padded with copies of its last example
    after a full one has been compiled, so that texts of one length need one compilation.

    Args:
      engine: ``inputs -> outputs``, both by name with a leading batch axis.
      examples: to predict.
      batch: examples in a batch, at least 1.
    """
    full: set[Any] = set()
    for shapes, group in itertools.groupby(examples, key=_shapes):
        for rows in _batched(group, batch):
            if len(rows) == batch:
                full.add(shapes)
            padding = [rows[-1]] * (batch - len(rows) if shapes in full else 0)
            padded = [*rows, *padding]
            inputs = {name: np.stack([row.inputs[name] for row in padded]) for name in rows[0].inputs}
            outputs = {name: np.asarray(array) for name, array in engine(inputs).items()}
            for number, example in enumerate(rows):
                yield Prediction(example, {name: array[number] for name, array in outputs.items()})


def _shapes(example: Example) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, np.shape(array)) for name, array in example.inputs.items())


def _batched(rows: Iterable[Example], size: int) -> Iterator[tuple[Example, ...]]:
    """Split into tuples of ``size``; examples before one that cannot be read come before its error."""
    batch: list[Example] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == size:
                yield tuple(batch)
                batch = []
    except InputError:
        if batch:
            yield tuple(batch)
        raise
    if batch:
        yield tuple(batch)
