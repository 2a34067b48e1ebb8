"""jaxtrain.compress.quantize: int8 products equal NumPy's, what is quantized, what is left out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxtrain import models
from jaxtrain.compress.quantize import Layer, quantize
from jaxtrain.core.errors import InputError

RNG = np.random.default_rng(0)


def rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x / scale), -128, 127).astype(np.int64)


def test_a_dense_layer_is_the_integer_product_of_numpy() -> None:
    kernel, x = RNG.normal(size=(64, 10)).astype(np.float32), RNG.normal(size=(32, 64)).astype(np.float32)
    bias = RNG.normal(size=10).astype(np.float32)
    model = quantize(
        lambda w, i: i["x"] @ w["kernel"] + w["bias"][None], {"kernel": kernel, "bias": bias}, [{"x": x}]
    )
    scale = np.abs(kernel).max(0) / np.float32(127)
    step = np.abs(x).max() / np.float32(127)
    want = (rounded(x, step) @ rounded(kernel, scale)) * (scale * step) + bias
    np.testing.assert_allclose(model.apply(model.weights, {"x": x}), want, rtol=1e-6, atol=1e-6)
    assert model.weights["int8/0000/kernel"].dtype == np.int8
    assert set(model.weights) == {f"int8/0000/{name}" for name in Layer._fields} | {"float/['bias']"}


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_the_integer_product_of_numpy(groups) -> None:
    kernel = RNG.normal(size=(3, 3, 4 // groups, 6)).astype(np.float32)
    x = RNG.normal(size=(2, 5, 5, 4)).astype(np.float32)

    def apply(w, x):
        return lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    model = quantize(apply, kernel, [x])
    scale, step = np.abs(kernel).max((0, 1, 2)) / np.float32(127), np.abs(x).max() / np.float32(127)
    xs, ks = rounded(x, step), rounded(kernel, scale)
    want = np.zeros((2, 3, 3, 6))
    for group in range(groups):
        channels, outs = (
            slice(4 // groups * group, 4 // groups * (group + 1)),
            slice(6 // groups * group, 6 // groups * (group + 1)),
        )
        windows = np.lib.stride_tricks.sliding_window_view(xs[..., channels], (3, 3), axis=(1, 2))
        want[..., outs] = np.einsum("bijchw,hwco->bijo", windows, ks[..., outs])
    want *= scale * step
    np.testing.assert_allclose(model.apply(model.weights, x), want, rtol=1e-6, atol=1e-6)


def test_ranges_are_the_largest_of_all_batches_and_larger_inputs_saturate() -> None:
    batches = [np.full((1, 2), value, np.float32) for value in (0.5, -4.0, 1.0)]
    model = quantize(lambda w, x: x @ w, np.eye(2, dtype=np.float32), iter(batches))
    assert model.weights["int8/0000/input_scale"] == np.float32(4 / 127)
    np.testing.assert_allclose(
        model.apply(model.weights, np.float32([[100, -100]])), [[4, -128 * 4 / 127]], rtol=1e-6
    )


def test_a_kernel_is_followed_through_what_is_done_to_it() -> None:
    weights = {"kernel": RNG.normal(size=(6, 8)).astype(np.float32), "gain": np.float32(3)}

    @jax.jit
    def inner(x, kernel):
        return x @ kernel

    def apply(w, x):
        return inner(
            x, jnp.reshape(w["kernel"].T * w["gain"], (4, 12)).astype(jnp.bfloat16).astype(jnp.float32)
        )

    x = RNG.normal(size=(16, 4)).astype(np.float32)
    model = quantize(apply, weights, [x])
    assert set(model.weights) == {f"int8/0000/{name}" for name in Layer._fields}
    exact = apply(weights, x)
    assert np.abs(model.apply(model.weights, x) - exact).max() < 0.02 * np.abs(exact).max()


def test_products_of_activations_and_loops_stay_as_they_are() -> None:
    weights = {"kernel": np.eye(4, dtype=np.float32), "cell": np.eye(4, dtype=np.float32)}

    def apply(w, x):
        x = x @ w["kernel"]
        x = x @ x.T @ x
        return lax.scan(lambda carry, _: (jnp.tanh(carry @ w["cell"]), None), x, None, 3)[0]

    model = quantize(apply, weights, [RNG.normal(size=(4, 4)).astype(np.float32)])
    layers = [name for name in model.weights if name.endswith("/kernel")]
    assert len(layers) == 1 and "float/['cell']" in model.weights and "float/['kernel']" not in model.weights


FAMILIES = {
    "cnn": (models.CNN(widths=(8, 16), classes=10), (16, 16, 3)),
    "mlp": (models.MLP(widths=(32,), classes=4), (8, 8, 1)),
    "resnet": (models.ResNet(classes=4, stages=(1, 1), width=8), (16, 16, 3)),
    "vit": (models.ViT(classes=4, depth=1, width=32, heads=2, patch=8), (16, 16, 3)),
    "unet": (models.UNet(classes=3, widths=(8, 16)), (16, 16, 3)),
    "gpt": (models.GPT(vocab=20, depth=1, width=32, heads=2, context=16), (16,)),
}
SLOW = [pytest.param(name, marks=pytest.mark.full("[mlp]")) for name in FAMILIES if name != "mlp"]


@pytest.mark.parametrize("family", ["mlp", *SLOW])
def test_families_keep_their_outputs_and_shrink(family) -> None:
    module, shape = FAMILIES[family]
    model = models.as_model(module)
    x = RNG.integers(0, 20, (4, *shape)).astype(np.int32) if len(shape) == 1 else RNG.normal(size=(4, *shape))
    batch = {"tokens" if len(shape) == 1 else "image": x.astype(np.int32 if len(shape) == 1 else np.float32)}
    weights = model.init(jax.random.key(0), batch | {"label": np.zeros(4, np.int32)})
    # Initial values of some parameters are 0, which would hide a wrong product.
    weights = jax.tree.map(lambda w: w + 0.05 * RNG.normal(size=w.shape).astype(w.dtype), weights)

    def apply(w, inputs):
        return model.apply(*w, inputs, train=False, key=None)[0]

    quantized = quantize(apply, weights, [batch])
    exact, integer = jax.jit(apply)(weights, batch), jax.jit(quantized.apply)(quantized.weights, batch)
    spread = np.std(exact)
    assert np.sqrt(np.mean((integer - exact) ** 2)) < 0.1 * spread
    assert _bytes(quantized.weights) < 0.45 * _bytes(weights)
    assert not any(name.startswith("float/") and name.endswith("['kernel']") for name in quantized.weights)


def _bytes(tree) -> int:
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("apply", "batches", "message"),
    [
        (lambda w, x: x @ w, [], "needs examples"),
        (lambda w, x: x * w[:1], [np.ones((2, 2), np.float32)], "no dense layer or convolution"),
        (lambda w, x: x @ w, [np.full((1, 2), np.inf, np.float32)], "is not finite"),
    ],
)
def test_refusals(apply, batches, message) -> None:
    with pytest.raises(InputError, match=message):
        quantize(apply, np.eye(2, dtype=np.float32), batches)
