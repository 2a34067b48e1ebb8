"""jaxtrain.data.mixup: images, labels and weights against NumPy, on one device and on eight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import sharding
from jaxtrain.core.errors import InputError
from jaxtrain.data.augment import Normalise, compose
from jaxtrain.data.mixup import Mixup

RNG = np.random.default_rng(0)
KEY = jax.random.key(5)


def batch(n: int = 16, dtype: Any = np.uint8) -> dict[str, Any]:
    image = RNG.integers(0, 256, (n, 4, 6, 3)).astype(dtype)
    return {"image": jnp.asarray(image), "label": jnp.arange(n), "example_id": jnp.arange(n)}


def weights(alpha: float, n: int) -> np.ndarray:
    one = {"image": jnp.zeros((1, 1, 1, 1)), "label": jnp.zeros(1, int)}
    keys = jax.random.split(jax.random.key(1), n)
    return np.asarray(jax.vmap(lambda key: Mixup(alpha)(one, key)["mix"][0])(keys))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, jnp.bfloat16])
def test_image_and_label_use_the_same_partner_and_weight(dtype: Any) -> None:
    inputs = batch(dtype=dtype)
    mixed = Mixup(1.0)(inputs, KEY)
    assert mixed["image"].dtype == mixed["mix"].dtype == jnp.float32
    assert mixed["mix"].shape == (16,) and len(np.unique(mixed["mix"])) == 1
    assert mixed["label_mixed"].dtype == inputs["label"].dtype
    partner = np.asarray(mixed["label_mixed"])  # Labels are row numbers here.
    assert sorted(partner) == list(range(16)) and np.all(partner != np.arange(16))
    image, mix = np.asarray(inputs["image"], np.float64), float(mixed["mix"][0])
    assert 0.05 < mix < 0.95, "a weight with a visible effect"
    np.testing.assert_allclose(mixed["image"], mix * image + (1 - mix) * image[partner], rtol=1e-5)
    for name in ("label", "example_id"):
        np.testing.assert_array_equal(mixed[name], inputs[name])


@pytest.mark.full("tests/data/test_mixup.py::test_image_and_label_use_the_same_partner_and_weight")
@pytest.mark.parametrize("alpha", [0.2, 4.0])
def test_weights_follow_the_beta_distribution(alpha: float) -> None:
    drawn = weights(alpha, 4000)
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert abs(drawn.mean() - 0.5) < 0.04
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(drawn.var() - variance) < 0.1 * variance


@pytest.mark.full("tests/data/test_augment.py")
def test_same_result_on_eight_devices(mesh8: Any) -> None:
    inputs = batch()
    alone = Mixup()(inputs, KEY)
    split = sharding.batch_split(mesh8)
    step = jax.jit(Mixup(), in_shardings=(split, None), out_shardings=split)
    spread = step(jax.device_put(inputs, split), KEY)
    assert spread["image"].sharding.is_equivalent_to(split, 4)
    for name, array in alone.items():
        np.testing.assert_allclose(spread[name], array, rtol=1e-6)


def test_label_maps_are_mixed_and_weights_depend_on_the_key() -> None:
    inputs = {**batch(), "label": jnp.asarray(RNG.integers(0, 9, (16, 4, 6)))}
    mixed = Mixup()(inputs, KEY)
    np.testing.assert_array_equal(mixed["label_mixed"], np.roll(inputs["label"], 1, axis=0))
    assert float(Mixup()(inputs, jax.random.key(6))["mix"][0]) != float(mixed["mix"][0])


def test_mixup_composes_with_other_stages() -> None:
    inputs = batch()
    normal = Normalise((0.5,), (0.25,))
    before, after = compose(normal, Mixup()), compose(Mixup(), normal)
    key = jax.random.key(0)
    assert before(inputs, key)["image"].dtype == jnp.float32
    # Blending commutes with normalising, for the same weight.
    one, two = Mixup()(normal(inputs), key), normal(Mixup()(inputs, key))
    np.testing.assert_allclose(one["image"], two["image"], atol=1e-5)
    assert set(after(inputs, key)) == set(inputs) | {"label_mixed", "mix"}


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_invalid_settings_are_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha"):
        Mixup(alpha)
