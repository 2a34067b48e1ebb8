"""jaxtrain.step.factories: pure steps that need no other part of the library."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import sharding
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Model, State
from jaxtrain.data.augment import Flip, compose
from jaxtrain.losses import MSE, CrossEntropy
from jaxtrain.metrics import ConfusionMatrix, Mean
from jaxtrain.models import CNN, MLP
from jaxtrain.optim import EMA
from jaxtrain.step import factories, make_eval_step, make_init, make_train_step

RNG = np.random.default_rng(0)
KEY = jax.random.key(5)
LINE = Model(
    init=lambda key, batch: ({"w": jax.random.normal(key, (3,))}, {}),
    apply=lambda params, extra, batch, *, train, key: (batch["x"] @ params["w"], extra),
)
NET = MLP(widths=(8,), classes=3, dropout=0.5)


def line_batch(n: int = 8) -> dict[str, jax.Array]:
    x = RNG.normal(size=(n, 3)).astype(np.float32)
    return {"x": jnp.array(x), "target": jnp.array(x @ np.array([1, -2, 3], np.float32))}


def image_batch(n: int = 8) -> dict[str, jax.Array]:
    image = RNG.normal(size=(n, 4, 4, 1)).astype(np.float32)
    return {"image": jnp.array(image), "label": jnp.array(RNG.integers(0, 3, n), jnp.int32)}


def test_docstring_has_the_doctest_example() -> None:
    [example] = [test for test in doctest.DocTestFinder().find(factories) if test.name == factories.__name__]
    source = "".join(line.source for line in example.examples)
    assert "make_train_step(" in source and "Experiment" not in source and "jaxtrain.train.loop" not in source


def test_one_sgd_step_matches_the_formula() -> None:
    batch, tx = line_batch(), optax.sgd(0.1)
    state = make_init(LINE, tx)(KEY, batch)
    after, metrics = make_train_step(LINE, MSE(), tx)(state, batch, KEY)
    x, w, y = (np.array(v, np.float64) for v in (batch["x"], state.params["w"], batch["target"]))
    gradient = 2 * x.T @ (x @ w - y) / len(y)
    np.testing.assert_allclose(after.params["w"], w - 0.1 * gradient, rtol=1e-5)
    assert metrics["grad_norm"].compute() == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert metrics["loss"].compute() == pytest.approx(np.mean((x @ w - y) ** 2), rel=1e-5)


def test_gradient_matches_finite_differences() -> None:
    with jax.enable_x64(True):
        model, loss, tx = MLP(widths=(3,), classes=2, activation="tanh"), CrossEntropy(0.1), optax.sgd(1.0)
        batch = {"image": jnp.array(RNG.normal(size=(4, 2))), "label": jnp.array([0, 1, 1, 0])}
        state = jax.jit(make_init(model, tx))(KEY, batch)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), state.params)
        state = state.replace(params=params)
        after, _ = jax.jit(make_train_step(model, loss, tx))(state, batch, KEY)
        moved = jax.tree.map(lambda new, old: np.asarray(old - new), after.params, params)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        value = jax.jit(lambda p: loss(model.apply({"params": unravel(p)}, batch["image"]), batch)[0])
        numeric = []
        for one in np.eye(len(flat)) * 1e-5:
            numeric.append((value(flat + one) - value(flat - one)) / 2e-5)
        np.testing.assert_allclose(
            jax.flatten_util.ravel_pytree(moved)[0], np.array(numeric), rtol=1e-6, atol=1e-9
        )


def test_step_is_pure_and_compiles_once() -> None:
    batch, tx = image_batch(), optax.adam(1e-2)
    state = jax.jit(make_init(NET, tx))(KEY, batch)
    before = copy.deepcopy(jax.device_get((state, batch)))
    train = jax.jit(make_train_step(NET, CrossEntropy(), tx))
    first, again = train(state, batch, KEY), train(state, batch, KEY)
    chex.assert_trees_all_equal(first, again)
    chex.assert_trees_all_equal(jax.device_get((state, batch)), before)
    train(first[0], image_batch(), jax.random.key(9))  # its own output, other values, another key
    assert train._cache_size() == 1


def test_step_increments_and_folds_into_the_key() -> None:
    drawn = []

    def prepare(batch: Any, key: Any) -> Any:
        return {**batch, "x": batch["x"] * 0 + jax.random.uniform(key)}

    def loss(outputs: Any, batch: Any) -> Any:
        return MSE()(outputs, batch)[0], {"drawn": Mean.of(batch["x"][:1, 0])}

    batch, tx = line_batch(), optax.sgd(0.0)
    train = jax.jit(make_train_step(LINE, loss, tx, prepare))
    state = start = make_init(LINE, tx, prepare)(KEY, batch)
    for number in range(3):
        assert state.step == number and state.step.dtype == jnp.int32
        state, metrics = train(state, batch, KEY)
        drawn.append(metrics["drawn"].compute())
    assert len(set(drawn)) == 3
    resumed = train(start.replace(step=jnp.array(2, jnp.int32)), batch, KEY)[1]
    assert resumed["drawn"].compute() == drawn[2]
    assert train(start, batch, jax.random.key(0))[1]["drawn"].compute() != drawn[0]


@pytest.mark.full("tests/step/test_step.py::test_step_is_pure_and_compiles_once")
def test_model_and_prepare_get_different_keys() -> None:
    seen: dict[str, Any] = {}

    def prepare(batch: Any, key: Any) -> Any:
        seen["prepare"] = jax.random.key_data(key).tolist()
        return batch

    def apply(params: Any, extra: Any, batch: Any, *, train: bool, key: Any) -> Any:
        seen["model"] = None if key is None else jax.random.key_data(key).tolist()
        return batch["x"] @ params["w"], extra

    batch, tx, model = line_batch(), optax.sgd(0.1), Model(LINE.init, apply)
    state = make_init(model, tx, prepare)(KEY, batch)
    with jax.disable_jit():
        make_train_step(model, MSE(), tx, prepare)(state, batch, KEY)
    assert seen["prepare"] != seen["model"]
    make_eval_step(model, MSE(), lambda b, key: b if key is None else 1 / 0)(state, batch)
    assert seen["model"] is None


BAD_LOSSES = {
    "not a scalar": (lambda outputs, batch: (outputs, {}), r"loss of shape \(8,\): average it"),
    "a bare metric": (
        lambda outputs, batch: (outputs.mean(), {"speed": outputs.mean()}),
        "'speed' as a bare array, .*Mean.of",
    ),
    "a number": (lambda outputs, batch: (outputs.mean(), {"n": 3}), "'n' as a bare int"),
}


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_invalid_loss_is_rejected_while_tracing(name: str, kind: str) -> None:
    loss, message = BAD_LOSSES[name]
    batch, tx = line_batch(), optax.sgd(0.1)
    state = make_init(LINE, tx)(KEY, batch)
    made = make_train_step(LINE, loss, tx) if kind == "train" else make_eval_step(LINE, loss)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(made, *((state, batch, KEY) if kind == "train" else (state, batch)))


def test_loss_is_reported_without_other_metrics() -> None:
    batch, tx = line_batch(), optax.sgd(0.1)
    state = make_init(LINE, tx)(KEY, batch)
    loss = lambda outputs, batch: (jnp.mean((outputs - batch["target"]) ** 2), {})  # noqa: E731
    metrics = make_train_step(LINE, loss, tx)(state, batch, KEY)[1]
    assert set(metrics) == {"loss", "grad_norm"}
    assert metrics["loss"].compute() == pytest.approx(
        float(loss(LINE.apply(state.params, {}, batch, train=True, key=None)[0], batch)[0])
    )


def test_post_update_functions_run_in_order_on_the_updated_state() -> None:
    class Noted:
        def init(self, state: State) -> State:
            return state.replace(extra={**state.extra, "seen": jnp.zeros(3)})

        def __call__(self, state: State) -> State:
            return state.replace(extra={**state.extra, "seen": state.params["w"]})

    def double(state: State) -> State:
        return state.replace(params={"w": 2 * state.params["w"]})

    batch, tx = line_batch(), optax.sgd(0.1)
    state = make_init(LINE, tx, post_update=(double, Noted()))(KEY, batch)
    plain = make_init(LINE, tx)(KEY, batch)
    chex.assert_trees_all_equal(state.params, plain.params)  # only init methods run at the start
    updated = make_train_step(LINE, MSE(), tx)(plain, batch, KEY)[0].params["w"]
    first = make_train_step(LINE, MSE(), tx, post_update=(double, Noted()))(state, batch, KEY)[0]
    np.testing.assert_array_equal(first.params["w"], 2 * updated)
    np.testing.assert_array_equal(first.extra["seen"], 2 * updated)
    second = make_train_step(LINE, MSE(), tx, post_update=(Noted(), double))(state, batch, KEY)[0]
    np.testing.assert_array_equal(second.extra["seen"], updated)


def test_data_init_sees_the_prepared_batch_before_the_optimizer_does() -> None:
    tx = optax.trace(0.9)
    prepare = lambda batch, key: {**batch, "x": batch["x"] + 100}  # noqa: E731

    def data_init(params: Any, batch: Any) -> Any:
        return {"w": batch["x"].mean(0)}

    batch, average = line_batch(), EMA()
    state = make_init(LINE, tx, prepare, data_init, (average,))(KEY, batch)
    np.testing.assert_allclose(state.params["w"], np.mean(batch["x"], 0) + 100, rtol=1e-6)
    np.testing.assert_array_equal(state.extra["ema"]["params"]["w"], state.params["w"])


def test_evaluation_uses_the_ema() -> None:
    batch, tx, ema = line_batch(), optax.sgd(0.1), EMA(0.5, "initial")
    state = make_init(LINE, tx, post_update=(ema,))(KEY, batch)
    train = jax.jit(make_train_step(LINE, MSE(), tx, post_update=(ema,)))
    average = np.array(state.params["w"], np.float64)
    for _ in range(3):
        state, _ = train(state, batch, KEY)
        average = 0.5 * average + 0.5 * np.array(state.params["w"])
    np.testing.assert_allclose(state.extra["ema"]["params"]["w"], average, rtol=1e-5)
    found = make_eval_step(LINE, MSE())(state, batch)["loss"].compute()
    assert found == pytest.approx(
        np.mean((np.array(batch["x"]) @ average - np.array(batch["target"])) ** 2), rel=1e-4
    )


def test_custom_step_factory_has_the_same_signature() -> None:
    """Signs instead of gradients, as a user would write it around the library's own step."""

    def factory(model: Any, loss_fn: Any, tx: Any, prepare: Any = factories.identity, after: Any = ()) -> Any:
        signs = optax.chain(optax.stateless(lambda u, p: jax.tree.map(jnp.sign, u)), tx)
        return make_train_step(model, loss_fn, signs, prepare, after)

    batch, tx = line_batch(), optax.sgd(0.25)
    state = make_init(LINE, tx)(KEY, batch)
    state = state.replace(opt_state=(optax.EmptyState(), state.opt_state))
    after, _ = factory(LINE, MSE(), tx)(state, batch, KEY)
    np.testing.assert_allclose(np.abs(after.params["w"] - state.params["w"]), 0.25, rtol=1e-6)


@pytest.mark.full("tests/program/test_parallel.py")
def test_eight_devices_take_the_same_step_as_one(mesh1: Any, mesh8: Any) -> None:
    model = CNN(widths=(4,), classes=3)
    tx, prepare = optax.sgd(0.1, momentum=0.9), compose(Flip())
    batch = jax.device_get(image_batch(32))
    state = jax.device_get(jax.jit(make_init(model, tx, prepare))(KEY, batch))

    def on(mesh: Any) -> Any:
        replicated = sharding.replicated(mesh)
        train = sharding.compile(
            make_train_step(model, CrossEntropy(0.1), tx, prepare),
            args=(replicated, sharding.batch_split(mesh), replicated),
            out=replicated,
        )
        after, metrics = train(state, batch, KEY)
        return jax.device_get((after, metrics))

    one, eight = on(mesh1), on(mesh8)
    chex.assert_trees_all_close(one, eight, rtol=1e-5, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one[0].params, state.params)
    assert min(jax.tree.leaves(moved)) > 1e-4, "a step too small to compare"


@pytest.mark.full("tests/step/test_step.py::test_step_is_pure_and_compiles_once")
def test_evaluation_changes_nothing_and_merges_over_padded_batches() -> None:
    model, tx = CNN(widths=(4,), classes=3, dropout=0.5), optax.sgd(0.1)
    batch = image_batch(6)
    state = jax.jit(make_init(model, tx))(KEY, batch)
    before = copy.deepcopy(jax.device_get(state))
    matrix = lambda outputs, b: {  # noqa: E731
        "confusion": ConfusionMatrix.of(outputs, b["label"], b.get("mask"))
    }
    evaluate = jax.jit(make_eval_step(model, CrossEntropy(), metrics_fn=matrix))

    def part(rows: list[int]) -> Any:
        """Those rows, padded to eight."""
        padded = np.array(rows + [0] * (8 - len(rows)))
        mask = jnp.arange(8) < len(rows)
        return evaluate(state, {**{k: v[padded] for k, v in batch.items()}, "mask": mask})

    full, parts = part([0, 1, 2, 3, 4, 5]), (part([0, 1, 2, 3]), part([4, 5]))
    chex.assert_trees_all_equal(jax.device_get(state), before)
    merged = {name: parts[0][name].merge(parts[1][name]) for name in full}
    assert merged["accuracy"].compute() == full["accuracy"].compute()
    assert merged["loss"].compute() == pytest.approx(full["loss"].compute(), rel=1e-5)
    np.testing.assert_array_equal(merged["confusion"].counts, full["confusion"].counts)
    assert full["confusion"].counts.sum() == 6
