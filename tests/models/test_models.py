"""jaxtrain.models: Linen behind a pure pair, the layers, and the two networks."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain import sharding
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Model
from jaxtrain.models import CNN, MLP, as_model
from jaxtrain.models.layers import ACTIVATIONS, Activation

RNG = np.random.default_rng(0)
KEY = jax.random.key(1)
SMALL = CNN(widths=(4,), classes=3)


def images(n: int = 8, side: int = 4, channels: int = 2) -> jax.Array:
    return jnp.array(RNG.normal(size=(n, side, side, channels)), jnp.float32)


def random_state(model: Model, batch: Any) -> Any:
    """Return random params and statistics of the model's shapes, without compiling an initialisation."""
    rng = np.random.default_rng(1)
    params, extra = jax.eval_shape(model.init, KEY, batch)
    filled = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), params)
    return filled, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), extra)


# --- as_model


def test_as_model_returns_a_pair_unchanged_and_wraps_two_functions() -> None:
    pair = Model(lambda key, batch: ({}, {}), lambda params, extra, batch, *, train, key: (1, extra))
    assert as_model(pair) is pair
    wrapped = as_model((pair.init, pair.apply))
    assert isinstance(wrapped, Model) and wrapped == pair


@pytest.mark.parametrize("junk", [None, "cnn", 3, CNN, (len,), (len, 1), [len, len], lambda: 0])
def test_as_model_refuses_anything_else(junk: Any) -> None:
    with pytest.raises(InputError, match="give a Flax Linen module or an \\(init, apply\\) pair"):
        as_model(junk)


class Two(nn.Module):
    @nn.compact
    def __call__(self, left: jax.Array, right: jax.Array, scale: float = 1.0) -> jax.Array:
        return (left - right) * scale + self.param("bias", nn.initializers.zeros, ())


def outputs(module: Any, batch: Any, train: bool = False) -> Any:
    model = as_model(module)
    params, extra = jax.jit(model.init)(KEY, batch)
    return model.apply(params, extra, batch, train=train, key=KEY)[0]


def test_arguments_are_filled_by_the_names_of_the_fields() -> None:
    batch = {"right": jnp.array([1.0]), "label": jnp.array([0]), "left": jnp.array([5.0])}
    assert outputs(Two(), batch) == 4
    assert outputs(Two(), {**batch, "scale": jnp.array(2.0)}) == 8


def test_single_argument_of_another_name_gets_the_only_input_field() -> None:
    batch = {"mask": jnp.ones(2), "pixels": jnp.ones((2, 5)), "target": jnp.ones(2), "label": jnp.ones(2)}
    assert outputs(nn.Dense(3), batch).shape == (2, 3)


@pytest.mark.parametrize(
    ("module", "batch"),
    [
        (nn.Dense(3), {"a": jnp.ones((1, 2)), "b": jnp.ones((1, 2))}),
        (nn.Dense(3), {"label": jnp.ones((1, 2))}),
        (Two(), {"left": jnp.ones(1)}),
    ],
    ids=["which field", "no field", "one missing"],
)
def test_fields_that_cannot_be_matched_are_refused_with_both_sides(module: Any, batch: Any) -> None:
    with pytest.raises(InputError, match=f"{type(module).__name__} takes .* and the batch has .*"):
        as_model(module).init(KEY, batch)


def test_extra_has_every_collection_and_apply_preserves_the_rest_of_it() -> None:
    model, batch = as_model(SMALL), {"image": images()}
    params, extra = random_state(model, batch)
    assert set(extra) == {"batch_stats"} and "batch_stats" not in params
    full_extra = {**extra, "ema": {"params": 1}, "masks": 2, "loss_scale": 3}
    for train in (False, True):
        apply = jax.jit(functools.partial(model.apply, train=train))
        after = apply(params, full_extra, batch, key=KEY)[1]
        assert set(after) == set(full_extra)
        assert (after["ema"], after["masks"], after["loss_scale"]) == ({"params": 1}, 2, 3)


def test_model_may_have_no_parameters_and_no_statistics() -> None:
    class Total(nn.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x.sum(-1)

    model, batch = as_model(Total()), {"x": jnp.ones((2, 3))}
    assert model.init(KEY, batch) == ({}, {})
    found, extra = model.apply({}, {}, batch, train=True, key=KEY)
    assert found.tolist() == [3, 3] and extra == {}


# --- images that do not fit

WRONG_IMAGES = {
    "NCHW": ((8, 3, 32, 32), r"\(8, 3, 32, 32\) looks like .*NCHW.*transpose\(0, 2, 3, 1\)"),
    "NCHW, grey": ((8, 1, 28, 28), "NCHW"),
    "unbatched": ((32, 32, 3), r"image has shape \(32, 32, 3\): CNN takes \[batch, height, width, channel"),
    "no channel axis": ((8, 28, 28), "add a channel axis of 1"),
    "flat": ((8, 784), r"image has shape \(8, 784\)"),
    "too small": ((8, 7, 9, 3), r"\(8, 7, 9, 3\) is too small: .* CNN needs at least 8 pixels"),
    "too narrow": ((8, 9, 7, 3), "too small"),
}


@pytest.mark.parametrize("name", WRONG_IMAGES)
def test_image_of_the_wrong_layout_is_refused_in_one_line(name: str) -> None:
    shape, message = WRONG_IMAGES[name]
    with pytest.raises(InputError, match=message) as raised:
        jax.eval_shape(as_model(CNN(widths=(4, 4, 4))).init, KEY, {"image": jnp.zeros(shape)})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [(8, 8, 8, 3), (8, 8, 8, 1), (1, 9, 11, 4), (8, 8, 8, 16)])
def test_image_that_fits_is_accepted(shape: tuple[int, ...]) -> None:
    found, _ = jax.eval_shape(as_model(CNN(widths=(4, 4, 4))).init, KEY, {"image": jnp.zeros(shape)})
    assert found["stage0_conv0"]["kernel"].shape == (3, 3, shape[-1], 4)


@pytest.mark.parametrize(
    ("module", "fitting", "given"),
    [
        (SMALL, (2, 4, 4, 3), (2, 4, 4, 1)),
        (MLP(widths=(4,)), (2, 4, 4, 1), (2, 5, 5, 1)),
    ],
    ids=["channels", "features"],
)
def test_batch_that_does_not_fit_the_parameters_is_refused_with_its_shape(
    module: Any, fitting: Any, given: Any
) -> None:
    model = as_model(module)
    params, extra = random_state(model, {"image": jnp.zeros(fitting)})
    message = rf"image \({', '.join(map(str, given))}\).*parameters of {type(module).__name__}"
    with pytest.raises(InputError, match=message) as raised:
        model.apply(params, extra, {"image": jnp.zeros(given)}, train=False, key=None)
    assert "\n" not in str(raised.value)


# --- dropout and batch statistics


@pytest.mark.full("[module1]")
@pytest.mark.parametrize("module", [SMALL.clone(dropout=0.5), MLP(widths=(16,), dropout=0.5)])
def test_dropout_acts_in_training_only_and_by_its_key_only(module: Any) -> None:
    model, batch = as_model(module), {"image": images()}
    params, extra = random_state(model, batch)

    @jax.jit
    def train(key: Any) -> Any:
        return model.apply(params, extra, batch, train=True, key=key)[0]

    drawn = train(KEY)
    np.testing.assert_array_equal(drawn, train(KEY))
    assert not np.allclose(drawn, train(jax.random.key(2)))
    plain = as_model(module.clone(dropout=0.0)).apply(params, extra, batch, train=True, key=KEY)[0]
    assert not np.allclose(drawn, plain)
    evaluated = model.apply(params, extra, batch, train=False, key=None)[0]
    np.testing.assert_array_equal(evaluated, model.apply(params, extra, batch, train=False, key=KEY)[0])


@pytest.mark.full(
    "tests/models/test_dropout.py::test_kept_fraction_is_the_rounded_rate_and_the_expectation_exact"
)
def test_dropout_keeps_the_mean_of_a_layer() -> None:
    model, batch = as_model(MLP(widths=(4000,), dropout=0.4, classes=1)), {"image": images(1)}
    params, extra = random_state(model, batch)
    params = {**params, "head": {"kernel": np.full((4000, 1), 1 / 4000, np.float32), "bias": np.zeros(1)}}
    dropped, undropped = (model.apply(params, extra, batch, train=t, key=KEY)[0] for t in (True, False))
    assert float(dropped[0, 0]) == pytest.approx(float(undropped[0, 0]), rel=0.1)


@pytest.mark.full(
    "tests/models/test_models.py::test_batch_statistics_move_in_training_for_every_name_of_the_mode_argument"
)
def test_batch_statistics_move_in_training_only_by_momentum() -> None:
    model, batch = as_model(CNN(widths=(4,), convs=1, bn_momentum=0.75)), {"image": images() + 2}
    params, extra = jax.jit(model.init)(KEY, batch)
    assert model.apply(params, extra, batch, train=False, key=None)[1] is extra
    moved = model.apply(params, extra, batch, train=True, key=KEY)[1]["batch_stats"]["stage0_conv0_norm"]
    conv = nn.Conv(4, (3, 3), use_bias=False).apply({"params": params["stage0_conv0"]}, batch["image"])
    pooled = nn.max_pool(conv, (2, 2), (2, 2))
    np.testing.assert_allclose(moved["mean"], 0.25 * pooled.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(moved["var"], 0.75 + 0.25 * pooled.var((0, 1, 2)), rtol=1e-4)


def test_batch_statistics_are_of_the_global_batch_on_eight_devices(mesh1: Any, mesh8: Any) -> None:
    model = as_model(SMALL)
    # Each shard has another mean, which the statistics of one shard would miss.
    batch = {"image": np.array(images(16) + np.repeat(np.arange(8.0), 2).reshape(16, 1, 1, 1), np.float32)}
    params, extra = random_state(model, batch)

    def train(params: Any, extra: Any, batch: Any) -> Any:
        return model.apply(params, extra, batch, train=True, key=None)

    def on(mesh: Any) -> Any:
        replicated, split = sharding.replicated(mesh), sharding.batch_split(mesh)
        step = sharding.compile(train, args=(replicated, replicated, split), out=replicated)
        return jax.device_get(step(params, extra, batch))

    chex.assert_trees_all_close(on(mesh1), on(mesh8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_convolutions_have_a_bias_unless_batch_norm_follows(batch_norm: bool) -> None:
    module = CNN(widths=(4, 4), batch_norm=batch_norm)
    params, extra = jax.eval_shape(as_model(module).init, KEY, {"image": images()})
    convs = [leaves for name, leaves in params.items() if name.endswith(("conv0", "conv1"))]
    assert len(convs) == 4
    assert all(("bias" in leaves) != batch_norm for leaves in convs)
    assert bool(extra) == batch_norm


# --- layers


def test_activation_names_are_different_functions() -> None:
    assert set(ACTIVATIONS) == set(typing.get_args(Activation))
    x = jnp.linspace(-2, 2, 9)
    curves = {tuple(np.round(f(x), 4).tolist()) for f in ACTIVATIONS.values()}
    assert len(curves) == len(ACTIVATIONS)


# --- every field has an effect

CASES: dict[type, dict[str, Any]] = {
    CNN: {
        "widths": (6,),
        "convs": 1,
        "classes": 5,
        "residual": False,
        "batch_norm": False,
        "bn_momentum": 0.5,
        "bn_groups": 2,
        "dropout": 0.5,
        "activation": "tanh",
    },
    MLP: {"widths": (6, 6), "classes": 5, "dropout": 0.5, "activation": "gelu"},
}
BASES: dict[type, Any] = {CNN: CNN(widths=(4,), classes=3), MLP: MLP(widths=(8,), classes=3)}
FIELDS = [(cls, f.name) for cls in CASES for f in dataclasses.fields(cls) if f.name not in ("parent", "name")]
FIXED = images(4)


@functools.cache
def effect(module: Any) -> Any:
    model, batch = as_model(module), {"image": FIXED}

    @jax.jit
    def run(batch: Any) -> Any:
        params, extra = random_state(model, batch)
        return params, model.apply(params, extra, batch, train=True, key=KEY)

    params, (found, after) = run(batch)
    return jax.tree.map(lambda x: np.round(x, 5).tolist(), {"params": params, "out": found, "extra": after})


@pytest.mark.full("[CNN-convs]", "[CNN-residual]", "[MLP-widths]", "[MLP-dropout]")
@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_field_of_a_model_changes_something(cls: type, field: str) -> None:
    base = BASES[cls]
    assert effect(base.clone(**{field: CASES[cls][field]})) != effect(base)


class Flagged(nn.Module):
    """A module whose mode argument has the name used in other libraries."""

    flag: str

    def setup(self) -> None:
        self.norm, self.dense = nn.BatchNorm(momentum=0.5), nn.Dense(2)

    def run(self, image: jax.Array, train: bool) -> jax.Array:
        return self.dense(self.norm(image.reshape(image.shape[0], -1), use_running_average=not train))


def flagged(flag: str) -> nn.Module:
    scope: dict[str, Any] = {"Flagged": Flagged}
    default = flag in ("deterministic", "use_running_average")
    train = f"not {flag}" if default else flag
    exec(
        f"class Net(Flagged):\n  def __call__(self, image, {flag}={default}):\n"
        f"    return self.run(image, {train})",
        scope,
    )
    return scope["Net"](flag)


@pytest.mark.parametrize("flag", ["train", "training", "is_training", "deterministic", "use_running_average"])
def test_batch_statistics_move_in_training_for_every_name_of_the_mode_argument(flag: str) -> None:
    model, batch = as_model(flagged(flag)), {"image": jnp.arange(24.0).reshape(2, 3, 4, 1)}
    params, extra = model.init(jax.random.key(0), batch)
    _, moved = model.apply(params, extra, batch, train=True, key=jax.random.key(1))
    _, still = model.apply(params, extra, batch, train=False, key=None)
    before = extra["batch_stats"]["norm"]["mean"]
    assert not np.allclose(moved["batch_stats"]["norm"]["mean"], before)
    np.testing.assert_array_equal(still["batch_stats"]["norm"]["mean"], before)


def test_batch_statistics_without_a_mode_argument_are_refused() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, image: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=False)(image)

    with pytest.raises(InputError, match="Net has batch statistics and its __call__ has no argument"):
        as_model(Net()).init(jax.random.key(0), {"image": jnp.ones((2, 3))})


def test_optional_arguments_are_passed_by_name_and_the_padding_mask_is_not() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, image: jax.Array, scale: Any = None, mask: Any = None, length: Any = None) -> Any:
            assert scale is None and mask is None
            return image * length

    batch = {"image": jnp.ones((2, 3)), "mask": jnp.ones(2, bool), "length": jnp.full((2, 1), 5.0)}
    model = as_model(Net())
    params, extra = model.init(jax.random.key(0), batch)
    assert model.apply(params, extra, batch, train=False, key=None)[0].sum() == 30


def test_every_random_stream_gets_a_key() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
            return image + jax.random.normal(self.make_rng("noise"), image.shape) if train else image

    model, batch = as_model(Net()), {"image": jnp.zeros((2, 3))}
    params, extra = model.init(jax.random.key(0), batch)
    one, two = (model.apply(params, extra, batch, train=True, key=jax.random.key(k))[0] for k in (1, 2))
    assert one.any() and not np.allclose(one, two)
