"""The manifest of an export, from the experiment and what was traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

import jaxtrain
from jaxtrain.artifact.manifest import BATCH, InputSpec, Manifest, Shape
from jaxtrain.core.errors import InputError
from jaxtrain.core.files import as_json
from jaxtrain.data import Images, LabelledText, Normalise, Subset, TextWindows
from jaxtrain.experiment import Experiment
from jaxtrain.export.serving import value_range
from jaxtrain.export.trained import Trained


def describe(
    trained: Trained,
    axes: Mapping[str, Shape],
    sizes: Mapping[str, int],
    outputs: Mapping[str, InputSpec],
    platforms: Sequence[str],
) -> Manifest:
    """Return the manifest of an export, without its parts.

    Args:
      trained: the model.
      axes: the shape of one example of each input, with names of free axes.
      sizes: the largest size of each free axis.
      outputs: by name.
      platforms: where it runs.

    Raises:
      InputError: an output has no row for each example.
    """
    experiment, serving = trained.experiment, trained.serving
    inputs = {}
    for name, given in serving.inputs.items():
        image = _image(experiment, given) if len(given.shape) == 3 else {}
        low, high = value_range(experiment, trained.examples, name) or (None, None)
        inputs[name] = InputSpec(given.dtype.name, (BATCH, *axes[name]), low, high, **image)
    for name, spec in outputs.items():
        if spec.shape[:1] != (BATCH,) or not has_names(spec.shape, sizes):
            raise InputError(
                f"output {name} has shape {list(spec.shape)}: it needs a row for each example, [batch, ...]"
            )
    packages = {name: version(name) for name in ("jax", "jaxlib", "numpy")}
    labels = getattr(_base(experiment.train), "class_names", None)
    return Manifest(
        task=serving.task,
        inputs=inputs,
        outputs=dict(outputs),
        sizes=dict(sizes),
        platforms=tuple(platforms),
        labels=None if labels is None else tuple(labels),
        text=_text(experiment),
        **{**trained.about, "metrics": as_json(trained.about["metrics"])},
        versions={"jaxtrain": jaxtrain.__version__, **packages},
    )


def describe_fixed(trained: Trained, platforms: Sequence[str]) -> Manifest:
    """Return the manifest of a model whose axes are all fixed, except that of the batch."""
    serving = trained.serving
    outputs = {
        name: InputSpec(spec.dtype.name, (BATCH, *spec.shape)) for name, spec in serving.outputs.items()
    }
    axes: dict[str, Shape] = {name: tuple(spec.shape) for name, spec in serving.inputs.items()}
    return describe(trained, axes, {}, outputs, platforms)


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
        return {"tokens": "words" if source.words else "bytes"}
    return {"tokens": "bytes"} if isinstance(source, TextWindows) else None


def vocabulary(experiment: Experiment) -> bytes | None:
    """Return the words of the tokens from 256 on, one per line; None without words."""
    source = _base(experiment.test)
    if not isinstance(source, LabelledText) or not source.words:
        return None
    return b"".join(word + b"\n" for word in source.vocabulary_words())


def has_names(shape: Sequence[Any], sizes: Mapping[str, int]) -> bool:
    """Return whether every axis is a number, ``batch`` or a free axis of ``sizes``."""
    return all(isinstance(n, int) or str(n) in (BATCH, *sizes) for n in shape)
