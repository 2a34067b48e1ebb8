"""``export --format``: StableHLO, safetensors and ONNX files hold what the model computes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from artifact_cases import make_trained

from jaxtrain import InputError
from jaxtrain.artifact import engines, tensors
from jaxtrain.cli import predict
from jaxtrain.export import write
from jaxtrain.export.trained import Trained, model_outputs
from jaxtrain.step.factories import eval_state


@pytest.fixture(scope="module")
def trained() -> Trained:
    return make_trained(tiny.EXPERIMENT)


def test_safetensors_holds_the_weights_of_evaluation(trained, tmp_path):
    path = tmp_path / "weights.safetensors"
    assert "equal to the model's" in write.write("safetensors", path, trained)
    params, extra = eval_state(trained.state)
    read = pytest.importorskip("safetensors.numpy").load_file(path)
    np.testing.assert_array_equal(read["params/head/kernel"], params["head"]["kernel"])
    assert {name.partition("/")[0] for name in read} == {"params", "batch_stats"} and "ema" in extra
    assert sum(array.size for array in read.values()) == sum(
        leaf.size for leaf in jax.tree.leaves((params, extra["batch_stats"]))
    )


def test_stablehlo_is_a_portable_program_without_calls(trained, tmp_path):
    """The bytecode is read by MLIR itself, as another consumer would."""
    path = tmp_path / "model.mlirbc"
    assert "largest difference" in write.write("stablehlo", path, trained)
    from jax._src.interpreters.mlir import make_ir_context
    from jaxlib.mlir.dialects import stablehlo

    with make_ir_context() as context:
        text = str(stablehlo.deserialize_portable_artifact(context, path.read_bytes()))
    assert "custom_call" not in text and "tensor<1x8x8x1xui8>" in text


@pytest.fixture
def onnx_file(trained: Trained, tmp_path: Path) -> Path:
    if not importlib.util.find_spec("jaxtrain.artifact.onnx"):
        pytest.skip("this version has no ONNX converter")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    assert "largest difference" in write.write("onnx", path, trained)
    return path


def test_onnx_is_predicted_with_its_labels_and_checks(trained, onnx_file, tmp_path, capsys):
    image = np.asarray(trained.examples["image"])
    expected = model_outputs(trained)
    np.save(tmp_path / "in.npy", image)
    assert predict.main(["--model", str(onnx_file), str(tmp_path / "in.npy"), "--batch", "4"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == expected["label"].tolist()
    np.testing.assert_allclose(
        [row["probability"] for row in rows], expected["probability"].max(-1), rtol=1e-4, atol=1e-6
    )
    model = engines.OnnxModel(onnx_file)
    with pytest.raises(InputError, match="image must be uint8"):
        model(image.astype(np.float32))


def test_an_onnx_file_of_another_program_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match="onnxruntime cannot read it") as error:
        engines.OnnxModel(tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="there is no such file"):
        engines.OnnxModel(tmp_path / "absent.onnx")


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'jaxtrain\[onnx\]'"):
        engines.OnnxModel(tmp_path / "model.onnx")


def test_arrays_that_are_read_back_wrong_are_noticed(trained, tmp_path, monkeypatch):
    real: Any = tensors.decode
    monkeypatch.setattr(tensors, "decode", lambda *args: {k: v[..., ::-1] for k, v in real(*args).items()})
    with pytest.raises(RuntimeError, match="has other arrays than the model"):
        write.write("safetensors", tmp_path / "weights", trained)
    assert not list(tmp_path.iterdir())
