"""``export --quantize int8``: smaller files of the same model, as artifacts and in ONNX."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from artifact_cases import make_trained

from jaxtrain import artifact
from jaxtrain.cli import export, run
from jaxtrain.compress import quantize
from jaxtrain.export import quantized, write
from jaxtrain.export.trained import Trained, model_outputs


@pytest.fixture(scope="module")
def trained() -> Trained:
    return make_trained(tiny.EXPERIMENT)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_an_artifact_in_int8_is_the_model_but_for_rounding(trained, tmp_path):
    int8 = quantized.quantize_trained(trained, examples=64)
    path = tmp_path / "int8"
    write.write("jaxtrain", path, int8)
    model = artifact.load(path)
    outputs = model({name: trained.examples[name] for name in trained.serving.inputs})
    assert 0 < relative(outputs["logits"], model_outputs(trained)["logits"]) < 0.1
    kernels = {name: x for name, x in int8.serving.weights.items() if name.endswith("/kernel")}
    assert kernels and all(x.dtype == np.int8 for x in kernels.values())
    floats = write.write("jaxtrain", tmp_path / "float32", trained)
    assert "largest difference" in floats
    before = [x for name, x in trained.serving.weights.items() if name.endswith("/kernel")]
    assert 4 * sum(x.nbytes for x in kernels.values()) == sum(np.asarray(x).nbytes for x in before)


@pytest.mark.full("tests/artifact/test_quantized.py::test_an_artifact_in_int8_is_the_model_but_for_rounding")
def test_metrics_are_those_of_every_test_example(trained):
    source = tiny.EXPERIMENT.test
    all_rows = source.gather(np.arange(len(source)))
    logits = np.asarray(trained.serving.apply(trained.serving.weights, all_rows)["logits"])
    found = quantized.metrics_on_test_set(trained)
    assert found["accuracy"] == pytest.approx(np.mean(logits.argmax(-1) == all_rows["label"]))


def test_the_same_training_examples_are_drawn_again(trained):
    first, second = (quantized.quantize_trained(trained, 8).serving.weights for _ in range(2))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    scales = [name for name in first if name.endswith("/input_scale")]
    more = quantized.quantize_trained(trained, 64).serving.weights
    assert all(more[name] >= first[name] or np.isclose(more[name], first[name], rtol=0.5) for name in scales)
    assert any(more[name] != first[name] for name in scales)


def test_pruned_weights_stay_zero():
    kernel = np.where(np.arange(64).reshape(8, 8) % 3 == 0, 0, np.linspace(-1, 1, 64).reshape(8, 8))
    batch = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    model = quantize(lambda w, x: x @ w, kernel.astype(np.float32), [batch])
    np.testing.assert_array_equal(model.weights["int8/0000/kernel"][kernel == 0], 0)


@pytest.mark.full("tests/artifact/test_quantized.py::test_an_artifact_in_int8_is_the_model_but_for_rounding")
def test_onnx_in_int8(trained, tmp_path):
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    write.write("onnx", tmp_path / "float32.onnx", trained)
    write.write("onnx", tmp_path / "int8.onnx", trained, calibrate=64)
    from jaxtrain.artifact.engines import OnnxModel

    inputs = {name: np.asarray(trained.examples[name]) for name in trained.serving.inputs}
    found, expected = (OnnxModel(tmp_path / f"{name}.onnx")(inputs) for name in ("int8", "float32"))
    assert 0 < relative(found["logits"], expected["logits"]) < 0.1
    assert not OnnxModel(tmp_path / "int8.onnx").manifest.metrics  # those recorded are of float32
    graph = onnx.load(tmp_path / "int8.onnx").graph
    products = [node for node in graph.node if node.op_type in quantized.PRODUCTS]
    makers = {name: node.op_type for node in graph.node for name in node.output}
    assert products and all(
        {makers[name] for name in node.input[:2]} == {"DequantizeLinear"} for node in products
    )


@pytest.mark.full("tests/artifact/test_quantized.py::test_an_artifact_in_int8_is_the_model_but_for_rounding")
def test_the_command_prints_what_int8_costs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run.main(["--experiment", tiny.__file__, "--workdir", "run"]) == 0
    capsys.readouterr()
    words = ["--workdir", "run", "--quantize", "int8", "--calibrate", "32", "--out", "int8.jaxtrain"]
    words += ["--experiment", tiny.__file__]
    assert export.main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "int8, ranges of 32 training examples; test: accuracy" in out and "weights" in out
    metrics = artifact.load("int8.jaxtrain").manifest.metrics["test"]
    text = json.loads((tmp_path / "run" / "result.json").read_text())
    assert metrics["loss"] != text["test"]["loss"] and metrics["loss"] == pytest.approx(
        text["test"]["loss"], 0.2
    )


def test_bad_input(tmp_path, capsys):
    words = ["--workdir", str(tmp_path), "--quantize", "int8", "--calibrate", "0", "--out", "x"]
    assert export.main(words) == 2
    assert "--calibrate 0: give at least 1" in capsys.readouterr().err
