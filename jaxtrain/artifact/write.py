"""Write an artifact, load it again, and compare its outputs with those of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

import jaxtrain
from jaxtrain.artifact import parts, program, reader, tensors
from jaxtrain.artifact.manifest import BATCH, InputSpec, Manifest, Shape
from jaxtrain.artifact.serving import Serving, make_serving, name_outputs, task_of, value_range
from jaxtrain.core.chunked_logits import full_logits
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import as_json
from jaxtrain.core.types import State
from jaxtrain.data import Images, LabelledText, Normalise, Subset, TextWindows, compose
from jaxtrain.experiment import Experiment
from jaxtrain.models import as_model, compute_in
from jaxtrain.program import check_fields
from jaxtrain.program.loader import EXAMPLE_ID
from jaxtrain.step import make_eval_step

LENGTH = "length"
"""The name of a text's axis, where it may be shorter than the model's context."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
"""Largest difference from the model's outputs, relative to the largest of them, by ``Experiment.precision``.
On the same device they are equal, or differ by rounding; a GPU may choose other algorithms, with TF32."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """What the check of an exported file found.

    Attributes:
      examples: how many real examples were compared.
      difference: the largest absolute difference between outputs.
      largest: the largest absolute output.
    """

    examples: int
    difference: float
    largest: float

    @property
    def text(self) -> str:
        """One line for the user."""
        return (
            f"checked on {self.examples} test examples: largest difference {self.difference:.2g} "
            f"(outputs up to {self.largest:.3g})"
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is exported.

    Attributes:
      experiment: what was trained.
      state: of the checkpoint.
      examples: real examples to compare outputs on, raw fields with a leading axis.
      about: ``name``, ``step``, ``metrics`` and ``config`` of the manifest.
      serving: of the experiment and the state.
    """

    experiment: Experiment
    state: State
    examples: Mapping[str, np.ndarray]
    about: Mapping[str, Any]
    serving: Serving

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        state: State,
        examples: Mapping[str, np.ndarray],
        about: Mapping[str, Any],
    ) -> Trained:
        """Make it, with the function to export. Raises as ``make_serving``."""
        return cls(experiment, state, examples, about, make_serving(experiment, state, examples))


def write(kind: str, path: Path, trained: Trained, force: bool = False) -> str:
    """Write a trained model to ``path``, which appears only after the file was read and compared.

    Args:
      kind: ``jaxtrain``, ``stablehlo`` or ``safetensors``.
      path: the file to write.
      trained: the model.
      force: replace an existing file.

    Returns:
      What was checked, in one line.

    Raises:
      InputError: the model cannot be exported, or the file cannot be written.
      RunError: the file gives other outputs than the model.
    """
    with parts.new_file(path, force) as part:
        return WRITERS[kind](part, trained)


def _write_artifact(path: Path, trained: Trained) -> str:
    experiment, serving = trained.experiment, trained.serving
    exported, axes, sizes = export_serving(serving)
    words = vocabulary(experiment)
    contents = {
        parts.PROGRAM: program.serialize(exported),
        parts.WEIGHTS: tensors.encode(serving.weights),
        **({} if words is None else {parts.VOCABULARY: words}),
    }
    manifest = describe(trained, exported, axes, sizes).with_parts(contents)
    parts.write(path, {parts.MANIFEST: manifest.to_json().encode(), **contents})
    return compare(reader.load(path), trained).text


def export_serving(serving: Serving) -> tuple[export.Exported, dict[str, Shape], dict[str, int]]:
    """Export for any batch size, and for texts of any length where the model can.

    Returns:
      The program; the shape of one example of each input, with names of free axes; their largest sizes.
    """
    fixed: dict[str, Shape] = {name: tuple(spec.shape) for name, spec in serving.inputs.items()}
    if serving.task == "language_model":
        lengths = {shape[0] for shape in fixed.values() if len(shape) == 1}
        if len(lengths) == 1 and all(len(shape) == 1 for shape in fixed.values()):
            sizes = {LENGTH: int(next(iter(lengths)))}
            axes: dict[str, Shape] = dict.fromkeys(fixed, (LENGTH,))
            try:
                exported = program.export_program(serving.apply, serving.weights, serving.inputs, sizes, axes)
                if all(_has_names(aval, sizes) for aval in exported.out_avals):
                    return exported, axes, sizes
            except InputError:
                pass  # the model decides by the length: it is fixed
    return program.export_program(serving.apply, serving.weights, serving.inputs, {}, fixed), fixed, {}


def _has_names(aval: Any, sizes: Mapping[str, int]) -> bool:
    return all(isinstance(n, int) or str(n) in (BATCH, *sizes) for n in aval.shape)


def describe(
    trained: Trained, exported: export.Exported, axes: Mapping[str, Shape], sizes: Mapping[str, int]
) -> Manifest:
    """Return the manifest of an export, without its parts.

    Args:
      trained: the model.
      exported, axes, sizes: from ``export_serving``.
    """
    experiment, serving = trained.experiment, trained.serving
    inputs = {}
    for name, spec in serving.inputs.items():
        image = _image(experiment, spec) if len(spec.shape) == 3 else {}
        low, high = value_range(experiment, trained.examples, name) or (None, None)
        inputs[name] = InputSpec(spec.dtype.name, (BATCH, *axes[name]), low, high, **image)
    outputs = {}
    for name, aval in jax.tree.unflatten(exported.out_tree, exported.out_avals).items():
        shape = tuple(n if isinstance(n, int) else str(n) for n in aval.shape)
        outputs[name] = InputSpec(aval.dtype.name, shape)
        if shape[:1] != (BATCH,) or not _has_names(aval, sizes):
            raise InputError(
                f"output {name} has shape {list(shape)}: it needs a row for each example, [batch, ...]"
            )
    packages = {name: version(name) for name in ("jax", "jaxlib", "numpy")}
    labels = getattr(_base(experiment.train), "class_names", None)
    return Manifest(
        task=serving.task,
        inputs=inputs,
        outputs=outputs,
        sizes=dict(sizes),
        platforms=tuple(exported.platforms),
        labels=None if labels is None else tuple(labels),
        text=_text(experiment),
        **{**trained.about, "metrics": as_json(trained.about["metrics"])},
        versions={"jaxtrain": jaxtrain.__version__, **packages},
    )


def _base(source: Any) -> Any:
    """Return the source that ``data.Subset`` selects from."""
    while isinstance(source, Subset):
        source = source.source
    return source


def _image(experiment: Experiment, spec: jax.ShapeDtypeStruct) -> dict[str, float | None]:
    """Return what a decoded image file needs: the value of white, and evaluation's crop."""
    scale = next((stage.scale for stage in experiment.preprocess if isinstance(stage, Normalise)), None)
    if scale is None and spec.dtype == np.uint8:
        scale = 255.0
    test = _base(experiment.test)
    return {"white": scale, "crop": test.crop if isinstance(test, Images) else None}


def _text(experiment: Experiment) -> dict[str, Any] | None:
    source = _base(experiment.test)
    if isinstance(source, LabelledText):
        return {"tokens": "words" if source.words else "bytes", "length": source.length}
    return {"tokens": "bytes", "length": source.context} if isinstance(source, TextWindows) else None


def vocabulary(experiment: Experiment) -> bytes | None:
    """Return the words of the tokens from 256 on, one per line; None without words."""
    source = _base(experiment.test)
    if not isinstance(source, LabelledText) or not source.words:
        return None
    return b"".join(word + b"\n" for word in source.vocabulary_words())


def model_outputs(trained: Trained) -> dict[str, np.ndarray]:
    """Return the outputs of the model by name, computed as ``evaluate`` does."""
    experiment, examples = trained.experiment, trained.examples
    model = compute_in(as_model(experiment.model), experiment.precision)
    report = check_fields.find_report(experiment)

    def capture(outputs: Any, batch: Any) -> dict[str, Any]:
        return {"outputs": name_outputs(task_of(report), report, full_logits(outputs))}

    step = make_eval_step(model, experiment.loss, compose(*experiment.preprocess), capture)
    rows = len(next(iter(examples.values())))
    batch = {**examples, EXAMPLE_ID: np.zeros(rows, np.int32), "mask": np.ones(rows, bool)}
    outputs = jax.jit(lambda state, batch: step(state, batch)["outputs"])(trained.state, batch)
    return {name: np.asarray(array) for name, array in outputs.items()}


def compare(run: Callable[[dict[str, Any]], Mapping[str, Any]], trained: Trained) -> Checked:
    """Compare the outputs of an exported model with those of the model itself, on real examples.

    All examples are one batch, and the first is another, since the batch size is free.

    Args:
      run: the exported model, ``inputs -> outputs`` by name.
      trained: the model.

    Raises:
      RunError: an output is missing, has another shape, or differs by more than ``TOLERANCE``.
    """
    expected = model_outputs(trained)
    inputs = {
        name: np.asarray(trained.examples[name]).astype(spec.dtype)
        for name, spec in trained.serving.inputs.items()
    }
    tolerance = TOLERANCE[trained.experiment.precision]
    difference = largest = 0.0
    for rows in dict.fromkeys((len(next(iter(inputs.values()))), 1)):
        found = {
            name: np.asarray(array) for name, array in run({k: x[:rows] for k, x in inputs.items()}).items()
        }
        for name, full in expected.items():
            array, reference = found.get(name), full[:rows]
            if array is None or array.shape != reference.shape:
                shown = "nothing" if array is None else str(list(array.shape))
                raise RunError(
                    f"the exported model returns {shown} for {name}, the model {list(reference.shape)}"
                )
            if name == "label":
                continue  # follows from the probability; where two are equal, rounding decides
            wide = np.asarray(reference, np.float64)
            scale, off = float(np.abs(wide).max()), float(np.abs(np.asarray(array, np.float64) - wide).max())
            if not off <= tolerance * max(scale, 1e-3):
                raise RunError(
                    f"the exported model gives other outputs than the model: {name} differs by {off:.3g}, "
                    f"where the largest is {scale:.3g}; no file was written (--debug, and please report it)"
                )
            difference, largest = max(difference, off), max(largest, scale)
    return Checked(len(next(iter(inputs.values()))), difference, largest)


WRITERS: dict[str, Callable[[Path, Trained], str]] = {"jaxtrain": _write_artifact}
