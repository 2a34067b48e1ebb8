"""``Dropout``: probabilities, scale, gradient, random bits, meshes, and rates at the ends of the range."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain import sharding
from jaxtrain.core.errors import InputError
from jaxtrain.models import GPT, MLP, Dropout, UNet, as_model
from jaxtrain.models.dropout import LEVELS, kept_levels

KEY = jax.random.key(3)


def drop(rate: float, x: jax.Array, key: Any = KEY, **settings: Any) -> jax.Array:
    return Dropout(rate, **settings).apply({}, x, rngs={"dropout": key})


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_kept_fraction_is_the_rounded_rate_and_the_expectation_exact(rate: float) -> None:
    n = 400_000
    found, keep = np.asarray(drop(rate, jnp.ones(n))), kept_levels(rate) / LEVELS
    assert abs(keep - (1 - rate)) <= 0.5 / LEVELS
    assert abs((found > 0).mean() - keep) < 5 * np.sqrt(keep * (1 - keep) / n)
    np.testing.assert_array_equal(found[found > 0], np.float32(1 / keep))
    values = np.random.default_rng(0).normal(size=n)
    error = np.asarray(drop(rate, jnp.array(values, jnp.float32)), np.float64).sum() - values.sum()
    assert abs(error) < 5 * np.sqrt((values**2).sum() * (1 - keep) / keep)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scale_is_rounded_once_in_half_precision(dtype: Any) -> None:
    x = jnp.linspace(0.5, 2, 200, dtype=dtype)
    found, keep = drop(0.2, x), kept_levels(0.2) / LEVELS
    want = np.asarray((x.astype(jnp.float32) * np.float32(1 / keep)).astype(dtype))
    kept = np.asarray(found) > 0
    assert found.dtype == dtype and kept.any()
    np.testing.assert_array_equal(np.asarray(found)[kept], want[kept])


def test_gradient_is_the_mask_times_the_scale() -> None:
    x = jnp.arange(1.0, 301.0)
    found, gradient = drop(0.4, x), jax.grad(lambda x: drop(0.4, x).sum())(x)
    np.testing.assert_array_equal(gradient, np.where(found > 0, np.float32(LEVELS / kept_levels(0.4)), 0))


@pytest.mark.full("tests/models/test_dropout.py::test_gradient_is_the_mask_times_the_scale")
def test_a_tiny_rate_is_not_zero_and_one_near_one_is_not_one() -> None:
    x = jnp.ones(2**20)
    dropped, kept = int((drop(1e-12, x) == 0).sum()), int((drop(1 - 1e-12, x) > 0).sum())
    assert 1 <= dropped < 50 and 1 <= kept < 50  # 16 are expected


def test_a_rate_of_zero_and_evaluation_return_the_input_without_a_key() -> None:
    x = jnp.arange(5.0)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x), x)
    np.testing.assert_array_equal(Dropout(0.5, deterministic=True).apply({}, x), x)


@pytest.mark.parametrize("rate", [1, 1.5, -0.1, float("nan")])
def test_a_rate_outside_the_range_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match=r"^Dropout\(rate=.*\): the rate must be in \[0, 1\)"):
        drop(rate, jnp.ones(3))


def test_broadcast_dimensions_are_dropped_together() -> None:
    found = np.asarray(drop(0.5, jnp.ones((64, 5, 6, 32)), broadcast_dims=(1, -2)))
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :1, :1], found.shape))
    assert 0.4 < (found[:, 0, 0] > 0).mean() < 0.6


@pytest.mark.parametrize("spec", [PartitionSpec(("data", "fsdp")), PartitionSpec("data", None, "model")])
def test_mask_is_the_same_on_any_mesh(spec: PartitionSpec) -> None:
    mesh = sharding.make_mesh(jax.devices(), {"data": 2, "fsdp": 2, "model": 2})
    where = NamedSharding(mesh, spec)
    x = jnp.ones((8, 6, 10))
    split = jax.jit(lambda x, key: drop(0.5, x, key), in_shardings=(where, None), out_shardings=where)
    np.testing.assert_array_equal(split(x, KEY), drop(0.5, x))


@pytest.mark.parametrize(
    ("module", "batch"),
    [
        (MLP(widths=(8,), dropout=0.5), {"image": np.zeros((2, 4, 4, 1), np.float32)}),
        (
            GPT(vocab=8, context=4, width=8, depth=1, heads=2, dropout=0.5),
            {"tokens": np.zeros((2, 4), np.int32)},
        ),
        (UNet(widths=(2, 4), dropout=0.5), {"image": np.zeros((2, 4, 4, 1), np.float32)}),
    ],
)
def test_models_draw_sixteen_bits_per_element(module: Any, batch: Any) -> None:
    model = as_model(module)
    params, extra = jax.eval_shape(model.init, KEY, batch)
    program = jax.make_jaxpr(lambda p, e, key: model.apply(p, e, batch, train=True, key=key))(
        params, extra, KEY
    )
    assert "random_bits[bit_width=16" in str(program) and "random_bits[bit_width=32" not in str(program)
