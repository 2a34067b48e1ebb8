"""Export in 8-bit integers: the quantized model, and what it costs in accuracy, bytes and time."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.artifact.trained import Trained
from jaxtrain.compress import quantize
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Batch, Model, State, split_extra
from jaxtrain.data import Source, compose
from jaxtrain.data.checked import CheckedSource
from jaxtrain.experiment import Experiment
from jaxtrain.models import as_model, compute_in
from jaxtrain.models.plain_operators import plain_operators
from jaxtrain.monitor import merge_all
from jaxtrain.program.loader import EXAMPLE_ID
from jaxtrain.step import make_eval_step
from jaxtrain.step.factories import eval_state

BATCH = 64
"""Examples in a batch of calibration and of evaluation."""

SEED = 0
PRODUCTS = ["Conv", "Gemm", "MatMul"]


def quantize_trained(trained: Trained, examples: int) -> Trained:
    """Return ``trained`` with its model in int8 (``jaxtrain.compress.quantize``).

    Args:
      trained: the model.
      examples: how many training examples, drawn with a fixed seed, to measure activations on.

    Raises:
      InputError: as ``quantize``.
    """
    experiment = trained.experiment
    model = compute_in(as_model(experiment.model), experiment.precision)
    params, extra = eval_state(trained.state)
    weights = {"params": params, "statistics": split_extra(extra)[0]}
    prepare = compose(*experiment.preprocess)

    def apply(weights: Any, batch: Batch) -> Any:
        with plain_operators():
            return model.apply(weights["params"], weights["statistics"], batch, train=False, key=None)[0]

    batches = _calibration(experiment, examples)
    quantized = quantize(apply, weights, (prepare(batch, None) for batch in batches))

    def apply_int8(params: Any, extra: Any, batch: Batch, *, train: bool, key: Any) -> tuple[Any, Any]:
        return quantized.apply(params, batch), extra

    state = State(trained.state.step, quantized.weights, {}, ())
    exported = dataclasses.replace(
        experiment, model=Model(model.init, apply_int8), precision="float32", post_update=()
    )
    return Trained.of(exported, state, trained.examples, trained.about, quantized=True)


def metrics_on_test_set(trained: Trained) -> dict[str, Any]:
    """Return the loss's metrics of a model on its test set, each example once."""
    experiment = trained.experiment
    model = compute_in(as_model(experiment.model), experiment.precision)
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
      model: an ``onnx.ModelProto`` of ``trained``.
      trained: for its training set.
      examples: as for ``quantize_trained``.

    Raises:
      InputError: onnxruntime is missing, or it cannot quantize the model.
    """
    try:
        import onnx
        from onnxruntime import quantization
    except ImportError as error:
        raise InputError("int8 in ONNX needs onnxruntime: pip install 'jaxtrain[onnx]'") from error
    inputs = trained.serving.inputs
    batches = _calibration(trained.experiment, examples)

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
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "OpTypesToExcludeOutputQuantization": PRODUCTS,
                },
            )
        except Exception as error:  # any of its own
            raise InputError(f"onnxruntime cannot quantize this model: {first_line(error)[:200]}") from error
        finally:
            logging.getLogger().removeFilter(_not_pre_processed)
        return onnx.load(after)


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
