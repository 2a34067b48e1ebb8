"""Every shipped experiment, smaller, as an artifact: it runs with JAX alone and gives the model's outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_cases import RUNS_ALONE, make_trained
from conftest import ROOT

from jaxtrain import artifact, data
from jaxtrain.artifact import bench
from jaxtrain.experiment import Experiment, find
from jaxtrain.export import write

RNG = np.random.default_rng(5)
ROWS = 6


def images(side: int, channels: int = 3, classes: int = 10, pixels: bool = False) -> dict[str, np.ndarray]:
    shape = (ROWS, side, side) if pixels else (ROWS,)
    return {
        "image": RNG.integers(0, 256, (ROWS, side, side, channels), np.uint8),
        "label": RNG.integers(0, classes, shape).astype(np.int32),
    }


def numbers(high: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, high, (ROWS, *shape)).astype(np.int32)


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=(ROWS, *shape)).astype(np.float32)


TEXT = {"tokens": numbers(300, 12), "length": 1 + numbers(12), "label": numbers(2)}
BYTES = {"tokens": numbers(128, 16).astype(np.uint8), "label": numbers(128, 16)}
RATINGS = {"user": numbers(9), "item": numbers(7), "target": floats()}
SMALL: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
    "cifar_airbench94": ({"net": {"widths": (8, 8, 8)}}, images(32)),
    "cifar_cnn": ({"widths": (8, 16)}, images(32)),
    "cifar_ddp_net": ({"widths": (8, 8)}, images(32)),
    "cifar_lenet": ({}, images(32)),
    "cifar_resnet18": ({"width": 8, "stages": (1, 1, 1, 1)}, images(32)),
    "cifar_small_cnn": ({"widths": (8, 8)}, images(32)),
    "digits_cnn": ({"widths": (8, 8)}, images(8, 1)),
    "imagenet_resnet50": ({"width": 8, "stages": (1, 1, 1, 1), "classes": 10}, images(64)),
    "imagenet_vit_s16": ({"width": 16, "depth": 2, "heads": 2, "classes": 10}, images(32)),
    "mnist_dropout_cnn": ({}, images(28, 1)),
    "mnist_keras_cnn": ({"widths": (8, 8)}, images(28, 1)),
    "pets_unet": ({"widths": (8, 16)}, images(32, classes=3, pixels=True)),
    "ratings_factors": ({"users": 9, "items": 7, "width": 4}, RATINGS),
    "sentiment_lstm": ({"vocab": 300, "width": 8, "embedding": 8}, TEXT),
    "series_gru": ({"width": 8}, {"series": floats(96, 7), "target": floats(24, 7)}),
    "shakespeare_gpt": ({"vocab": 128, "context": 16, "width": 16, "depth": 1, "heads": 2}, BYTES),
}
OUTPUTS = {
    "pets_unet": {"logits": "float32 [batch, 32, 32, 3]", "label": "int32 [batch, 32, 32]"},
    "ratings_factors": {"value": "float32 [batch]"},
    "series_gru": {"value": "float32 [batch, 24, 7]"},
    "shakespeare_gpt": {"logits": "float32 [batch, length, 128]"},
    "sentiment_lstm": {"logits": "float32 [batch, 2]", "label": "int32 [batch]"},
}


def replace(module: Any, changes: dict[str, Any]) -> Any:
    """Change fields of a module; a dict changes those of a module in it."""
    new = {k: replace(getattr(module, k), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return module.clone(**new)


def small(name: str) -> Experiment:
    """The shipped experiment with a small model on random examples."""
    changes, fields = SMALL[name]
    experiment, _ = find(str(ROOT / "experiments" / f"{name}.py")).load()
    source = data.Arrays(fields)
    return dataclasses.replace(
        experiment, model=replace(experiment.model, changes), train=source, test=source, valid=None, holdout=0
    )


def test_every_shipped_experiment_is_in_the_table():
    assert sorted(SMALL) == sorted(path.stem for path in (ROOT / "experiments").glob("[!_]*.py"))


@pytest.mark.full("[digits_cnn]")
@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_artifact_of_a_family(name: str, python: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.jaxtrain"
    line = write.write("jaxtrain", path, make_trained(small(name)))  # compares the outputs
    assert line.startswith("checked on 6 test examples")
    model = artifact.load(path)
    fields = SMALL[name][1]
    wanted = OUTPUTS.get(name, {"logits": "float32 [batch, 10]", "label": "int32 [batch]"})
    found = {output: spec.text for output, spec in model.manifest.outputs.items()}
    assert wanted.items() <= found.items(), found
    assert set(model.manifest.inputs) == set(fields) - {"label", "target"}
    assert b".py" not in path.read_bytes()
    assert model(bench.random_inputs(model.manifest, 2))


@pytest.mark.full("tests/artifact/test_artifact.py::test_it_runs_with_jax_alone_on_another_number_of_devices")
@pytest.mark.parametrize("name", ["cifar_airbench94", "imagenet_vit_s16", "sentiment_lstm"])
def test_families_run_with_jax_alone(name: str, python: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.jaxtrain"
    write.write("jaxtrain", path, make_trained(small(name)))
    model = artifact.load(path)
    batch = bench.random_inputs(model.manifest, 3)
    np.save(tmp_path / "in.npy", np.array(batch, object), allow_pickle=True)
    script = RUNS_ALONE.replace("np.load(sys.argv[2])", "np.load(sys.argv[2], allow_pickle=True)[()]")
    done = python("-c", script, path, tmp_path / "in.npy", tmp_path / "out.npy", devices=3)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), np.asarray(model(batch)["logits"]))


@pytest.mark.full("tests/artifact/test_families.py::test_ids_beyond_the_tables_of_a_model_are_refused")
def test_a_language_model_takes_any_length_up_to_its_context_and_only_its_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "model.jaxtrain"
    write.write("jaxtrain", path, make_trained(small("shakespeare_gpt")))
    model = artifact.load(path)
    tokens = BYTES["tokens"]
    full, short = model(tokens)["logits"], model(tokens[:2, :5])["logits"]
    np.testing.assert_allclose(short, full[:2, :5], rtol=1e-4, atol=1e-5)  # the model is causal
    assert model.manifest.inputs["tokens"].maximum == 127 and model.manifest.sizes == {"length": 16}
    with pytest.raises(ValueError, match="length is from 1 to 16"):
        model(np.zeros((1, 17), np.uint8))
    with pytest.raises(ValueError, match="tokens has values from 128 to 128: the model takes 0 to 127"):
        model(np.full((1, 3), 128, np.uint8))


def test_ids_beyond_the_tables_of_a_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.jaxtrain"
    write.write("jaxtrain", path, make_trained(small("ratings_factors")))
    model = artifact.load(path)
    assert (model.manifest.inputs["user"].maximum, model.manifest.inputs["item"].maximum) == (8, 6)
    with pytest.raises(ValueError, match="item has values from 7 to 7: the model takes 0 to 6"):
        model({"user": np.int32([0]), "item": np.int32([7])})
    with pytest.raises(ValueError, match="takes a dict of the arrays"):
        model(np.int32([0]))
