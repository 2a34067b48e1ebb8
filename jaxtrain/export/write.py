"""Write a trained model in one of four formats, read the file again, and compare it with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from jaxtrain.artifact import engines, parts, program, reader, tensors
from jaxtrain.artifact.manifest import InputSpec, Manifest, Shape
from jaxtrain.artifact.onnx import to_onnx
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.export import describe
from jaxtrain.export.quantized import quantize_onnx
from jaxtrain.export.serving import Serving, make_serving
from jaxtrain.export.trained import Trained, compare

LENGTH = "length"
"""The name of a text's axis, where it may be shorter than the model's context."""


def write(kind: str, path: Path, trained: Trained, force: bool = False, calibrate: int = 0) -> str:
    """Write a trained model to ``path``, which appears only after the file was read and compared.

    Args:
      kind: ``jaxtrain``, ``onnx``, ``stablehlo`` or ``safetensors``.
      path: the file to write.
      trained: the model.
      force: replace an existing file.
      calibrate: for int8 in ONNX, the training examples to measure activations on; 0 leaves float32. In the
        other formats the model itself is in int8 (``quantize_trained``).

    Returns:
      What was checked, in one line.

    Raises:
      InputError: the model cannot be exported, or the file cannot be written.
      RunError: the file gives other outputs than the model.
    """
    with parts.new_file(path, force) as part:
        if kind == "onnx":
            return _write_onnx(part, trained, calibrate)
        return WRITERS[kind](part, trained)


def _write_artifact(path: Path, trained: Trained) -> str:
    experiment, serving = trained.experiment, trained.serving
    exported, axes, sizes = export_serving(serving)
    words = describe.vocabulary(experiment)
    contents = {
        parts.PROGRAM: program.serialize(exported),
        parts.WEIGHTS: tensors.encode(serving.weights),
        **({} if words is None else {parts.VOCABULARY: words}),
    }
    manifest = _describe(trained, exported, axes, sizes).with_parts(contents)
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
                if all(describe.has_names(aval.shape, sizes) for aval in exported.out_avals):
                    return exported, axes, sizes
            except InputError:
                pass  # the model decides by the length: it is fixed
    return program.export_program(serving.apply, serving.weights, serving.inputs, {}, fixed), fixed, {}


def _describe(
    trained: Trained, exported: export.Exported, axes: Mapping[str, Shape], sizes: Mapping[str, int]
) -> Manifest:
    outputs = {}
    for name, aval in jax.tree.unflatten(exported.out_tree, exported.out_avals).items():
        shape = tuple(n if isinstance(n, int) else str(n) for n in aval.shape)
        outputs[name] = InputSpec(aval.dtype.name, shape)
    return describe.describe(trained, axes, sizes, outputs, exported.platforms)


def _write_onnx(path: Path, trained: Trained, calibrate: int) -> str:
    """Write an ONNX model with the manifest in its metadata, and run it with onnxruntime."""
    serving = trained.serving
    source = serving
    if calibrate and trained.experiment.compress is not None:  # rounded by the file's own operators
        exact = dataclasses.replace(trained.experiment, compress=None)
        source = make_serving(exact, trained.state, trained.examples)
    model = to_onnx(source.apply, source.weights, source.inputs)
    if calibrate:
        model = quantize_onnx(model, trained, calibrate)
        # The recorded metrics are those of the float32 model.
        trained = dataclasses.replace(trained, quantized=True, about={**trained.about, "metrics": {}})
    manifest = describe.describe_fixed(trained, ("onnx",))
    words = describe.vocabulary(trained.experiment)
    texts = {engines.METADATA: manifest.to_json()}
    if words is not None:
        texts[engines.WORDS] = words.decode("latin-1")
    for name, text in texts.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, text
    path.write_bytes(model.SerializeToString(deterministic=True))
    return compare(engines.OnnxModel(path), trained).text


def _write_stablehlo(path: Path, trained: Trained) -> str:
    """Write the program as StableHLO bytecode, for one example, without JAX's calls for free sizes.

    It is what JAX lowers for GPUs, plain operations, where that for CPUs has rearranged convolutions. Its
    arguments are the weights by name and then the inputs by name.
    """
    serving = trained.serving
    apply, weights, inputs = serving.apply, serving.weights, serving.inputs
    exported = program.export_fixed(apply, weights, inputs, batch=1)
    path.write_bytes(exported.mlir_module_serialized)
    read = dataclasses.replace(exported, mlir_module_serialized=path.read_bytes())
    program.check_calls(read, str(path))
    call = jax.jit(read.call)

    def run(batch: dict[str, Any]) -> dict[str, np.ndarray]:
        rows = range(len(next(iter(batch.values()))))
        each = [call(weights, {name: array[row : row + 1] for name, array in batch.items()}) for row in rows]
        return {name: np.concatenate([one[name] for one in each]) for name in each[0]}

    return (
        compare(run, trained).text + "; one example a call, arguments: weights by name, then inputs by name"
    )


def _write_safetensors(path: Path, trained: Trained) -> str:
    """Write the weights of evaluation, by path."""
    about = {"format": "jaxtrain", **{name: str(trained.about[name]) for name in ("name", "step")}}
    weights = trained.serving.weights
    path.write_bytes(tensors.encode(weights, about))
    read = tensors.decode(path.read_bytes(), str(path))
    same = read.keys() == weights.keys() and all(
        read[name].shape == x.shape and read[name].tobytes() == np.asarray(x).tobytes()
        for name, x in weights.items()
    )
    if not same:
        raise RunError(
            f"{path} was read back and has other arrays than the model (--debug, and please report it)"
        )
    return f"read back: {len(read)} arrays, equal to the model's"


WRITERS: dict[str, Callable[[Path, Trained], str]] = {
    "jaxtrain": _write_artifact,
    "stablehlo": _write_stablehlo,
    "safetensors": _write_safetensors,
}
