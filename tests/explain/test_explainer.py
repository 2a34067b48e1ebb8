"""Trained models: attributions are complete, and every method finds a planted patch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxtrain import data, losses, models, optim
from jaxtrain.artifact.examples import Example
from jaxtrain.core.errors import InputError
from jaxtrain.data import compose
from jaxtrain.experiment import Experiment
from jaxtrain.explain.explainer import Explainer, Settings
from jaxtrain.explain.forward import Forward
from jaxtrain.models.layer_outputs import edit_layers, list_layers
from jaxtrain.step import make_init, make_train_step

SIDE, PATCH = 16, 4


def patches(n: int, seed: int) -> dict[str, np.ndarray]:
    """Images of noise with one bright patch at a random place; its stripes are the class."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n).astype(np.int32)
    place = rng.integers(0, SIDE // PATCH, (n, 2))
    image = rng.integers(0, 60, (n, SIDE, SIDE, 1)).astype(np.uint8)
    stripes = np.zeros((PATCH, PATCH), np.uint8)
    stripes[::2] = 190
    for k, (row, column) in enumerate(PATCH * place):
        pattern = stripes if label[k] else stripes.T
        image[k, row : row + PATCH, column : column + PATCH, 0] += pattern
    return {"image": image, "label": label, "place": place.astype(np.int32)}


MODELS: dict[str, Any] = {
    "cnn": models.CNN(widths=(8, 16), convs=1, classes=2),
    "mlp": models.MLP(widths=(32,), classes=2),
    "vit": models.ViT(patch=PATCH, width=16, depth=1, heads=2, classes=2),
}
STEPS = {"cnn": 100, "mlp": 200, "vit": 150}
FULL = pytest.mark.full("[cnn-grad_cam]")  # training the ViT takes ten seconds


def experiment(name: str) -> Experiment:
    return Experiment(
        model=MODELS[name],
        train=data.Arrays(patches(1024, 0)),
        test=data.Arrays(patches(64, 1)),
        loss=losses.CrossEntropy(),
        optimizer=optim.Adam(lr=1e-2),
        preprocess=(data.Normalise(),),
        batch=128,
        epochs=1,
    )


@functools.cache
def trained(name: str, steps: int | None = None) -> Forward:
    exp = experiment(name)
    prepare, tx = compose(*exp.preprocess), optax.adam(5e-3)
    train = exp.train.gather(np.arange(1024))
    state = jax.jit(make_init(exp.model, tx, prepare))(
        jax.random.key(0), {k: v[:2] for k, v in train.items()}
    )
    step = jax.jit(make_train_step(exp.model, exp.loss, tx, prepare))
    for k in range(STEPS[name] if steps is None else steps):
        ids = np.arange(128 * k, 128 * (k + 1)) % 1024
        state, _ = step(state, {name: x[ids] for name, x in train.items()}, jax.random.key(1))
    about = {"name": name, "step": STEPS[name], "metrics": {}, "config": {}}
    return Forward(exp, state, exp.test.gather(np.arange(4)), about)


def explain(name: str, count: int, **settings: Any) -> list[Any]:
    explainer, test = Explainer(trained(name), Settings(**settings)), patches(64, 1)
    return [explainer.explain(Example(k, {"image": test["image"][k]})) for k in range(count)]


@pytest.mark.parametrize(
    "name, method",
    [
        ("cnn", "integrated_gradients"),
        ("cnn", "smoothgrad"),
        ("cnn", "grad_cam"),
        ("mlp", "integrated_gradients"),
        pytest.param("vit", "integrated_gradients", marks=FULL),
        pytest.param("vit", "rollout", marks=FULL),
    ],
)
def test_the_largest_attribution_is_in_the_planted_patch(name: str, method: str) -> None:
    test, found = patches(64, 1), 0
    explained = explain(name, 12, methods=(method,))
    right = [k for k, one in enumerate(explained) if one.prediction == test["label"][k]]
    assert len(right) >= 10  # it has learnt the task
    for k in right:
        values = explained[k].maps[method]
        at = np.array(np.unravel_index(values.argmax(), values.shape)) * SIDE // values.shape[0]
        found += bool((at // PATCH == test["place"][k]).all())
    assert found == len(right), f"{found} of {len(right)}"


@pytest.mark.parametrize("name", ["cnn", "mlp", pytest.param("vit", marks=pytest.mark.full("[cnn]"))])
def test_integrated_gradients_are_complete_within_one_percent(name: str) -> None:
    for one in explain(name, 6, methods=("integrated_gradients",)):
        assert one.error < 0.01
        total = one.maps["integrated_gradients"].sum()
        assert total == pytest.approx(one.value - one.baseline, rel=0.01)


def test_the_value_is_the_models_logit_and_the_baseline_that_of_a_black_image() -> None:
    forward, test = trained("cnn"), patches(64, 1)
    params, extra = forward.weights
    one = explain("cnn", 1, methods=("grad_cam",), target="1")[0]
    for image, value in ((test["image"][:1], one.value), (0 * test["image"][:1], one.baseline)):
        batch = data.Normalise()({"image": image}, None)
        logits = MODELS["cnn"].apply({"params": params, **extra}, batch["image"])
        assert value == pytest.approx(float(logits[0, 1]), rel=1e-4)
    assert one.target == 1


def test_rollout_of_the_vit_is_numpy_from_its_weights() -> None:
    forward, test = trained("vit", 0), patches(64, 1)
    batch = forward.prepare({"image": test["image"][:1]})
    rollout = np.eye(16)
    for layer in forward.attention_weights(forward.weights, batch):
        rollout = (np.asarray(layer, np.float64).mean(0) + np.eye(16)) / 2 @ rollout
    explainer = Explainer(forward, Settings(methods=("rollout",)))
    found = explainer.explain(Example(0, {"image": test["image"][0]})).maps["rollout"]
    np.testing.assert_allclose(found, rollout.mean(0).reshape(4, 4), rtol=1e-4)


def test_methods_are_chosen_by_the_model() -> None:
    assert Explainer(trained("cnn"), Settings()).methods == ("integrated_gradients", "smoothgrad", "grad_cam")
    assert Explainer(trained("vit", 0), Settings()).methods == (
        "integrated_gradients",
        "smoothgrad",
        "rollout",
    )
    assert Explainer(trained("mlp"), Settings()).methods == ("integrated_gradients", "smoothgrad")
    assert Explainer(trained("cnn"), Settings()).layer == "stage1_conv0_norm"


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("mlp", {"methods": ("grad_cam",)}, "no Flax layer with feature maps"),
        ("cnn", {"methods": ("rollout",)}, "does not use jaxtrain.models.attention.attend"),
        ("cnn", {"methods": ("grad_cam",), "layer": "stage0_conv1"}, "did you mean stage0_conv0"),
        ("cnn", {"methods": ("smoothgrad",), "layer": "head"}, "for --method grad_cam"),
        ("cnn", {"target": "2"}, "a number from 0 to 1"),
        ("cnn", {"target": "-1"}, "a number from 0 to 1"),
        ("cnn", {"steps": 0}, "give 1 to 100,000"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Explainer(trained(name), Settings(**settings))


def test_layers_are_listed_once_and_edits_change_only_theirs() -> None:
    net = MODELS["cnn"]
    image = np.ones((1, SIDE, SIDE, 1), np.float32)
    variables = net.init(jax.random.key(0), image)
    paths = [layer.path for layer in list_layers(net.apply, variables, image)]
    assert paths == [
        *("stage0_conv0", "stage0_conv0_norm", "stage1_conv0", "stage1_conv0_norm", "Dropout_0", "head")
    ]
    with edit_layers({"stage1_conv0": lambda x: 0 * x}):
        changed = net.apply(variables, image)
    np.testing.assert_allclose(changed, np.zeros((1, 2)), atol=1e-6)
    assert np.abs(net.apply(variables, image)).max() > 1e-3


def test_models_with_several_inputs_or_predictions_are_refused() -> None:
    exp = dataclasses.replace(experiment("cnn"), model=(lambda key, batch: ({}, {}), _two_inputs))
    examples = exp.test.gather(np.arange(2))
    state = jax.jit(make_init(exp.model, optax.sgd(0.1)))(jax.random.key(0), examples)
    with pytest.raises(InputError, match="the model reads image, place"):
        Forward(exp, state, examples, {"name": "x", "step": 0, "metrics": {}, "config": {}})


def _two_inputs(params: Any, extra: Any, batch: Any, *, train: bool, key: Any) -> Any:
    return batch["image"].mean((1, 2)) + batch["place"].astype("float32"), extra


@pytest.mark.full("tests/explain/test_explainer.py::test_rollout_of_the_vit_is_numpy_from_its_weights")
def test_a_decoder_is_explained_at_the_last_token_of_the_text() -> None:
    tokens = np.random.default_rng(0).integers(0, 20, (8, 12)).astype(np.uint8)
    fields = data.Arrays({"tokens": tokens, "label": tokens.astype(np.int32)})
    exp = Experiment(
        model=models.GPT(vocab=20, context=12, width=16, depth=2, heads=2, dropout=0.0),
        train=fields,
        test=fields,
        loss=losses.CrossEntropy(task="language_model"),
        optimizer=optim.Adam(lr=1e-2),
        batch=8,
        epochs=1,
    )
    state = jax.jit(make_init(exp.model, optax.sgd(0.1)))(jax.random.key(0), fields.gather(np.arange(2)))
    about = {"name": "gpt", "step": 0, "metrics": {}, "config": {}}
    forward = Forward(exp, state, fields.gather(np.arange(2)), about)
    explainer = Explainer(forward, Settings(steps=96))
    assert explainer.methods == ("integrated_gradients", "rollout")
    one = explainer.explain(Example(0, {"tokens": tokens[0]}, tokens=7))
    logits = exp.model.apply({"params": state.params}, tokens[:1, :7])[0, -1]
    assert one.prediction == one.target == int(logits.argmax())
    assert one.value == pytest.approx(float(logits.max()), rel=1e-4)
    assert {name: x.shape for name, x in one.maps.items()} == dict.fromkeys(explainer.methods, (7,))
    assert one.error < 0.01
    batch = forward.prepare({"tokens": tokens[:1]})
    rollout = np.eye(12)
    for layer in forward.attention_weights(forward.weights, batch):
        rollout = (np.asarray(layer, np.float64).mean(0) + np.eye(12)) / 2 @ rollout
    np.testing.assert_allclose(one.maps["rollout"], rollout[6, :7], rtol=1e-4)
    assert one.maps["rollout"].sum() == pytest.approx(1, rel=1e-5)  # nothing attends to later tokens


def test_segmentation_is_refused() -> None:
    image = np.zeros((4, 8, 8, 3), np.float32)
    fields = data.Arrays({"image": image, "label": np.zeros((4, 8, 8), np.int32)})
    exp = dataclasses.replace(
        experiment("cnn"),
        model=models.UNet(widths=(4, 4), classes=3),
        train=fields,
        test=fields,
        loss=losses.CrossEntropy(task="segmentation"),
        preprocess=(),
    )
    examples = fields.gather(np.arange(2))
    state = jax.jit(make_init(exp.model, optax.sgd(0.1)))(jax.random.key(0), examples)
    with pytest.raises(InputError, match="and explain takes models with one"):
        Forward(exp, state, examples, {"name": "x", "step": 0, "metrics": {}, "config": {}})
