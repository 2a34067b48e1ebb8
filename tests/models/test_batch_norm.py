"""``BatchNorm(groups=N)``: statistics, running averages, meshes, collectives and errors."""

from __future__ import annotations

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxtrain import sharding
from jaxtrain.core.errors import InputError
from jaxtrain.losses import CrossEntropy
from jaxtrain.models import CNN, Airbench, BatchNorm, ResNet, TestTimeViews, UNet, as_model
from jaxtrain.step import make_init, make_train_step

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
MODELS = {
    "cnn": (CNN(widths=(2,), convs=1), 4),
    "resnet": (ResNet(stages=(1,), block="basic", stem="cifar", width=2, classes=3), 4),
    "airbench": (Airbench(widths=(4,), convs=1), 7),
    "views": (TestTimeViews(Airbench(widths=(4,), convs=1)), 7),
    "unet": (UNet(widths=(2,)), 4),
}


def images(n: int = 12, side: int = 4) -> np.ndarray:
    """Return images whose mean grows with the row, so that each group has other statistics."""
    shift = np.arange(n).reshape(n, 1, 1, 1)
    return (RNG.normal(size=(n, side, side, 3)) + shift).astype(np.float32)


def normalise(norm: nn.Module, x: Any, params: Any, stats: Any) -> Any:
    variables = {"params": params, "batch_stats": stats}
    apply = jax.jit(lambda variables, x: norm.apply(variables, x, mutable=["batch_stats"]))
    out, updated = apply(variables, x)
    return out, updated["batch_stats"]


def some_state(channels: int = 3) -> tuple[Any, Any]:
    values = {
        name: RNG.uniform(0.5, 2, channels).astype(np.float32) for name in ("scale", "bias", "mean", "var")
    }
    return {k: values[k] for k in ("scale", "bias")}, {k: values[k] for k in ("mean", "var")}


@pytest.mark.parametrize("groups", [2, 3, 12])
def test_each_group_is_normalised_as_a_batch_of_its_own(groups: int) -> None:
    x, (params, stats) = images(), some_state()
    norm = BatchNorm(use_running_average=False, momentum=0.75, groups=groups)
    out, updated = normalise(norm, x, params, stats)
    want, means, variances = [], [], []
    for part in np.split(x.astype(np.float64), groups):
        mean, variance = part.mean((0, 1, 2)), part.var((0, 1, 2))
        want.append((part - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"])
        means.append(mean)
        variances.append(variance)
    np.testing.assert_allclose(out, np.concatenate(want), rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(updated["mean"], 0.75 * stats["mean"] + 0.25 * np.mean(means, 0), rtol=1e-5)
    np.testing.assert_allclose(updated["var"], 0.75 * stats["var"] + 0.25 * np.mean(variances, 0), rtol=1e-3)


@pytest.mark.full("tests/models/test_batch_norm.py::test_each_group_is_normalised_as_a_batch_of_its_own")
@pytest.mark.parametrize("settings", [{}, {"use_scale": False}, {"use_bias": False, "epsilon": 0.1}])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_groups_of_equal_rows_are_flax_on_one_of_them(settings: Any, dtype: Any) -> None:
    x, (params, stats) = images(4).astype(dtype), some_state()
    names = [name for name in params if settings.get(f"use_{name}", True)]
    params = {name: params[name].astype(dtype) for name in names}
    stock = nn.BatchNorm(use_running_average=False, **settings)
    ours = BatchNorm(use_running_average=False, groups=3, **settings)
    out, updated = normalise(ours, np.concatenate([x] * 3), params, stats)
    want, expected = normalise(stock, x, params, stats)
    assert out.dtype == want.dtype
    chex.assert_trees_all_close(
        out.astype(np.float32), np.concatenate([want] * 3).astype(np.float32), rtol=0.02
    )
    chex.assert_trees_all_close(updated, expected, rtol=1e-5)


def test_one_group_is_flax_bit_for_bit() -> None:
    x, (params, stats) = images(), some_state()
    ours = normalise(BatchNorm(use_running_average=False), x, params, stats)
    chex.assert_trees_all_equal(ours, normalise(nn.BatchNorm(use_running_average=False), x, params, stats))


def test_parameters_statistics_and_evaluation_are_those_of_flax() -> None:
    x, (params, stats) = images(5), some_state()  # 5 rows: evaluation and initialisation need not divide
    ours, stock = BatchNorm(groups=4), nn.BatchNorm()
    assert jax.tree.map(jnp.shape, ours.init(KEY, x, True)) == jax.tree.map(
        jnp.shape, stock.init(KEY, x, True)
    )
    variables = {"params": params, "batch_stats": stats}
    chex.assert_trees_all_equal(ours.apply(variables, x, True), stock.apply(variables, x, True))


@pytest.mark.parametrize("groups", [2, 8])
def test_groups_are_the_same_on_any_mesh(groups: int, mesh1: Any, mesh8: Any) -> None:
    x, (params, stats) = images(16), some_state()
    norm = BatchNorm(use_running_average=False, groups=groups)

    def train(params: Any, stats: Any, x: Any) -> Any:
        return norm.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

    def on(mesh: Any) -> Any:
        replicated, split = sharding.replicated(mesh), sharding.batch_split(mesh)
        step = sharding.compile(train, args=(replicated, replicated, split), out=replicated)
        return jax.device_get(step(params, stats, x))

    # Devices add their sums up in the order in which they arrive.
    chex.assert_trees_all_close(on(mesh1), on(mesh8), rtol=1e-4, atol=1e-4)


def all_reduces(net: nn.Module, mesh: Any) -> int:
    """Return how many all-reduces a compiled train step has."""
    batch = {"image": images(16, 8), "label": np.zeros(16, np.int32)}
    tx = optax.sgd(0.1)
    state = jax.eval_shape(make_init(net, tx), KEY, batch)
    replicated, split = sharding.replicated(mesh), sharding.batch_split(mesh)
    step = jax.jit(
        make_train_step(net, CrossEntropy(), tx),
        in_shardings=(replicated, split, replicated),
        out_shardings=(replicated, replicated),
    )
    text = step.lower(state, batch, KEY).compile().as_text()
    return len(re.findall(r" all-reduce(?:-start)?\(", text))


@pytest.mark.full(
    "tests/models/test_batch_norm.py::test_groups_are_slices_of_a_microbatch_and_count_masked_rows"
)
def test_statistics_of_groups_need_no_collective_of_their_own(mesh8: Any) -> None:
    net = ResNet(stages=(1,), block="basic", stem="cifar", width=8, classes=3)
    assert all_reduces(net.clone(bn_groups=8), mesh8) == 1  # gradients, metrics and running averages
    assert all_reduces(net, mesh8) > 3  # and one or more for each BatchNorm


@pytest.mark.full(
    "tests/models/test_batch_norm.py::test_groups_are_slices_of_a_microbatch_and_count_masked_rows"
)
@pytest.mark.parametrize("name", MODELS)
def test_models_pass_their_groups_on(name: str) -> None:
    module, side = MODELS[name]
    batch = {"image": images(6, side)}

    def grouped(groups: int) -> nn.Module:
        if isinstance(module, TestTimeViews):
            return TestTimeViews(module.net.clone(bn_groups=groups))
        return module.clone(bn_groups=groups)

    def run(groups: int) -> Any:
        model = as_model(grouped(groups))
        params, extra = jax.eval_shape(model.init, KEY, batch)
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)
        extra = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), extra)
        train = jax.jit(lambda params, extra: model.apply(params, extra, batch, train=True, key=KEY)[0])
        return train(params, extra)

    assert not np.allclose(run(1), run(3), atol=1e-3)
    with pytest.raises(InputError, match=r"a batch of 6 examples .* does not divide into 4 groups"):
        run(4)


@pytest.mark.parametrize(
    ("groups", "rows", "message"),
    [
        (0, 4, r"^BatchNorm\(groups=0\): groups must be at least 1"),
        (
            4,
            10,
            r"^a batch of 10 examples \(with accumulate, a microbatch\) does not divide into 4 groups of ",
        ),
        (4, 10, "use 8 or 12, or another bn_groups"),
        (8, 3, "use 8, or another bn_groups"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: int, rows: int, message: str) -> None:
    params, stats = some_state()
    with pytest.raises(InputError, match=message):
        normalise(BatchNorm(use_running_average=False, groups=groups), images(rows), params, stats)


def test_a_mask_with_groups_is_refused() -> None:
    params, stats = some_state()
    norm = BatchNorm(use_running_average=False, groups=2)
    with pytest.raises(InputError, match="takes no mask"):
        norm.apply(
            {"params": params, "batch_stats": stats},
            images(),
            mask=np.ones((12, 1, 1, 1), bool),
            mutable=["batch_stats"],
        )


class OnlyNorm(nn.Module):
    """A BatchNorm of two groups; the means over pixels are the logits."""

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        return BatchNorm(not train, momentum=0.5, groups=2, name="norm")(image).mean((1, 2))


@pytest.mark.full("[2]")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_groups_are_slices_of_a_microbatch_and_count_masked_rows(accumulate: int) -> None:
    image = images(8)
    batch = {"image": image, "label": np.arange(8) % 3, "mask": np.arange(8) < 6}
    net, tx = OnlyNorm(), optax.sgd(0.1)
    state = jax.jit(make_init(net, tx))(KEY, batch)
    step = jax.jit(make_train_step(net, CrossEntropy(), tx, accumulate=accumulate))
    found = step(state, batch, KEY)[0].extra["batch_stats"]["norm"]
    mean, variance = np.zeros(3), np.ones(3)
    for first in range(accumulate):  # microbatches are strided rows
        groups = np.split(image[first::accumulate], 2)
        mean = 0.5 * mean + 0.5 * np.mean([group.mean((0, 1, 2)) for group in groups], 0)
        variance = 0.5 * variance + 0.5 * np.mean([group.var((0, 1, 2)) for group in groups], 0)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["var"], variance, rtol=1e-4)
