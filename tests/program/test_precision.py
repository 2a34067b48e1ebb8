"""jaxtrain.models.precision and jaxtrain.optim.loss_scale: half precision with float32 state."""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import monitor
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Model, State
from jaxtrain.losses import MSE, CrossEntropy
from jaxtrain.metrics import Mean
from jaxtrain.models import CNN, MLP, as_model, compute_in
from jaxtrain.optim import EMA, LossScale
from jaxtrain.step import make_eval_step, make_init, make_train_step
from jaxtrain.step.packing import PackedMetrics

KEY = jax.random.key(5)
NET = CNN(widths=(4,), classes=3)
# Gradients are ``gain`` times the input's sum, in the precision that the model computes in.
LINE = Model(
    init=lambda key, batch: ({"w": jnp.ones(3)}, {"seen": jnp.zeros(())}),
    apply=lambda params, extra, batch, *, train, key: (
        (batch["x"] * params["w"][None]).sum(-1) * batch["gain"].astype(params["w"].dtype),
        {**extra, "seen": extra["seen"] + 1},
    ),
)


def images(n: int = 16) -> dict[str, jax.Array]:
    image = np.random.default_rng(0).normal(size=(n, 4, 4, 1)).astype(np.float32)
    return {"image": jnp.array(image), "label": jnp.array((image.mean((1, 2, 3)) > 0).astype(np.int32))}


def lines(gain: float = 1.0, n: int = 8) -> dict[str, jax.Array]:
    x = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    return {"x": jnp.array(x), "gain": jnp.full(n, gain), "target": jnp.zeros(n)}


def total(outputs: jax.Array, batch: Any) -> Any:
    """A loss whose gradient is that of the outputs themselves."""
    return outputs.mean(), {"loss": Mean.of(outputs)}


# --- half precision


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_state_and_gradients_are_float32_and_products_are_not(precision: Any) -> None:
    seen = []

    def look(updates: Any, state: Any, params: Any = None) -> Any:
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(updates))
        return updates, state

    model = compute_in(NET, precision)
    tx = optax.chain(optax.GradientTransformation(lambda p: optax.EmptyState(), look), optax.adam(1e-3))
    state = jax.eval_shape(make_init(model, tx), KEY, images())
    step = make_train_step(model, CrossEntropy(), tx)
    after, metrics = jax.eval_shape(step, state, images(), KEY)
    assert {str(x.dtype) for x in jax.tree.leaves((after, metrics))} == {"float32", "int32"}
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert set(map(str, seen)) == {"float32"}
    text = jax.jit(step).lower(state, images(), KEY).as_text()
    kind = {"bfloat16": "bf16", "float16": "f16"}[precision]
    products = [
        line for line in text.splitlines() if "dot_general" in line or "stablehlo.convolution" in line
    ]
    assert products and all(f"x{kind}>" in line and "xf32>" not in line for line in products)


def test_float32_keeps_the_model_and_unknown_precisions_are_rejected() -> None:
    assert compute_in(LINE, "float32") is LINE
    with pytest.raises(
        InputError, match="precision is 'float8': it must be one of float32, bfloat16, float16"
    ):
        compute_in(LINE, "float8")  # type: ignore[arg-type]


def test_float16_rounds() -> None:
    model, batch = compute_in(LINE, "float16"), lines()
    out, _ = model.apply({"w": jnp.full(3, 1.0001)}, {"seen": 0}, batch, train=False, key=None)
    x = np.asarray(batch["x"]).astype(np.float16)
    np.testing.assert_allclose(out, x.astype(np.float32).sum(-1), rtol=2e-3, atol=2e-3)
    assert out.dtype == jnp.float32 and out[0] == np.float32(np.float16(out[0]))


# --- the scale


def test_scale_matches_the_reference() -> None:
    """Written out in Python, over gradients that overflow now and then."""
    config = LossScale(initial=64.0, period=3, factor=4.0)
    state, scale, good = config.init(), 64.0, 0
    update = jax.jit(config.update)
    finite = np.random.default_rng(3).random(300) > 0.3
    seen = set()
    for ok in finite:
        if ok:
            good += 1
            if good == 3:
                scale, good = scale * 4, 0
        else:
            scale, good = max(scale / 4, 1.0), 0
        state = update(state, jnp.array(ok))
        assert (float(state["scale"]), int(state["good"])) == (scale, good)
        seen.add(scale)
    assert {1.0, 64.0, 256.0} <= seen
    assert state["scale"].dtype == jnp.float32 and state["good"].dtype == jnp.int32


def test_scale_stays_finite_without_overflow() -> None:
    config = LossScale(period=1, factor=2.0**20)
    state = config.init()
    for _ in range(20):
        state = config.update(state, jnp.array(True))
    assert jnp.isfinite(state["scale"])


@pytest.mark.parametrize("wrong", [{"initial": 0.5}, {"period": 0}, {"factor": 1.0}, {"initial": math.inf}])
def test_invalid_settings_are_rejected(wrong: Any) -> None:
    with pytest.raises(InputError, match="initial and period must be at least 1, and factor above 1"):
        LossScale(**wrong)


# --- the scale in a step


def scaled(model: Any, loss: Any, config: LossScale, **options: Any) -> Any:
    tx = optax.adam(0.1)
    start = make_init(model, tx, post_update=options.get("post_update", ()), loss_scale=config)
    return start, jax.jit(make_train_step(model, loss, tx, loss_scale=config, **options))


@pytest.mark.full("tests/program/test_precision.py::test_scale_keeps_gradients_that_float16_would_lose")
def test_scaling_does_not_change_applied_updates() -> None:
    config, tx, batch = LossScale(initial=2.0**10), optax.adam(0.1), images()
    start, step = scaled(NET, CrossEntropy(), config)
    state = jax.jit(start)(KEY, batch)
    plain = state.replace(extra={"batch_stats": state.extra["batch_stats"]})
    update = jax.jit(make_train_step(NET, CrossEntropy(), tx))
    for _ in range(3):
        state, metrics = step(state, batch, KEY)
        plain, expected = update(plain, batch, KEY)
    found = state.replace(extra={"batch_stats": state.extra["batch_stats"]})
    chex.assert_trees_all_close(found, plain, rtol=1e-4, atol=1e-6)
    assert set(metrics) == {*expected, "loss_scale", "skipped"}
    for name, metric in expected.items():
        assert metrics[name].compute() == pytest.approx(metric.compute(), rel=1e-4)
    assert metrics["loss_scale"].compute() == 2.0**10 and metrics["skipped"].compute() == 0
    assert int(state.extra["loss_scale"]["good"]) == 3 and "loss_scale" not in plain.extra


def test_reported_loss_is_unscaled() -> None:
    start, step = scaled(LINE, lambda outputs, batch: (outputs.mean(), {}), LossScale())
    batch = lines()
    _, metrics = step(start(KEY, batch), batch, KEY)
    assert metrics["loss"].compute() == pytest.approx(float(batch["x"].sum(1).mean()), rel=1e-4)


def merged(*metrics: Any) -> dict[str, Any]:
    return monitor.merge_all(PackedMetrics.of(each).rows()[0] for each in metrics)


def test_overflow_skips_the_update_and_advances_only_the_step() -> None:
    config = LossScale(initial=2.0**15, period=2)
    start, step = scaled(compute_in(LINE, "float16"), total, config)
    state = start(KEY, lines())
    state, _ = step(state, lines(), KEY)
    before = jax.device_get(state)
    after, metrics = step(state, lines(gain=1000.0), KEY)  # 2^15 * 1000 / 8 is above 65,504
    chex.assert_trees_all_equal(after.params, before.params)
    chex.assert_trees_all_equal(after.opt_state, before.opt_state)
    assert after.extra["seen"] == before.extra["seen"] == 1 and after.step == before.step + 1 == 2
    assert (float(after.extra["loss_scale"]["scale"]), int(after.extra["loss_scale"]["good"])) == (2.0**14, 0)
    assert metrics["skipped"].compute() == 1 and math.isfinite(metrics["loss"].compute())
    values = merged(metrics)
    assert values["grad_norm"] == 0 and values["loss_scale"] == 2.0**15
    later, taken = step(after, lines(), KEY)
    assert later.extra["seen"] == 2 and (later.params["w"] != after.params["w"]).all()
    both = merged(metrics, taken)
    assert both["grad_norm"] == taken["grad_norm"].compute() > 0 and both["skipped"] == 0.5


def test_scale_recovers_during_a_run() -> None:
    config, ema = LossScale(initial=2.0**15, period=2), EMA(0.5)
    start, step = scaled(compute_in(LINE, "float16"), total, config, post_update=(ema,))
    state = start(KEY, lines())
    scales, averaged = [], []
    for gain in (1000.0, 1000.0, 1.0, 1.0, 1.0):
        state, metrics = step(state, lines(gain), KEY)
        scales.append(metrics["loss_scale"].compute())
        averaged.append(int(state.extra["ema"]["updates"]))
    assert averaged == [0, 0, 1, 2, 3]  # a skipped update moves no average
    # 2^15 and 2^14 times 1000 / 8 are above 65,504; then come two finite gradients in a row.
    assert scales == [2.0**15, 2.0**14, 2.0**13, 2.0**13, 2.0**14]
    assert state.step == 5 and set(state.extra) == {"seen", "ema", "loss_scale"}
    assert (state.extra["ema"]["params"]["w"] != state.params["w"]).all()


def test_gradient_overflow_at_the_minimum_scale_is_reported() -> None:
    """At a scale of 1 it is the model that overflows: the recorder ends such a run."""
    start, step = scaled(compute_in(LINE, "float16"), total, LossScale(initial=2.0))
    state, found = start(KEY, lines()), []
    for _ in range(2):
        state, metrics = step(state, lines(gain=math.nan), KEY)
        found.append(metrics)
    assert [metrics["loss_scale"].compute() for metrics in found] == [2, 1]
    assert [metrics["skipped"].compute() for metrics in found] == [1, 1]
    assert found[0]["grad_norm"].compute() == 0 and math.isnan(found[1]["grad_norm"].compute())
    assert float(state.extra["loss_scale"]["scale"]) == 1 and (state.params["w"] == 1).all()


def test_forward_overflow_makes_the_loss_not_finite() -> None:
    start, step = scaled(compute_in(LINE, "float16"), MSE(), LossScale())
    state = start(KEY, lines())
    state, metrics = step(state, {**lines(), "x": jnp.full((8, 3), 6e4)}, KEY)
    assert not math.isfinite(metrics["loss"].compute()) and metrics["skipped"].compute() == 1


def test_scale_keeps_gradients_that_float16_would_lose() -> None:
    model, batch = compute_in(LINE, "float16"), lines(gain=2.0**-23)
    batch["x"] = 1 + batch["x"] ** 2  # nothing cancels
    grads = {}
    for config in (None, LossScale()):
        tx = optax.trace(0.0)
        state = make_init(model, tx, loss_scale=config)(KEY, batch)
        after, _ = make_train_step(model, total, tx, loss_scale=config)(state, batch, KEY)
        grads[config] = after.opt_state.trace["w"]
    exact = 2.0**-23 * np.asarray(batch["x"], np.float64).mean(0)
    assert not np.allclose(grads[None], exact, rtol=0.1, atol=0)
    np.testing.assert_allclose(grads[LossScale()], exact, rtol=0.01)


@pytest.mark.full("tests/program/test_precision.py::test_scale_keeps_gradients_that_float16_would_lose")
def test_float16_training_lowers_the_loss() -> None:
    model, config, batch = (
        compute_in(MLP(widths=(16,), classes=2), "float16"),
        LossScale(period=20),
        images(64),
    )
    start, step = scaled(model, CrossEntropy(), config)
    state = start(KEY, batch)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch, KEY)
        losses.append(metrics["loss"].compute())
    assert losses[-1] < 0.2 * losses[0]
    assert float(state.extra["loss_scale"]["scale"]) >= 2.0**15
    evaluated = jax.jit(make_eval_step(model, CrossEntropy()))(state, batch)
    assert evaluated["accuracy"].compute() > 0.95


@pytest.mark.full("tests/program/test_precision.py")
def test_step_without_scale_is_bitwise_unchanged() -> None:
    """Against the step written in a few lines, without loss scaling."""
    net, tx, batch = NET.clone(dropout=0.5), optax.adam(0.1), images()
    state = jax.jit(make_init(net, tx))(KEY, batch)
    pair = as_model(net)

    def written_out(state: State, batch: Any, key: jax.Array) -> State:
        _, model_key = jax.random.split(jax.random.fold_in(key, state.step))

        def objective(params: Any) -> Any:
            outputs, extra = pair.apply(params, state.extra, batch, train=True, key=model_key)
            return CrossEntropy()(outputs, batch)[0], extra

        (_, extra), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return State(state.step + 1, optax.apply_updates(state.params, updates), extra, opt_state)

    one, other = jax.jit(make_train_step(net, CrossEntropy(), tx)), jax.jit(written_out)
    found = expected = state
    for _ in range(3):
        found, expected = one(found, batch, KEY)[0], other(expected, batch, KEY)
    chex.assert_trees_all_equal(found, expected)


def test_function_pair_that_returns_a_new_dict_trains_with_a_scale():
    """What is not the model's, such as the scale, is neither handed to it nor expected back."""

    def init(key, batch):
        return {"w": jnp.ones((3,))}, {"seen": jnp.zeros((), jnp.int32)}

    def apply(params, extra, batch, *, train, key):
        assert set(extra) == {"seen"}
        return (batch["x"] * params["w"][None]).sum(1), {"seen": extra["seen"] + 1}

    def loss(outputs, batch):
        value = (outputs**2).mean()
        return value, {"loss": Mean.of(value)}

    scaling, tx, batch = LossScale(initial=8.0), optax.sgd(0.1), {"x": jnp.ones((4, 3))}
    state = make_init((init, apply), tx, loss_scale=scaling)(KEY, batch)
    for accumulate in (1, 2):
        step = jax.jit(make_train_step((init, apply), loss, tx, accumulate=accumulate, loss_scale=scaling))
        after, _ = step(state, batch, KEY)
        assert set(after.extra) == {"seen", "loss_scale"} and int(after.extra["seen"]) == accumulate
    make_eval_step((init, apply), loss)(after, batch)
    with pytest.raises(InputError, match=r"returns a tuple after its parameters: return \(params, extra\)"):
        make_init((lambda key, batch: ({"w": jnp.ones(3)}, ()), apply), tx)(KEY, batch)
