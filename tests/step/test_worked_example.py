"""A numerical example from an article, by hand and by autodiff, in float64.

Inputs 1 2 3; weights [[1 2 3], [4 5 6]]; biases 1 2; ReLU; squared error to [0, 1]. The article prints 12
and 29 for the first layer, where the sums are 15 and 34. The shapes of its second layer do not fit; the one
here is 2×2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.losses import MSE
from jaxtrain.models import MLP
from jaxtrain.step import make_init, make_train_step

X, TARGET = [1.0, 2.0, 3.0], [0.0, 1.0]
W1, B1 = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [1.0, 2.0]
W2, B2 = [[0.1, -0.2], [0.3, 0.4]], [0.5, -0.5]

# By hand. hidden = relu(W1 x + b1):  1+4+9+1 = 15 and 4+10+18+2 = 34, both above 0.
HIDDEN = [15.0, 34.0]
# y = W2 hidden + b2:  1.5-6.8+0.5 = -4.8 and 4.5+13.6-0.5 = 17.6.
Y = [-4.8, 17.6]
# loss = mean of (y - t)^2 over the two outputs:  (4.8^2 + 16.6^2) / 2 = (23.04 + 275.56) / 2.
LOSS = 149.3
# dy = 2 (y - t) / 2 = y - t.
DY = [-4.8, 16.6]
# dW2 = dy hidden^T, db2 = dy.
DW2 = [[-72.0, -163.2], [249.0, 564.4]]
# dhidden = W2^T dy:  0.1*-4.8 + 0.3*16.6 = 4.5 and -0.2*-4.8 + 0.4*16.6 = 7.6; ReLU lets both pass.
DHIDDEN = [4.5, 7.6]
# dW1 = dhidden x^T, db1 = dhidden.
DW1 = [[4.5, 9.0, 13.5], [7.6, 15.2, 22.8]]


@pytest.fixture
def float64() -> Any:
    with jax.enable_x64(True):
        yield


def params() -> dict[str, Any]:
    """The parameters in Flax's layout: kernels are [in, out]."""
    return {
        "dense0": {"kernel": jnp.array(W1).T, "bias": jnp.array(B1)},
        "head": {"kernel": jnp.array(W2).T, "bias": jnp.array(B2)},
    }


def batch() -> dict[str, Any]:
    return {"image": jnp.array([X]), "target": jnp.array([TARGET])}


def test_forward_pass_matches_the_hand_computation(float64: Any) -> None:
    net = MLP(widths=(2,), classes=2)
    y, seen = net.apply({"params": params()}, batch()["image"], capture_intermediates=True)
    hidden = seen["intermediates"]["dense0"]["__call__"][0]
    assert y.dtype == np.float64
    np.testing.assert_allclose(hidden[0], HIDDEN, rtol=1e-14)
    np.testing.assert_allclose(y[0], Y, rtol=1e-14)
    loss, _ = MSE()(y, batch())
    np.testing.assert_allclose(loss, LOSS, rtol=1e-14)


def test_autodiff_matches_the_hand_computation(float64: Any) -> None:
    def loss(p: Any) -> Any:
        return MSE()(MLP(widths=(2,), classes=2).apply({"params": p}, batch()["image"]), batch())[0]

    grads = jax.grad(loss)(params())
    np.testing.assert_allclose(grads["head"]["kernel"].T, DW2, rtol=1e-13)
    np.testing.assert_allclose(grads["head"]["bias"], DY, rtol=1e-13)
    np.testing.assert_allclose(grads["dense0"]["kernel"].T, DW1, rtol=1e-13)
    np.testing.assert_allclose(grads["dense0"]["bias"], DHIDDEN, rtol=1e-13)


def test_the_train_step_subtracts_the_gradient_times_the_learning_rate(float64: Any) -> None:
    net, tx = MLP(widths=(2,), classes=2), optax.sgd(0.01)
    state = make_init(net, tx)(jax.random.key(0), batch()).replace(params=params())
    state, metrics = jax.jit(make_train_step(net, MSE(), tx))(state, batch(), jax.random.key(0))
    assert metrics["loss"].compute() == pytest.approx(LOSS, rel=1e-14)
    np.testing.assert_allclose(
        state.params["head"]["kernel"].T, np.array(W2) - 0.01 * np.array(DW2), rtol=1e-13
    )
    np.testing.assert_allclose(
        state.params["dense0"]["kernel"].T, np.array(W1) - 0.01 * np.array(DW1), rtol=1e-13
    )


def test_relu_has_no_gradient_below_zero(float64: Any) -> None:
    below = params()
    below["dense0"]["bias"] = jnp.array([1.0, -33.0])  # the second sum is now 32 - 33 = -1

    def loss(p: Any) -> Any:
        return MSE()(MLP(widths=(2,), classes=2).apply({"params": p}, batch()["image"]), batch())[0]

    grads = jax.grad(loss)(below)
    # y = (1.5 + 0.5, 4.5 - 0.5) = (2, 4); dy = (2, 3); the first unit gets 0.1*2 + 0.3*3 = 1.1.
    np.testing.assert_allclose(grads["dense0"]["bias"], [1.1, 0], rtol=1e-13)
    np.testing.assert_allclose(grads["dense0"]["kernel"].T, [[1.1, 2.2, 3.3], [0, 0, 0]], rtol=1e-13)
