"""jaxtrain.models.airbench: the network against NumPy, whitening, test-time views, steps of the recipe."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import sharding
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import State
from jaxtrain.losses import CrossEntropy
from jaxtrain.models import CNN, as_model
from jaxtrain.models.airbench import (
    Airbench,
    TestTimeViews,
    Whiten,
    identity_init,
    patch_covariance,
    uniform_init,
)
from jaxtrain.optim import EMA, SGD, Group, Lookahead, OneCycle
from jaxtrain.step import make_eval_step, make_init, make_train_step

pytestmark = pytest.mark.full("tests/models/test_models.py")

KEY = jax.random.key(1)
SMALL = Airbench(widths=(4,), convs=1, classes=3)


def images(n: int = 8, side: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return images with correlated neighbouring pixels and channels, as in photographs."""
    noise = np.random.default_rng(seed).normal(size=(n, side + 1, side + 1, channels + 1))
    pixels = noise[:, 1:, 1:] + noise[:, :-1, 1:] + noise[:, 1:, :-1] + 0.3
    return np.array(pixels[..., 1:] + pixels[..., :-1], np.float32)


def random_state(module: Any, batch: Any) -> Any:
    """Return random params and statistics of the model's shapes, without compiling an initialisation."""
    rng = np.random.default_rng(1)
    params, extra = jax.eval_shape(as_model(module).init, KEY, batch)
    filled = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), params)
    return filled, jax.tree.map(lambda x: rng.uniform(0.5, 2, x.shape).astype(x.dtype), extra)


def apply(module: Any, params: Any, extra: Any, image: Any, train: bool = False) -> Any:
    run = jax.jit(functools.partial(as_model(module).apply, train=train))
    return run(params, extra, {"image": image}, key=KEY)


# --- the network


def conv(x: np.ndarray, kernel: np.ndarray, pad: int) -> np.ndarray:
    height, width = kernel.shape[:2]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    parts = [x[:, i : i + rows, j : j + columns] @ kernel[i, j] for i in range(height) for j in range(width)]
    return np.sum(parts, axis=0)


def pool(x: np.ndarray, size: int) -> np.ndarray:
    rows, columns = x.shape[1] // size, x.shape[2] // size
    parts = [
        x[:, i : rows * size : size, j : columns * size : size] for i in range(size) for j in range(size)
    ]
    return np.max(parts, axis=0)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def by_hand(net: Airbench, params: Any, stats: Any, image: np.ndarray, train: bool) -> tuple[Any, Any]:
    """Return logits and new running statistics, in float64."""
    moved = {}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        old, m = stats[name], net.bn_momentum
        moved[name] = {k: m * old[k] + (1 - m) * v for k, v in (("mean", mean), ("var", var))}
        if not train:
            mean, var = old["mean"], old["var"]
        return (x - mean) / np.sqrt(var + 1e-12) + params[name]["bias"]

    x = gelu(conv(image.astype(np.float64), params["whiten"]["kernel"], 0) + params["whiten"]["bias"])
    for group in range(len(net.widths)):
        outs: list[np.ndarray] = []
        for number in range(net.convs):
            x = conv(x, params[f"group{group}_conv{number}"]["kernel"], 1)
            x = norm(pool(x, 2) if number == 0 else x, f"group{group}_norm{number}")
            if net.residual and number == net.convs - 1:
                x = x + outs[0]
            x = gelu(x)
            outs.append(x)
    x = pool(x, 3).reshape(len(x), -1)
    return x @ params["head"]["kernel"] * net.scale, moved


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "net",
    [Airbench((4, 5), classes=3), Airbench((4, 5), convs=3, classes=3, residual=True, whiten=6, scale=2.0)],
    ids=["94", "96"],
)
def test_network_equals_its_definition(net: Airbench, train: bool) -> None:
    image = images(side=14)
    params, extra = random_state(net, {"image": image})
    found, after = apply(net, params, extra, image, train)
    wanted, moved = by_hand(net, params, extra["batch_stats"], image, train)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(
        after["batch_stats"], moved if train else extra["batch_stats"], rtol=1e-3, atol=1e-4
    )


def test_sizes_parameters_and_statistics_are_those_of_the_recipe() -> None:
    image = jnp.zeros((2, 32, 32, 3))
    params, extra = jax.eval_shape(as_model(Airbench()).init, KEY, {"image": image})
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    groups = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256) + 2 * (64 + 256 + 256)
    assert count == 2 * 2 * 3 * 24 + 24 + groups + 256 * 10 == 1_971_640
    assert all(set(leaves) == {"bias"} for name, leaves in params.items() if "norm" in name)
    assert set(params["head"]) == {"kernel"} and params["head"]["kernel"].shape == (256, 10)
    seen = jax.eval_shape(
        lambda p, e: Airbench().apply({"params": p, **e}, image, capture_intermediates=True)[1], params, extra
    )["intermediates"]
    sides = {name: value["__call__"][0].shape[1] for name, value in seen.items() if name not in ("__call__")}
    assert [sides["whiten"], *(sides[f"group{g}_norm{c}"] for g in range(3) for c in range(2))] == [
        31, 15, 15, 7, 7, 3, 3
    ]  # fmt: skip
    deeper = jax.eval_shape(as_model(Airbench(convs=3)).init, KEY, {"image": image})[0]
    assert len(deeper) == len(params) + 6


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 24, 32, 3), "too small: .* Airbench needs at least 25 pixels"),
        ((2, 3, 32, 32), "NCHW"),
        ((32, 32, 3), "Airbench takes"),
    ],
)
def test_image_that_does_not_fit_is_refused(shape: Any, message: str) -> None:
    for net in (Airbench(), TestTimeViews(Airbench())):
        with pytest.raises(InputError, match=message):
            jax.eval_shape(as_model(net).init, KEY, {"image": jnp.zeros(shape)})
    assert jax.eval_shape(as_model(Airbench()).init, KEY, {"image": jnp.zeros((1, 25, 25, 3))})


@pytest.mark.parametrize("wrong", [{"widths": ()}, {"widths": (4, 0)}, {"convs": 0}, {"whiten": 0}])
def test_sizes_below_one_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="all must be at least 1"):
        jax.eval_shape(as_model(SMALL.clone(**wrong)).init, KEY, {"image": images()})


@pytest.mark.parametrize("shape", [(3, 3, 4, 9), (3, 3, 4, 4), (3, 3, 9, 4)])
def test_convolutions_start_as_the_identity_and_uniform_beyond(shape: Any) -> None:
    kernel = np.asarray(identity_init(KEY, shape))
    inputs, outputs = shape[2:]
    image = images(2, channels=inputs)
    same = min(inputs, outputs)
    np.testing.assert_allclose(conv(image, kernel, 1)[..., :same], image[..., :same], rtol=1e-6)
    rest, bound = kernel[..., same:], (9 * inputs) ** -0.5
    assert rest.size == 9 * inputs * (outputs - same) and np.all(np.abs(rest) <= bound)
    if rest.size:
        assert np.abs(rest).max() > 0.9 * bound and np.std(rest) == pytest.approx(bound / 3**0.5, rel=0.15)


def test_parameters_start_as_in_the_recipe() -> None:
    params = jax.jit(as_model(SMALL.clone(widths=(4, 30), convs=2)).init)(KEY, {"image": images(1, 14)})[0]
    assert not params["whiten"]["bias"].any()
    assert not any(leaves["bias"].any() for name, leaves in params.items() if "norm" in name)
    head = params["head"]["kernel"]
    assert 0.8 * 30**-0.5 < np.abs(head).max() <= 30**-0.5
    for number, same in ((0, 4), (1, 30)):
        kernel = params[f"group1_conv{number}"]["kernel"]
        np.testing.assert_array_equal(kernel[1, 1, :, :same], np.eye(same))
        assert np.count_nonzero(kernel[..., :same]) == same and np.all(kernel[..., same:] != 0)
    # The numbers do not hang on the flat shape in which they are drawn.
    wanted = jax.random.uniform(KEY, (4, 9), jnp.float32, -0.5, 0.5)
    np.testing.assert_array_equal(uniform_init(KEY, (4, 9)), wanted)


@pytest.mark.parametrize("train", [True, False])
def test_activations_are_bfloat16_and_statistics_float32(train: bool) -> None:
    image = images()
    params, extra = random_state(SMALL, {"image": image})
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    found, after = apply(SMALL, low, extra, jnp.asarray(image, jnp.bfloat16), train)
    assert found.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
    wanted, moved = apply(SMALL, params, extra, image, train)
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=0.1, atol=0.1)
    chex.assert_trees_all_close(after, moved, rtol=0.05, atol=0.05)


def test_gradient_of_a_sharded_batch_is_that_of_one_device(mesh1: Any, mesh8: Any) -> None:
    """The last pool follows a fused BatchNorm and GELU, which XLA may compute twice and round differently."""
    image = images(64)
    batch = {"image": image, "label": (image[..., 0].mean((1, 2)) > image[..., 0].mean()).astype(np.int32)}
    state = jax.device_get(jax.jit(make_init(SMALL, SGD(0.1).build(), data_init=Whiten(64)))(KEY, batch))

    def total(params: Any, extra: Any, batch: Any) -> Any:
        outputs, _ = as_model(SMALL).apply(params, extra, batch, train=True, key=KEY)
        return CrossEntropy(smoothing=0.2)(outputs, batch)[0]

    def on(mesh: Any) -> Any:
        whole, split = sharding.replicated(mesh), sharding.batch_split(mesh)
        gradient = sharding.compile(jax.grad(total), args=(whole, whole, split), out=whole)
        return jax.device_get(gradient(state.params, state.extra, batch))

    chex.assert_trees_all_close(on(mesh1), on(mesh8), rtol=1e-4, atol=1e-5)


def test_slow_weights_of_lookahead_are_not_passed_to_the_model() -> None:
    image = images()
    params, extra = random_state(SMALL, {"image": image})
    # Linen would refuse a number as one of its collections.
    _, after = as_model(SMALL).apply(params, {**extra, "lookahead": 3}, {"image": image}, train=True, key=KEY)
    assert after["lookahead"] == 3


# --- whitening


def test_whitened_outputs_are_decorrelated_with_unit_variance() -> None:
    image = images(64)
    params, _ = random_state(SMALL, {"image": image})
    kernel = np.asarray(jax.jit(Whiten(64, eps=1e-9))(params, {"image": image})["whiten"]["kernel"])
    out = conv(image.astype(np.float64), kernel, 0).reshape(-1, 24)
    np.testing.assert_allclose(out[:, :12].T @ out[:, :12] / len(out), np.eye(12), atol=1e-3)
    np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])


@pytest.mark.parametrize(("eps", "whiten"), [(5e-4, 24), (0.5, 8)])
def test_whitening_filters_are_scaled_eigenvectors_in_descending_order(eps: float, whiten: int) -> None:
    image = images(32)
    params, _ = random_state(SMALL.clone(whiten=whiten), {"image": image})
    new = Whiten(32, eps)(params, {"image": image})
    patches = [image[n, i : i + 2, j : j + 2].ravel() for n in range(32) for i in range(7) for j in range(7)]
    covariance = np.mean([np.outer(p, p) for p in np.array(patches, np.float64)], axis=0)
    np.testing.assert_allclose(patch_covariance(image, 2, 2), covariance, rtol=1e-4, atol=1e-4)
    values, vectors = np.linalg.eigh(covariance)
    assert np.diff(values).min() > 1e-3, "the sample must tell its directions apart"
    half = whiten // 2
    wanted = (vectors / np.sqrt(values + eps))[:, ::-1][:, :half]
    found = np.asarray(new["whiten"]["kernel"]).reshape(12, whiten)
    np.testing.assert_array_equal(found[:, half:], -found[:, :half])
    signs = np.sign(np.sum(found[:, :half] * wanted, axis=0))
    np.testing.assert_allclose(found[:, :half] * signs, wanted, atol=2e-3)
    assert np.all(found[np.abs(found[:, :half]).argmax(0), range(half)] > 0)
    kept = {**new, "whiten": {**new["whiten"], "kernel": params["whiten"]["kernel"]}}
    chex.assert_trees_all_equal(kept, params)


def test_whitening_uses_float32_the_first_examples_and_a_nested_kernel() -> None:
    image = images(16)
    inside, _ = random_state(TestTimeViews(SMALL), {"image": image})
    bare = Whiten(8)(inside["net"], {"image": image[:8]})
    found = Whiten(8)(inside, {"image": image})
    chex.assert_trees_all_equal(found, {"net": bare})
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), inside)
    rounded = Whiten(8)(low, {"image": image})["net"]["whiten"]["kernel"]
    np.testing.assert_array_equal(rounded, bare["whiten"]["kernel"].astype(jnp.bfloat16))
    assert patch_covariance(jnp.asarray(image, jnp.bfloat16), 2, 2).dtype == jnp.float32
    assert not np.allclose(
        Whiten(16)(inside, {"image": image})["net"]["whiten"]["kernel"], found["net"]["whiten"]["kernel"]
    )


def test_whitening_is_the_same_on_eight_devices(mesh1: Any, mesh8: Any) -> None:
    image = images(64)
    params, _ = random_state(SMALL, {"image": image})

    def on(mesh: Any) -> Any:
        whole, split = sharding.replicated(mesh), sharding.batch_split(mesh)
        step = sharding.compile(Whiten(64), args=(whole, split), out=whole)
        return jax.device_get(step(params, {"image": image}))

    chex.assert_trees_all_close(on(mesh1), on(mesh8), rtol=1e-3, atol=1e-3)
    chex.assert_trees_all_equal(on(mesh8), on(mesh8))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (CNN(widths=(4,)), "one convolution named 'whiten'.* are stage0_conv0/kernel, stage0_conv1/kernel"),
        (SMALL.clone(whiten=7), r"\(2, 2, 3, 7\) has 12 whitening .* an even number of at most 24"),
        (SMALL.clone(whiten=26), "at most 24"),
    ],
    ids=["none", "odd", "too many"],
)
def test_whitening_without_a_fitting_kernel_is_refused_in_one_line(module: Any, message: str) -> None:
    image = images()
    params, _ = random_state(module, {"image": image})
    with pytest.raises(InputError, match=message) as raised:
        Whiten()(params, {"image": image})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", [{"examples": 0}, {"eps": 0.0}])
def test_whitening_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Whiten(**wrong)


# --- test-time views


@pytest.mark.parametrize("shift", [1, 2])
def test_evaluation_averages_six_views(shift: int) -> None:
    image = images()
    params, extra = random_state(TestTimeViews(SMALL), {"image": image})
    assert set(params) == {"net"} and set(extra["batch_stats"]) == {"net"}
    stats = {"batch_stats": extra["batch_stats"]["net"]}

    def logits(view: np.ndarray) -> np.ndarray:
        return np.asarray(apply(SMALL, params["net"], stats, view)[0])

    padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
    total = np.zeros((8, 3))
    for view, weight in ((image, 0.5), (padded[:, :8, :8], 0.25), (padded[:, -8:, -8:], 0.25)):
        total += weight * (logits(view) + logits(view[:, :, ::-1])) / 2
    found, after = apply(TestTimeViews(SMALL, shift), params, extra, image)
    np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(after, extra)
    mirrored, _ = apply(TestTimeViews(SMALL, shift), params, extra, image[:, :, ::-1])
    assert not np.allclose(found, mirrored, atol=1e-4), "the diagonals are not mirror images of each other"


def test_training_uses_the_unshifted_image_only() -> None:
    image = images()
    params, extra = random_state(TestTimeViews(SMALL), {"image": image})
    found, after = apply(TestTimeViews(SMALL), params, extra, image, train=True)
    stats = {"batch_stats": extra["batch_stats"]["net"]}
    wanted, moved = apply(SMALL, params["net"], stats, image, train=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(after["batch_stats"]["net"], moved["batch_stats"], rtol=1e-5)


def test_views_of_a_sharded_batch_are_the_same(mesh1: Any, mesh8: Any) -> None:
    net, image = TestTimeViews(SMALL), images(16)
    params, extra = random_state(net, {"image": image})

    def views(params: Any, extra: Any, batch: Any) -> Any:
        return as_model(net).apply(params, extra, batch, train=False, key=None)[0]

    def on(mesh: Any) -> Any:
        whole, split = sharding.replicated(mesh), sharding.batch_split(mesh)
        step = sharding.compile(views, args=(whole, whole, split), out=whole)
        return jax.device_get(step(params, extra, {"image": image}))

    np.testing.assert_allclose(on(mesh1), on(mesh8), rtol=1e-5, atol=1e-6)


def test_views_work_in_bfloat16_and_a_shift_of_zero_is_refused() -> None:
    image = jnp.asarray(images(), jnp.bfloat16)
    params, extra = random_state(TestTimeViews(SMALL), {"image": image})
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    assert apply(TestTimeViews(SMALL), low, extra, image)[0].dtype == jnp.bfloat16
    with pytest.raises(InputError, match="at least 1 pixel"):
        jax.eval_shape(as_model(TestTimeViews(SMALL, shift=0)).init, KEY, {"image": image})


# --- the recipe

SCHEDULE = {"start": 0.2, "end": 0.07, "warmup": 0.23}
RECIPE = SGD(
    lr=OneCycle(peak=1.5, **SCHEDULE),
    momentum=0.85,
    nesterov=True,
    weight_decay=0.0153 / 11.5,
    decay="",
    groups=(
        Group("whiten/kernel", lr=0.0),
        Group("whiten/bias", until=3 / 9.9),
        Group("norm", lr=64.0, weight_decay=1 / 64),
    ),
)


def sum_form(net: Any, params: Any, extra: Any, batches: list[Any], steps: int) -> list[Any]:
    """The recipe as published: the loss summed over 1024 examples, a rate and a decay for each group.

    An epoch is one step here, so the whitening bias is trained for three.
    """
    scale = 1024 * (1 + 1 / (1 - 0.85))
    rate, decay = 11.5 / scale, 0.0153 * 1024 / scale
    rise, seen = int(0.23 * steps), []
    buffers = jax.tree.map(np.zeros_like, params)

    @jax.jit
    def gradient(params: Any, extra: Any, batch: Any) -> Any:
        def total(params: Any) -> Any:
            outputs, after = as_model(net).apply(params, extra, batch, train=True, key=KEY)
            target = 0.8 * jax.nn.one_hot(batch["label"], 3) + 0.2 / 3
            return -(target * jax.nn.log_softmax(outputs)).sum(), after

        return jax.grad(total, has_aux=True)(params)

    for step, batch in enumerate(batches):
        height = np.interp(step, [0, rise, steps], [0.2, 1, 0.07])
        grads, extra = gradient(params, extra, batch)
        params = {"net": {name: dict(leaves) for name, leaves in params["net"].items()}}
        for module, leaves in params["net"].items():
            for name, param in leaves.items():
                if module == "whiten" and (name == "kernel" or step >= 3):
                    continue
                lr = rate * (64 if "norm" in module else 1)
                grad = np.asarray(grads["net"][module][name], np.float64) + decay / lr * param
                buffer = 0.85 * buffers["net"][module][name] + grad
                buffers["net"][module][name] = buffer
                leaves[name] = np.float32(param - height * lr * (grad + 0.85 * buffer))
        seen.append((params, extra))
    return seen


def test_steps_of_the_mean_form_are_those_of_the_published_sum_form() -> None:
    net, steps = TestTimeViews(SMALL), 10
    labels = np.random.default_rng(0).integers(0, 3, (4, 1024))
    batches = [{"image": images(1024, seed=k), "label": label} for k, label in enumerate(labels)]
    tx = RECIPE.build(steps)
    start, extra = random_state(net, batches[0])
    state = State(jnp.zeros((), jnp.int32), start, extra, tx.init(start))
    wanted = sum_form(net, start, extra, batches, steps)
    step = jax.jit(make_train_step(net, CrossEntropy(smoothing=0.2), tx))
    for batch, (params, extra) in zip(batches, wanted, strict=True):
        state, _ = step(state, batch, KEY)
        chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=2e-5)
        chex.assert_trees_all_close(state.extra, extra, rtol=1e-3, atol=1e-4)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), start, state.params)["net"]
    assert moved.pop("whiten") == {"kernel": False, "bias": True}
    assert all(jax.tree.leaves(moved))


def test_published_rates_and_decays_are_those_of_the_config() -> None:
    scale = 1024 * (1 + 1 / (1 - 0.85))
    assert RECIPE.lr.peak == pytest.approx(11.5 / scale * 1024)  # type: ignore[union-attr]
    assert RECIPE.weight_decay * 1024 == pytest.approx(1.362, abs=1e-3)
    assert RECIPE.weight_decay * 1024 / 64 == pytest.approx(0.0213, abs=1e-4)
    rates = np.array([RECIPE.lr.build(476)(k) for k in (0, 109, 292, 475)])  # type: ignore[union-attr]
    np.testing.assert_allclose(
        rates / 1.5, np.interp([0, 109, 292, 475], [0, 109, 476], [0.2, 1, 0.07]), rtol=1e-4
    )


def test_recipe_trains_with_lookahead_and_average_on_a_donated_state_and_eight_devices(mesh8: Any) -> None:
    net, steps = TestTimeViews(SMALL), 12
    tx, after = RECIPE.build(steps), (Lookahead().build(steps), EMA(0.5))
    loss = CrossEntropy(smoothing=0.2)
    whole, split = sharding.replicated(mesh8), sharding.batch_split(mesh8)
    image = images(64)
    batch = {"image": image, "label": (image[..., 0].mean((1, 2)) > image[..., 0].mean()).astype(np.int32)}
    init = sharding.compile(
        make_init(net, tx, data_init=Whiten(64), post_update=after), args=(whole, split), out=whole
    )
    step = sharding.compile(
        make_train_step(net, loss, tx, post_update=after), args=(whole, split, whole), out=whole, donate=(0,)
    )
    evaluate = sharding.compile(make_eval_step(net, loss), args=(whole, split), out=whole)
    state = init(KEY, batch)
    before = float(evaluate(state, batch)["loss"].compute())
    kernel = np.array(state.params["net"]["whiten"]["kernel"])
    for _ in range(steps):
        state, _ = step(state, batch, KEY)
    slow = state.extra["lookahead"]
    chex.assert_trees_all_equal(slow["params"], state.params)
    chex.assert_trees_all_equal(slow["batch_stats"], state.extra["batch_stats"])
    np.testing.assert_array_equal(state.params["net"]["whiten"]["kernel"], kernel)
    assert set(state.extra) == {"batch_stats", "lookahead", "ema"}
    assert float(evaluate(state, batch)["loss"].compute()) < 0.9 * before


# --- every field has an effect

CASES: dict[Any, dict[str, Any]] = {
    SMALL.clone(convs=2): {
        "widths": (6,),
        "convs": 3,
        "classes": 5,
        "residual": True,
        "whiten": 12,
        "scale": 1.0,
        "bn_momentum": 0.5,
        "bn_groups": 2,
    },
    TestTimeViews(SMALL): {"net": SMALL.clone(scale=1.0), "shift": 2},
}
FIELDS = [(m, f.name) for m in CASES for f in dataclasses.fields(m) if f.name not in ("parent", "name")]
FIXED = images(4)


@functools.cache
def effect(module: Any) -> Any:
    params, extra = random_state(module, {"image": FIXED})
    out = apply(module, params, extra, FIXED, train=isinstance(module, Airbench))
    return jax.tree.map(lambda x: np.round(x, 5).tolist(), {"params": params, "out": out})


@pytest.mark.parametrize(("module", "field"), FIELDS, ids=[f"{type(m).__name__}-{f}" for m, f in FIELDS])
def test_every_field_changes_something(module: Any, field: str) -> None:
    assert effect(module.clone(**{field: CASES[module][field]})) != effect(module)
