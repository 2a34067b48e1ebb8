"""The attribution methods against NumPy and their axioms, on functions whose answers are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.core.errors import InputError
from jaxtrain.explain import (
    attention_rollout,
    completeness_error,
    grad_cam,
    integrated_gradients,
    smoothgrad,
)
from jaxtrain.models.attention import attend, collect_attention_weights

RNG = np.random.default_rng(0)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("steps, power", [(1, 1.0), (7, 1.0), (128, 1.0), (128, 3.0)])
def test_integrated_gradients_of_a_linear_function_are_its_terms(steps: int, power: float) -> None:
    w, x, baseline = draw(3, 5), draw(3, 5), draw(3, 5)
    found = integrated_gradients(lambda x: (w * x).sum() + 2, x, baseline, steps, power)
    np.testing.assert_allclose(found, np.asarray(w) * (np.asarray(x) - np.asarray(baseline)), rtol=2e-6)


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_integrated_gradients_of_a_product_are_those_of_calculus(power: float) -> None:
    """Of ``x0 x1 ** 2`` from zeros: x0 gets one third of the value, x1 two thirds."""
    x = jnp.array([2.0, 3.0])
    found = integrated_gradients(lambda x: x[0] * x[1] ** 2, x, jnp.zeros(2), 300, power)
    np.testing.assert_allclose(found, [6, 12], rtol=1e-4)


def test_integrated_gradients_of_a_network_are_the_formula_in_numpy() -> None:
    w, v, x, baseline = draw(6, 4), draw(4), draw(6), draw(6)
    found = integrated_gradients(lambda x: jax.nn.relu(x @ w) @ v, x, baseline, 40)
    w, v, x, baseline = (np.float64(a) for a in (w, v, x, baseline))
    gradients = []
    for k in range(40):
        point = baseline + (k + 0.5) / 40 * (x - baseline)
        gradients.append(w @ (v * (point @ w > 0)))
    np.testing.assert_allclose(found, (x - baseline) * np.mean(gradients, 0), rtol=1e-4, atol=1e-6)


def test_completeness_error_is_relative() -> None:
    x, baseline = draw(5), jnp.zeros(5)

    def function(x: jax.Array) -> jax.Array:
        return jnp.tanh(x).sum() + 3

    complete = integrated_gradients(function, x, baseline)
    assert completeness_error(function, x, baseline, complete) < 1e-4
    error = completeness_error(function, x, baseline, 1.5 * complete)
    assert float(error) == pytest.approx(0.5, abs=1e-3)
    assert completeness_error(function, x, x, jnp.zeros(5)) == 0  # nothing to explain, and nothing explained
    assert completeness_error(function, x, x + 1e-9, jnp.full(5, 1e-9)) == 0  # only rounding


def test_a_function_that_changes_at_the_baseline_needs_the_power() -> None:
    """Like a LayerNorm of an embedding whose baseline is 0."""
    x = draw(16)

    def function(x: jax.Array) -> jax.Array:
        return (x / jnp.sqrt((x**2).mean() + 1e-6))[0]

    errors = {
        power: float(
            completeness_error(function, x, 0 * x, integrated_gradients(function, x, 0 * x, 128, power))
        )
        for power in (1.0, 3.0)
    }
    assert errors[3.0] < 0.01 < errors[1.0]


def test_smoothgrad_is_the_mean_gradient_over_noise() -> None:
    x, w, key = draw(4, 3), draw(4, 3), jax.random.key(5)
    found = smoothgrad(lambda x: (w * x**3).sum(), x, key, samples=20, noise=0.2)
    scale = 0.2 * (np.max(x) - np.min(x))
    points = [x + scale * jax.random.normal(jax.random.fold_in(key, k), x.shape) for k in range(20)]
    np.testing.assert_allclose(found, np.mean([3 * w * p**2 for p in points], 0), rtol=1e-4)
    again = smoothgrad(lambda x: (w * x**3).sum(), x, key, samples=20, noise=0.2)
    np.testing.assert_array_equal(found, again)


def test_grad_cam_is_the_formula_of_the_paper() -> None:
    a, w = draw(3, 4, 5), draw(3, 4, 5)
    found = grad_cam(lambda a: (w * a**2).sum(), a)
    alpha = (2 * np.asarray(w) * np.asarray(a)).mean((0, 1))
    expected = np.maximum((np.asarray(a) * alpha).sum(-1), 0)
    assert (expected == 0).any() and (expected > 0).any()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_rollout_is_the_product_of_the_layers_in_order() -> None:
    layers = [np.random.default_rng(k).dirichlet(np.ones(6), (3, 6)) for k in range(3)]
    expected = np.eye(6)
    for layer in layers:
        expected = (0.5 * layer.mean(0) + 0.5 * np.eye(6)) @ expected
    found = attention_rollout([jnp.asarray(x, jnp.float32) for x in layers])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_collected_attention_weights_are_the_softmax_and_change_no_output(causal: bool) -> None:
    q, k, v = draw(2, 5, 3, 4), draw(2, 5, 3, 4), draw(2, 5, 3, 4)
    plain = attend(q, k, v, causal)
    with collect_attention_weights() as weights:
        collected = attend(q, k, v, causal)
    np.testing.assert_allclose(collected, plain, rtol=2e-5, atol=1e-6)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / 2
    scores = np.where(np.tri(5, dtype=bool), scores, -np.inf) if causal else scores
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights[0], expected, rtol=1e-5)
    assert len(weights) == 1
    attend(q, k, v, causal)
    assert len(weights) == 1  # not after the block


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: integrated_gradients(jnp.sum, draw(2), draw(2), 0), "steps is 0"),
        (lambda: integrated_gradients(jnp.sum, draw(2), draw(2), 9, 0.5), "power 0.5"),
        (lambda: integrated_gradients(jnp.sum, draw(2), draw(3)), r"baseline has shape \(3,\)"),
        (lambda: integrated_gradients(jnp.sum, jnp.arange(2), draw(2)), "int32: cast"),
        (lambda: smoothgrad(jnp.sum, draw(2), jax.random.key(0), 0), "samples is 0"),
        (lambda: smoothgrad(jnp.sum, draw(2), jax.random.key(0), noise=-1.0), "noise -1"),
        (lambda: grad_cam(jnp.sum, draw(2, 3)), r"give \[height, width, channel\]"),
        (lambda: attention_rollout([]), "none"),
        (lambda: attention_rollout([draw(1, 2, 3)]), "give"),
        (lambda: attention_rollout([draw(1, 2, 2)], 2.0), "residual is 2"),
    ],
)
def test_bad_arguments_are_refused(call, message) -> None:
    with pytest.raises(InputError, match=message):
        call()
