"""What a loss, a model and a state must keep: complex gradients, shapes, dtypes and results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Model, State
from jaxtrain.metrics import Mean
from jaxtrain.optim import EMA, Lookahead, LossScale
from jaxtrain.step import make_init, make_train_step

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 3)).astype(np.float32)
TARGET = (X @ np.array([1 + 2j, -1 + 0.5j, 0.3 - 1j])).astype(np.complex64)
BATCH = {"x": jnp.array(X), "target": jnp.array(TARGET)}
COMPLEX = Model(
    lambda key, batch: ({"w": jnp.zeros(3, jnp.complex64)}, {}),
    lambda params, extra, batch, **_: (batch["x"] @ params["w"], extra),
)


def squared(outputs: Any, batch: Any) -> Any:
    mean = Mean.of(jnp.abs(outputs - batch["target"]) ** 2, batch.get("mask"))
    return mean.total / jnp.maximum(mean.count, 1), {"loss": mean}


def descend(update: Any, steps: int) -> np.ndarray:
    """Least squares in NumPy; ``update(w, gradient)`` with the direction of steepest ascent."""
    w = np.zeros(3, complex)
    for _ in range(steps):
        w = update(w, 2 * X.T @ (X @ w - TARGET) / 64)
    return w


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 4}, {"loss_scale": LossScale(8.0)}, {"guard": "skip"}]
)
def test_complex_parameters_descend_as_in_numpy(options: dict[str, Any]) -> None:
    tx = optax.sgd(0.1)
    scale = {"loss_scale": options["loss_scale"]} if "loss_scale" in options else {}
    state = make_init(COMPLEX, tx, **scale)(KEY, BATCH)
    step = jax.jit(make_train_step(COMPLEX, squared, tx, **options))
    for _ in range(20):
        state, metrics = step(state, BATCH, KEY)
    np.testing.assert_allclose(state.params["w"], descend(lambda w, g: w - 0.1 * g, 20), rtol=1e-4)
    norm = np.linalg.norm(2 * X.T @ (X @ descend(lambda w, g: w - 0.1 * g, 19) - TARGET) / 64)
    assert metrics["grad_norm"].compute() == pytest.approx(norm, rel=1e-3)


def test_complex_parameters_are_averaged_and_clipped() -> None:
    tx, stages = (
        optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
        (Lookahead(1, 0.5, 0.0).build(9),),
    )
    stages += (EMA(0.5, "initial"),)
    state = make_init(COMPLEX, tx, post_update=stages)(KEY, BATCH)
    state, _ = jax.jit(make_train_step(COMPLEX, squared, tx, post_update=stages))(state, BATCH, KEY)
    gradient = 2 * X.T @ -TARGET / 64
    moved = -0.1 * gradient * 0.5 / np.linalg.norm(gradient)
    np.testing.assert_allclose(state.params["w"], 0.5 * moved, rtol=1e-5)
    np.testing.assert_allclose(state.extra["ema"]["params"]["w"], 0.25 * moved, rtol=1e-5)


LINE = Model(
    lambda key, batch: ({"w": jnp.ones(3)}, {"seen": jnp.int32(0)}),
    lambda params, extra, batch, **_: (batch["x"] @ params["w"], extra),
)


def changing(**extra: Any) -> Model:
    return LINE._replace(apply=lambda params, old, batch, **_: (batch["x"] @ params["w"], extra))


CHANGES = {
    "dtype": (changing(seen=jnp.float32(0)), (), r"extra/seen from int32\[\] to float32\[\]"),
    "shape": (changing(seen=jnp.zeros(2, jnp.int32)), (), r"extra/seen from int32\[\] to int32\[2\]"),
    "more": (changing(seen=jnp.int32(0), more=jnp.ones(2)), (), r"extra/more from absent to float32\[2\]"),
    "fewer": (changing(), (), r"extra/seen from int32\[\] to absent"),
    "stage": (
        LINE,
        (lambda state: state.replace(params={"w": state.params["w"].astype(jnp.bfloat16)}),),
        r"params/w from float32\[3\] to bfloat16\[3\]",
    ),
    "nothing": (LINE, (lambda state: None,), "returns a NoneType as its state"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_state_that_an_update_changes_is_refused_by_path(name: str, scaled: bool) -> None:
    model, stages, says = CHANGES[name]
    options = {"loss_scale": LossScale()} if scaled else {}
    tx = optax.adam(0.1)
    state = jax.eval_shape(make_init(model, tx, **options), KEY, BATCH)
    step = make_train_step(model, squared, tx, post_update=stages, guard="stop", **options)
    with pytest.raises(InputError, match=says):
        jax.eval_shape(step, state, BATCH, KEY)


def test_parameters_without_a_gradient_are_refused_by_path() -> None:
    model = LINE._replace(init=lambda key, batch: ({"w": jnp.ones(3), "order": [jnp.arange(3)]}, {}))
    state = jax.eval_shape(make_init(model, optax.sgd(0.1)), KEY, BATCH)
    with pytest.raises(InputError, match=r"parameter order/0 is int32\[3\], which no gradient exists for"):
        jax.eval_shape(make_train_step(model, squared, optax.sgd(0.1)), state, BATCH, KEY)


def test_a_step_is_traced_once_where_the_state_starts_with_weak_types() -> None:
    model = LINE._replace(
        init=lambda key, batch: ({"w": jnp.full(3, 0.1)}, {"seen": jnp.asarray(0)}),
        apply=lambda params, extra, batch, **_: (batch["x"] @ params["w"], {"seen": jnp.asarray(2) * 3}),
    )
    tx = optax.sgd(0.1)
    state = jax.jit(make_init(model, tx))(KEY, BATCH)
    step = jax.jit(make_train_step(model, squared, tx))
    for _ in range(3):
        state, _ = step(state, BATCH, KEY)
    assert step._cache_size() == 1


class NoPytree:
    def merge(self, other: Any) -> Any: ...
    def compute(self) -> float:
        return 0.0


LOSSES = {
    "scalar alone": (lambda o, b: o.sum(), "must return .loss, metrics."),
    "no dict": (lambda o, b: (o.sum(), o), "must return .loss, metrics."),
    "vector": (lambda o, b: (o, {}), r"a loss of shape \(64,\)"),
    "integer": (lambda o, b: (o.sum().astype(jnp.int32), {}), "a loss of int32: it must be a real float"),
    "complex": (lambda o, b: (o.sum() * 1j, {}), "a loss of complex64: it must be a real float"),
    "nothing": (lambda o, b: (None, {}), "a NoneType as its loss"),
    "matrix": (lambda o, b: (o.sum(), {"table": jnp.ones((2, 2))}), "'table' as a bare"),
    "object": (lambda o, b: (o.sum(), {"odd": NoPytree()}), "'odd' with a NoPytree in it"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_returns_something_else_is_refused(name: str) -> None:
    loss, says = LOSSES[name]
    state = State(jnp.int32(0), {"w": jnp.ones(3)}, {"seen": jnp.int32(0)}, optax.sgd(0.1).init({}))
    with pytest.raises(InputError, match=says):
        jax.eval_shape(make_train_step(LINE, loss, optax.sgd(0.1)), state, BATCH, KEY)


def test_averages_leave_integers_booleans_and_keys_as_they_are() -> None:
    params = {"w": jnp.ones(2), "n": jnp.int32(7), "on": jnp.array(True), "key": jax.random.key(3)}
    new = {"w": jnp.zeros(2), "n": jnp.int32(9), "on": jnp.array(False), "key": jax.random.key(4)}
    for stage, name in ((EMA(0.5), "ema"), (Lookahead(1).build(5), "lookahead")):
        state = jax.jit(stage.init)(State(jnp.int32(1), params, {}, ()))
        after = jax.jit(stage)(state.replace(params=new)).extra[name]["params"]
        assert int(after["n"]) == 9 and not after["on"] and after["n"].dtype == jnp.int32
        assert (jax.random.key_data(after["key"]) == jax.random.key_data(new["key"])).all()
