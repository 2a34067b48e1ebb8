"""Export in 8-bit integers: the quantized model, and what it costs in accuracy, bytes and time."""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.compress import quantize
from jaxtrain.compress.quantize import HIGHEST, SMALLEST
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import RANGES, Batch, Model, State, split_extra
from jaxtrain.data import Source, compose
from jaxtrain.data.checked import CheckedSource
from jaxtrain.experiment import Experiment
from jaxtrain.export.trained import Trained
from jaxtrain.models.plain_operators import plain_operators
from jaxtrain.monitor import merge_all
from jaxtrain.program.compute_model import eval_model
from jaxtrain.program.loader import EXAMPLE_ID
from jaxtrain.step import make_eval_step
from jaxtrain.step.factories import eval_state

BATCH = 64
"""Examples in a batch of calibration and of evaluation."""

SEED = 0
PRODUCTS = ["Conv", "Gemm", "MatMul"]


def quantize_trained(trained: Trained, examples: int) -> Trained:
    """Return ``trained`` with its model in int8 (``jaxtrain.compress.quantize``).

    A run with ``compress="int8"`` has the ranges of its activations; it then computes what its evaluations
    have computed.

    Args:
      trained: the model.
      examples: how many training examples, drawn with a fixed seed, to measure activations on, where the run
        has no ranges.

    Raises:
      InputError: as ``quantize``.
    """
    experiment = dataclasses.replace(trained.experiment, compress=None)
    model, ranges = eval_model(experiment), trained_ranges(trained)
    params, extra = eval_state(trained.state)
    statistics = {name: tree for name, tree in split_extra(extra)[0].items() if name != RANGES}
    weights = {"params": params, "statistics": statistics}
    prepare = compose(*experiment.preprocess)

    def apply(weights: Any, batch: Batch) -> Any:
        with plain_operators():
            return model.apply(weights["params"], weights["statistics"], batch, train=False, key=None)[0]

    batches = _calibration(experiment, examples)
    quantized = quantize(apply, weights, (prepare(batch, None) for batch in batches), ranges)

    def apply_int8(params: Any, extra: Any, batch: Batch, *, train: bool, key: Any) -> tuple[Any, Any]:
        return quantized.apply(params, batch), extra

    state = State(trained.state.step, quantized.weights, {}, ())
    exported = dataclasses.replace(
        experiment, model=Model(model.init, apply_int8), precision="float32", post_update=()
    )
    return Trained.of(exported, state, trained.examples, trained.about, quantized=True)


def trained_ranges(trained: Trained) -> dict[str, float] | None:
    """Return the ranges of activations by the layer's weight; None without ``compress="int8"``."""
    if trained.experiment.compress is None:
        return None
    return {name: float(x) for name, x in trained.state.extra[RANGES].items()}


def metrics_on_test_set(trained: Trained) -> dict[str, Any]:
    """Return the loss's metrics of a model on its test set, each example once."""
    experiment = trained.experiment
    model = eval_model(experiment)
    step = jax.jit(make_eval_step(model, experiment.loss, compose(*experiment.preprocess)))
    source = CheckedSource("test", experiment.test)
    batches = _batches(source, np.arange(len(source)))
    return merge_all(step(trained.state, batch) for batch in batches)


def _calibration(experiment: Experiment, examples: int) -> Iterator[Batch]:
    source = CheckedSource("train", experiment.train)
    drawn = np.random.default_rng(SEED).permutation(len(source))[:examples]
    return _batches(source, np.sort(drawn))


def _batches(source: Source, indices: np.ndarray) -> Iterator[Batch]:
    for start in range(0, len(indices), BATCH):
        rows = indices[start : start + BATCH]
        batch = source.gather(rows)
        yield {**batch, EXAMPLE_ID: rows.astype(np.int32), "mask": np.ones(len(rows), bool)}


def quantize_onnx(model: Any, trained: Trained, examples: int) -> Any:
    """Return a float32 ONNX model in int8, with QuantizeLinear and DequantizeLinear around its products.

    It is ``onnxruntime.quantization.quantize_static``: symmetric int8, weights by output channel. Results of
    products stay in float32: their range on other examples may be larger, and in int8 they would be cut off.

    Args:
      model: an ``onnx.ModelProto`` of ``trained``, without rounding (``compress=None``).
      trained: for its training set, and the ranges of a run with ``compress="int8"``.
      examples: as for ``quantize_trained``.

    Raises:
      InputError: onnxruntime is missing, or it cannot quantize the model.
    """
    try:
        import onnx
        from onnxruntime import quantization
    except ImportError as error:
        raise InputError("int8 in ONNX needs onnxruntime: pip install 'jaxtrain[onnx]'") from error
    inputs, ranges = trained.serving.inputs, trained_ranges(trained)
    # onnxruntime measures all tensors; where ranges are known, a few examples are enough for that.
    batches = _calibration(trained.experiment, examples if ranges is None else 1)
    scales, excluded = ({}, []) if ranges is None else _trained_scales(model, ranges)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            if batch is None:
                return None
            return {name: np.asarray(batch[name], spec.dtype) for name, spec in inputs.items()}

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, before)
        logging.getLogger().addFilter(_not_pre_processed)
        try:
            quantization.quantize_static(
                before,
                after,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=PRODUCTS,
                nodes_to_exclude=excluded,
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "OpTypesToExcludeOutputQuantization": PRODUCTS,
                    "QuantizeBias": False,  # rounding it gains no bytes
                    "TensorQuantOverrides": scales,
                },
            )
        except Exception as error:  # any of its own
            raise InputError(f"onnxruntime cannot quantize this model: {first_line(error)[:200]}") from error
        finally:
            logging.getLogger().removeFilter(_not_pre_processed)
        return _rounded_for_products_only(onnx.load(after))


def _trained_scales(model: Any, ranges: Mapping[str, float]) -> tuple[dict[str, Any], list[str]]:
    """Return onnxruntime's override of the scale of each product's input, and the products without a range.

    A product is found by the name of its weight, the path in the model that the export gives it.
    """
    used: Counter[str] = Counter()
    scales: dict[str, Any] = {}
    excluded = []
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            name = node.input[1].removesuffix("/folded")
            path = name if name in ranges else re.sub(r"_\d+$", "", name)  # numbered where it was transposed
            used[path] += 1
            path = path if used[path] == 1 else f"{path}#{used[path]}"
            if path in ranges:
                scale = np.array(max(ranges[path], SMALLEST) / HIGHEST, np.float32)
                scales[node.input[0]] = [{"scale": scale, "zero_point": np.array(0, np.int8)}]
            else:
                excluded.append(node.name)
    return scales, excluded


def _rounded_for_products_only(model: Any) -> Any:
    """Let every other operator read the exact tensor: onnxruntime makes all that read it take the rounded."""
    makers = {name: node for node in model.graph.node for name in node.output}
    exact = {}
    for node in model.graph.node:
        source = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is not None and source.op_type == "QuantizeLinear":
            exact[node.output[0]] = source.input[0]
    for node in model.graph.node:
        if node.op_type not in PRODUCTS:
            for number, name in enumerate(node.input):
                node.input[number] = exact.get(name, name)
    return model


def _not_pre_processed(record: logging.LogRecord) -> bool:
    """Drop onnxruntime's advice to fold BatchNorm and infer shapes first: the export has done both."""
    return "pre-processing" not in record.getMessage()


def compare_metrics(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a line per metric that is a number: before, after.

    >>> compare_metrics({"accuracy": 0.984, "table": [1]}, {"accuracy": 0.983, "table": [1]})
    ['accuracy 0.9840 -> 0.9830']
    """
    return [
        f"{name} {value:.4f} -> {after[name]:.4f}"
        for name, value in before.items()
        if isinstance(value, int | float) and isinstance(after.get(name), int | float)
    ]
