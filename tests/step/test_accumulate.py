"""jaxtrain.step.gradients: accumulated microbatches equal the full batch."""

from __future__ import annotations

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Model
from jaxtrain.losses import MSE, CrossEntropy
from jaxtrain.metrics import Mean
from jaxtrain.models import CNN, MLP, as_model
from jaxtrain.optim import EMA, LossScale
from jaxtrain.step import make_init, make_train_step
from jaxtrain.step.gradients import accumulate_gradients, gradient_of

KEY = jax.random.key(5)
RNG = np.random.default_rng(0)
LINE = Model(
    init=lambda key, batch: ({"w": jnp.array([1.0, -2.0, 0.5])}, {"order": jnp.zeros((), jnp.int32)}),
    apply=lambda params, extra, batch, *, train, key: (
        batch["x"] @ params["w"],
        {**extra, "order": 10 * extra["order"] + batch["row"][0]},
    ),
)
MASKS = {
    "uneven": [1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1],
    "one of two is empty": [1, 0] * 6,
    "nothing": [0] * 12,
}


@pytest.fixture
def float64() -> Any:
    with jax.enable_x64(True):
        yield


def classes(n: int = 12) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    return {"image": jnp.array(rng.normal(size=(n, 5))), "label": jnp.array(rng.integers(0, 3, n), jnp.int32)}


def lines(n: int = 8) -> dict[str, jax.Array]:
    x = np.random.default_rng(1).normal(size=(n, 3)).astype(np.float32)
    return {"x": jnp.array(x), "target": jnp.array(x.sum(1)), "row": jnp.arange(n, dtype=jnp.int32)}


def weighted(outputs: jax.Array, batch: Any) -> Any:
    """Each example counts by its weight."""
    error, weight = (outputs**2).mean(-1), batch["weight"]
    total, count = (weight * error).sum(), weight.sum()
    return total / count, {"loss": Mean(total, count), "largest": Mean.of(outputs.max(-1))}


def step_from(state: Any, batch: Any, loss: Any, tx: Any, **options: Any) -> Any:
    model = MLP(widths=(4,), classes=3, activation="tanh")
    return jax.jit(make_train_step(model, loss, tx, **options))(state, batch, KEY)


def started(tx: Any) -> Any:
    """In float64, which an initialisation is not."""
    state = make_init(MLP(widths=(4,), classes=3, activation="tanh"), tx)(KEY, classes())
    params = jax.tree.map(lambda x: x.astype(jnp.float64), state.params)
    return state.replace(params=params, opt_state=tx.init(params))


@pytest.mark.full("[plain]")
@pytest.mark.parametrize("case", ["plain", "weights", *MASKS])
def test_update_and_metrics_equal_the_full_batch(case: str, float64: Any) -> None:
    batch, tx = classes(), optax.sgd(0.1, momentum=0.9)
    loss = weighted if case == "weights" else CrossEntropy(0.1, top=2)
    batch |= {"mask": jnp.array(MASKS[case], bool)} if case in MASKS else {}
    batch |= {"weight": jnp.array(RNG.uniform(0, 0.1, 12))} if case == "weights" else {}
    state = started(tx)
    full, metrics = step_from(state, batch, loss, tx)
    assert (metrics["grad_norm"].compute() > 1e-3) == (case != "nothing")
    for accumulate, unroll in ((2, True), (4, False)) if case == "plain" else ((2, False),):
        found, merged = step_from(state, batch, loss, tx, accumulate=accumulate, unroll=unroll)
        chex.assert_trees_all_close(found, full, rtol=1e-12, atol=1e-14)
        assert set(merged) == set(metrics)
        for name, metric in metrics.items():
            assert merged[name].compute() == pytest.approx(metric.compute(), rel=1e-12, nan_ok=True), name
            assert merged[name].count == pytest.approx(metric.count)


@pytest.mark.full("tests/step/test_accumulate.py::test_update_and_metrics_equal_the_full_batch")
def test_loss_is_the_mean_over_all_examples() -> None:
    batch = {**lines(), "weight": jnp.array(RNG.uniform(size=8), jnp.float32)}
    params, extra = LINE.init(KEY, batch)
    full = gradient_of(LINE, lambda outputs, batch: weighted(outputs[:, None], batch))
    found = accumulate_gradients(full, 2)(params, extra, batch, KEY, None)
    expected = full(params, extra, batch, KEY, None)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    np.testing.assert_allclose(found.grads["w"], expected.grads["w"], rtol=1e-5)


def test_microbatches_are_strided_rows_in_order_and_pass_statistics_on() -> None:
    batch, tx = lines(), optax.sgd(0.1)
    state = make_init(LINE, tx)(KEY, batch)
    after, _ = make_train_step(LINE, MSE(), tx, accumulate=4)(state, batch, KEY)
    assert int(after.extra["order"]) == 123  # rows 0 4, 1 5, 2 6, 3 7: the first of each
    assert int(make_train_step(LINE, MSE(), tx)(state, batch, KEY)[0].extra["order"]) == 0


@pytest.mark.full("tests/step/test_accumulate.py::test_update_and_metrics_equal_the_full_batch")
def test_batch_norm_matches_microbatches_by_hand() -> None:
    net, tx = CNN(widths=(2,), convs=1, classes=3), optax.sgd(0.1)
    image = RNG.normal(size=(8, 4, 4, 1)).astype(np.float32)
    batch = {"image": jnp.array(image), "label": jnp.array(RNG.integers(0, 3, 8), jnp.int32)}
    state = jax.jit(make_init(net, tx, post_update=(EMA(0.5),)))(KEY, batch)
    model, stats, grads = as_model(net), {"batch_stats": state.extra["batch_stats"]}, []

    @jax.jit
    def gradient(stats: Any, part: Any) -> Any:
        def objective(params: Any) -> Any:
            outputs, extra = model.apply(params, stats, part, train=True, key=KEY)
            return CrossEntropy()(outputs, part)[0], extra

        return jax.grad(objective, has_aux=True)(state.params)

    for i in range(2):
        found, stats = gradient(stats, {name: field[i::2] for name, field in batch.items()})
        grads.append(found)
    mean = jax.tree.map(lambda *g: sum(g) / 2, *grads)
    step = jax.jit(make_train_step(net, CrossEntropy(), tx, post_update=(EMA(0.5),), accumulate=2))
    after, metrics = step(state, batch, KEY)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, mean)
    chex.assert_trees_all_close(after.params, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(after.extra["batch_stats"], stats["batch_stats"], rtol=1e-5, atol=1e-6)
    assert metrics["grad_norm"].compute() == pytest.approx(float(optax.tree.norm(mean)), rel=1e-4)
    assert set(after.extra) == {"batch_stats", "ema"}


def test_prepare_draws_per_batch_and_dropout_per_microbatch() -> None:
    """``prepare`` sees all rows once, with the key of an undivided step; dropout has a key for each part."""
    calls, batch, tx = [], lines(), optax.sgd(0.0)

    def prepare(batch: Any, key: Any) -> Any:
        calls.append(batch["x"].shape)
        return {**batch, "x": batch["x"] + jax.random.normal(key, batch["x"].shape)}

    def apply(params: Any, extra: Any, batch: Any, *, train: bool, key: Any) -> Any:
        return batch["x"] @ params["w"], {**extra, "drawn": extra["drawn"] * 2 + jax.random.uniform(key)}

    def loss(outputs: Any, batch: Any) -> Any:
        return outputs.mean(), {"loss": Mean.of(outputs)}

    model = Model(lambda key, batch: (LINE.init(key, batch)[0], {"drawn": jnp.zeros(())}), apply)
    state = make_init(model, tx)(KEY, batch)
    one, plain = make_train_step(model, loss, tx, prepare)(state, batch, KEY)
    two, parts = make_train_step(model, loss, tx, prepare, accumulate=2)(state, batch, KEY)
    assert calls == [(8, 3), (8, 3)]
    assert plain["loss"].compute() == pytest.approx(parts["loss"].compute(), rel=1e-5)
    _, key = jax.random.split(jax.random.fold_in(KEY, 0))
    drawn = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(2)]
    assert float(one.extra["drawn"]) == float(jax.random.uniform(key))
    assert float(two.extra["drawn"]) == pytest.approx(drawn[0] * 2 + drawn[1])


@pytest.mark.full("tests/step/test_accumulate.py::test_update_and_metrics_equal_the_full_batch")
def test_dropout_differs_between_microbatches() -> None:
    """Twice the same rows: with one mask for both, the two outputs would be equal."""
    net = MLP(widths=(64,), classes=1, dropout=0.5)
    image = jnp.array(np.repeat(RNG.normal(size=(1, 5)), 2, axis=0), jnp.float32)
    seen: list[Any] = []

    def loss(outputs: Any, batch: Any) -> Any:
        jax.debug.callback(lambda x: seen.append(float(x[0, 0])), outputs)
        return outputs.mean(), {"loss": Mean.of(outputs)}

    state = make_init(net, optax.sgd(0.1))(KEY, {"image": image})
    jax.block_until_ready(
        make_train_step(net, loss, optax.sgd(0.1), accumulate=2)(state, {"image": image}, KEY)
    )
    jax.effects_barrier()
    assert len(set(seen)) == 2


# --- with a loss scale


def test_loss_scale_is_divided_out_before_microbatches_are_added() -> None:
    batch, tx, config = lines(), optax.sgd(0.1), LossScale(initial=2.0**20)
    state = make_init(LINE, tx, loss_scale=config)(KEY, batch)
    plain, _ = make_train_step(LINE, MSE(), tx)(make_init(LINE, tx)(KEY, batch), batch, KEY)
    after, metrics = make_train_step(LINE, MSE(), tx, accumulate=4, loss_scale=config)(state, batch, KEY)
    np.testing.assert_allclose(after.params["w"], plain.params["w"], rtol=1e-5)
    assert metrics["skipped"].compute() == 0 and int(after.extra["loss_scale"]["good"]) == 1


def test_overflow_in_one_microbatch_skips_the_update() -> None:
    batch, tx, config = lines(), optax.sgd(0.1), LossScale()
    batch["x"] = batch["x"].at[5].set(jnp.inf)
    state = make_init(LINE, tx, loss_scale=config)(KEY, batch)
    after, metrics = make_train_step(LINE, MSE(), tx, accumulate=4, loss_scale=config)(state, batch, KEY)
    np.testing.assert_array_equal(after.params["w"], state.params["w"])
    assert after.step == 1 and after.extra["order"] == 0 and metrics["skipped"].compute() == 1


# --- what is refused


@pytest.mark.parametrize(
    ("accumulate", "change", "message"),
    [
        (3, {}, "batch 8 does not divide into accumulate=3 microbatches: use batch=6 or 9, or another"),
        (16, {}, "batch 8 does not divide into accumulate=16 microbatches: use batch=16, or another"),
        (
            2,
            {"table": jnp.zeros((5, 2))},
            r"of 8 examples, and 'table' has shape \[5, 2\]: give it a row for",
        ),
        (2, {"rate": jnp.zeros(())}, r"accumulate=2 splits every field .* 'rate' has shape \[\]"),
    ],
)
def test_indivisible_batch_is_rejected_while_tracing(accumulate: int, change: Any, message: str) -> None:
    batch, tx = {**lines(), **change}, optax.sgd(0.1)
    state = make_init(LINE, tx)(KEY, batch)
    with pytest.raises(InputError, match=message):
        jax.eval_shape(make_train_step(LINE, MSE(), tx, accumulate=accumulate), state, batch, KEY)


def test_accumulate_below_one_is_rejected() -> None:
    with pytest.raises(InputError, match="accumulate is 0: it must be at least 1"):
        make_train_step(LINE, MSE(), optax.sgd(0.1), accumulate=0)


# --- compiled


def collectives(net: Any, batch: Any, **options: Any) -> set[str]:
    """Kinds of collectives in the step compiled for eight devices."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    tx = optax.sgd(0.1)
    state = jax.eval_shape(make_init(net, tx), KEY, batch)
    step = make_train_step(net, CrossEntropy(), tx, **options)
    jitted = jax.jit(step, in_shardings=(replicated, split, replicated), out_shardings=replicated)
    text = jitted.lower(state, batch, KEY).compile().as_text()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return set(re.findall(rf"\b({kinds})(?:-start)?\(", text))


@pytest.mark.full("tests/step/test_accumulate.py::test_update_and_metrics_equal_the_full_batch")
def test_splitting_moves_no_row_between_devices() -> None:
    net = MLP(widths=(8,), classes=3, dropout=0.5)
    image = RNG.normal(size=(64, 4, 4, 1)).astype(np.float32)
    batch = {"image": image, "label": RNG.integers(0, 3, 64).astype(np.int32)}
    assert collectives(net, batch, accumulate=4) == {"all-reduce"}  # as in an undivided step
    assert collectives(net, batch, accumulate=4, unroll=True) == {"all-reduce"}


@pytest.mark.full("tests/step/test_accumulate.py::test_update_and_metrics_equal_the_full_batch")
@pytest.mark.parametrize("unroll", [False, True])
def test_memory_is_that_of_one_microbatch(unroll: bool) -> None:
    """The unrolled program needs barriers, which XLA:CPU drops without an option."""
    net, tx = MLP(widths=(128, 128), classes=3), optax.sgd(0.1)
    batch = {"image": np.zeros((1024, 8), np.float32), "label": np.zeros(1024, np.int32)}
    state = jax.eval_shape(make_init(net, tx), KEY, batch)

    def temporary(**options: Any) -> int:
        step = jax.jit(
            make_train_step(net, CrossEntropy(), tx, **options),
            donate_argnums=0,
            compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"} if unroll else {},
        )
        compiled = step.lower(state, batch, KEY).compile()
        assert (" while(" in compiled.as_text()) == (options != {} and not unroll)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(accumulate=8, unroll=unroll) < 0.5 * temporary()
