"""jaxtrain.optim: optimizers against PyTorch's formulas in NumPy, schedules, clipping, masks, EMA."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import optim
from jaxtrain.errors import InputError
from jaxtrain.metrics import Mean
from jaxtrain.optim import EMA, SGD, Adam, AdamW, Constant, Cosine, Linear, OneCycle
from jaxtrain.step import make_eval_step
from jaxtrain.types import Model, State

RNG = np.random.default_rng(0)
START = {"layer": {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)}}
GRADS = [jax.tree.map(lambda x: RNG.normal(size=x.shape), START) for _ in range(5)]


def run(config: Any, grads: list[Any] = GRADS, params: Any = START, steps: int | None = 20) -> list[Any]:
    """Params after every update, in the precision of the NumPy formulas."""
    with jax.enable_x64(True):
        tx = config.build(steps)
        params = jax.tree.map(jnp.asarray, params)
        state, seen = tx.init(params), []
        for grad in grads:
            updates, state = tx.update(jax.tree.map(jnp.asarray, grad), state, params)
            params = optax.apply_updates(params, updates)
            seen.append(jax.device_get(params))
    return seen


def torch_sgd(
    rate: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> list[dict[str, np.ndarray]]:
    """torch.optim.SGD with decay on the kernel alone; the buffer starts as the first gradient."""
    seen, params, buffers = [], dict(START["layer"]), {}
    for grads in GRADS:
        for name, param in params.items():
            grad = grads["layer"][name] + (weight_decay * param if name == "kernel" else 0.0)
            buffers[name] = momentum * buffers[name] + grad if name in buffers else grad
            step = grad + momentum * buffers[name] if nesterov else buffers[name]
            params[name] = param - rate * step
        seen.append(dict(params))
    return seen


def torch_adam(
    rate: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> list[dict[str, np.ndarray]]:
    """torch.optim.Adam, and AdamW with decay on the kernel alone."""
    seen, params = [], dict(START["layer"])
    first, second = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
    for t, grads in enumerate(GRADS, start=1):
        for name, param in params.items():
            grad = grads["layer"][name]
            first[name] = b1 * first[name] + (1 - b1) * grad
            second[name] = b2 * second[name] + (1 - b2) * grad**2
            decayed = param * (1 - rate * weight_decay) if name == "kernel" else param
            denominator = np.sqrt(second[name]) / np.sqrt(1 - b2**t) + eps
            params[name] = decayed - rate / (1 - b1**t) * first[name] / denominator
        seen.append(dict(params))
    return seen


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_pytorchs(momentum: float, weight_decay: float, nesterov: bool) -> None:
    found = run(SGD(0.1, momentum, nesterov, weight_decay))
    wanted = torch_sgd(0.1, momentum, nesterov, weight_decay)
    chex.assert_trees_all_close([p["layer"] for p in found], wanted, rtol=1e-12)


@pytest.mark.parametrize(("b1", "b2", "eps"), [(0.9, 0.999, 1e-8), (0.5, 0.9, 0.1)])
def test_adam_is_pytorchs(b1: float, b2: float, eps: float) -> None:
    found = run(Adam(0.1, b1, b2, eps))
    chex.assert_trees_all_close([p["layer"] for p in found], torch_adam(0.1, b1, b2, eps), rtol=1e-9)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_adamw_is_pytorchs(weight_decay: float) -> None:
    found = run(AdamW(0.1, 0.8, 0.95, 1e-3, weight_decay))
    wanted = torch_adam(0.1, 0.8, 0.95, 1e-3, weight_decay)
    chex.assert_trees_all_close([p["layer"] for p in found], wanted, rtol=1e-9)


@pytest.mark.parametrize("config", [SGD(Linear(0.4, warmup=0.2)), AdamW(Cosine(0.4, warmup=0.2))])
def test_update_k_uses_the_schedules_rate_k(config: Any) -> None:
    found = run(config, steps=10)
    rates = [config.lr.build(10)(k) for k in range(5)]
    before = START
    for grad, rate, after in zip(GRADS, rates, found, strict=True):
        moved = jax.tree.map(lambda a, b: b - a, before, after)
        if isinstance(config, SGD):
            chex.assert_trees_all_close(moved, jax.tree.map(lambda g, r=rate: -float(r) * g, grad), rtol=1e-5)
        assert any(np.any(x) for x in jax.tree.leaves(moved)) == (rate > 0)
        before = after


SCHEDULES = {
    "constant": (Constant(0.5), {0: 0.5, 50: 0.5, 99: 0.5}),
    "constant, warmed up": (Constant(0.5, warmup=0.1), {0: 0, 5: 0.25, 10: 0.5, 11: 0.5, 99: 0.5}),
    "linear": (Linear(1.0), {0: 1.0, 25: 0.75, 99: 0.01, 100: 0}),
    "linear to an end": (Linear(1.0, end=0.2, warmup=0.2), {0: 0, 10: 0.5, 20: 1, 60: 0.6, 100: 0.2}),
    "cosine": (Cosine(2.0), {0: 2.0, 50: 1.0, 25: 1 + np.cos(np.pi / 4), 100: 0}),
    "cosine to an end": (Cosine(1.0, end=0.2, warmup=0.2), {0: 0, 10: 0.5, 20: 1, 60: 0.6, 100: 0.2}),
    "cosine from another peak": (Cosine(2.0, end=0.5), {0: 2.0, 50: 1.25, 100: 0.5}),
    "cosine of nothing": (Cosine(0.0), {0: 0, 50: 0, 100: 0}),
    "one cycle": (OneCycle(2.0), {0: 0.4, 25: 2.0, 100: 0.02}),
    "one cycle, set": (OneCycle(1.0, start=0.5, end=0.1, warmup=0.5), {0: 0.5, 25: 0.75, 50: 1, 100: 0.1}),
    "one cycle, no rise": (OneCycle(1.0, warmup=0.0), {0: 1.0, 100: 0.01}),
    "all but all warm-up": (Linear(1.0, warmup=0.99), {0: 0, 99: 1.0, 100: 0}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_has_the_rates_of_its_definition(name: str) -> None:
    schedule, wanted = SCHEDULES[name]
    rate = schedule.build(100)
    np.testing.assert_allclose([rate(k) for k in wanted], list(wanted.values()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cls", [Linear, Cosine, OneCycle])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_schedule_peaks_once_and_never_leaves_its_range(cls: Any, steps: int) -> None:
    rates = np.array([cls(0.3, warmup=0.25).build(steps)(k) for k in range(steps)])
    top = round(0.25 * steps)
    assert rates.argmax() == top
    assert rates[top] == pytest.approx(0.3)
    assert np.all(np.diff(rates[: top + 1]) > 0) and np.all(np.diff(rates[top:]) < 0)
    assert rates.min() >= 0


def test_clip_bounds_the_global_norm_and_leaves_smaller_gradients_alone() -> None:
    norm = float(np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(GRADS[0]))))
    kernel = {
        limit: START["layer"]["kernel"] - run(SGD(1.0, clip=limit), GRADS[:1])[0]["layer"]["kernel"]
        for limit in (None, norm / 4, norm * 1.01)
    }
    raw = GRADS[0]["layer"]["kernel"]
    np.testing.assert_allclose(kernel[None], raw, rtol=1e-12)
    np.testing.assert_allclose(kernel[norm / 4], raw / 4, rtol=1e-12)
    np.testing.assert_allclose(kernel[norm * 1.01], raw, rtol=1e-12)


def test_clip_sees_the_gradient_before_the_decay() -> None:
    still = jax.tree.map(np.zeros_like, START)
    [after] = run(SGD(1.0, weight_decay=0.5, clip=1e-3), [still])
    np.testing.assert_allclose(after["layer"]["kernel"], 0.5 * START["layer"]["kernel"], rtol=1e-12)


NETWORK = {
    "conv": {"kernel": np.ones(2), "bias": np.ones(2)},
    "norm": {"scale": np.ones(2), "bias": np.ones(2)},
    "words": {"embedding": np.ones(2)},
    "blocks": [{"kernel": np.ones(2)}],
}


@pytest.mark.parametrize(
    ("pattern", "decayed"),
    [
        ("kernel|embedding", {"conv/kernel", "words/embedding", "blocks/0/kernel"}),
        ("^conv/kernel$", {"conv/kernel"}),
        ("norm/", {"norm/scale", "norm/bias"}),
        ("0/kernel", {"blocks/0/kernel"}),
        ("", {"conv/kernel", "conv/bias", "norm/scale", "norm/bias", "words/embedding", "blocks/0/kernel"}),
        ("nothing", set()),
    ],
)
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_decay_pattern_says_which_paths_are_decayed(cls: Any, pattern: str, decayed: set[str]) -> None:
    still = jax.tree.map(np.zeros_like, NETWORK)
    [after] = run(cls(0.1, weight_decay=0.5, decay=pattern), [still], NETWORK)
    flat = jax.tree_util.tree_leaves_with_path(after)
    values = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in flat}
    assert {path for path, value in values.items() if np.all(value != 1)} == decayed
    assert all(np.allclose(values[path], 0.95) for path in decayed)


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_biases_and_norm_scales_are_not_decayed_unless_asked(cls: Any) -> None:
    assert cls(0.1).decay == "kernel|embedding"


REFUSED = {
    "momentum of 1": (lambda: SGD(0.1, momentum=1.0).build(), "optimizer.momentum is 1.0"),
    "negative momentum": (lambda: SGD(0.1, momentum=-0.1).build(), "optimizer.momentum"),
    "negative rate": (lambda: SGD(-0.1).build(), "optimizer.lr is -0.1"),
    "b1 of 1": (lambda: Adam(b1=1.0).build(), "optimizer.b1"),
    "b2 of 1": (lambda: AdamW(b2=1.0).build(), "optimizer.b2"),
    "schedule without a length": (lambda: SGD(OneCycle(0.1)).build(), "lr=OneCycle depends on the run's"),
    "warm-up of a whole run": (lambda: Linear(0.1, warmup=1.0).build(10), "lr.warmup is 1.0"),
    "negative warm-up": (lambda: Constant(0.1, warmup=-0.1).build(10), "lr.warmup"),
    "average of nothing": (lambda: EMA(decay=1.0), "ema.decay is 1.0"),
    "negative average": (lambda: EMA(decay=-0.1), "ema.decay"),
    "negative clip, which would climb": (lambda: SGD(0.1, clip=-1.0).build(), "clip"),
    "clip of 0, which would never move": (lambda: AdamW(clip=0.0).build(), "clip"),
    "negative decay": (lambda: SGD(0.1, weight_decay=-0.1).build(), "weight_decay"),
    "negative peak": (lambda: SGD(OneCycle(-0.1)).build(10), "peak"),
    "nesterov without momentum": (lambda: SGD(0.1, nesterov=True).build(), "nesterov needs a momentum"),
    "broken pattern": (lambda: SGD(0.1, weight_decay=0.1, decay="(").build(), "decay"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_train_are_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        make()


def state_of(weight: float, mean: float) -> State:
    extra = {"batch_stats": {"mean": jnp.array(mean)}, "masks": {"w": jnp.array(True)}}
    return State(jnp.array(0), {"w": jnp.array(weight)}, extra, ())


def test_ema_follows_params_and_batch_statistics() -> None:
    ema, weights, means = EMA(0.9), [1.0, 2.0, 4.0, 8.0], [0.0, -1.0, 5.0, 2.0]
    state = ema.init(state_of(weights[0], means[0]))
    chex.assert_trees_all_equal(
        state.extra["ema"], {"params": {"w": 1.0}, "batch_stats": {"mean": 0.0}}
    )  # masks are not averaged
    average = np.array([weights[0], means[0]])
    for weight, mean in zip(weights[1:], means[1:], strict=True):
        new = state_of(weight, mean)
        state = ema(new.replace(extra={**new.extra, "ema": state.extra["ema"]}))
        average = 0.9 * average + 0.1 * np.array([weight, mean])
        found = state.extra["ema"]
        np.testing.assert_allclose([found["params"]["w"], found["batch_stats"]["mean"]], average, rtol=1e-6)
    assert state.params["w"] == 8.0 and state.extra["batch_stats"]["mean"] == 2.0


def test_ema_starts_as_a_copy_that_donation_cannot_share() -> None:
    state = EMA().init(state_of(1.0, 2.0))
    donate = jax.jit(lambda s: s.replace(step=s.step + 1), donate_argnums=0)
    assert donate(state).extra["ema"]["params"]["w"] == 1.0


def test_evaluation_uses_the_average_where_there_is_one() -> None:
    def apply(params: Any, extra: Any, batch: Any, *, train: bool, key: Any) -> Any:
        return params["w"] * 100 + extra["batch_stats"]["mean"], extra

    def loss(outputs: Any, batch: Any) -> Any:
        return outputs, {"seen": Mean.of(outputs)}

    model = Model(lambda key, batch: ({}, {}), apply)
    evaluate = make_eval_step(model, loss)
    state = EMA(0.5).init(state_of(1.0, 2.0))
    moved = state.replace(
        params={"w": jnp.array(9.0)}, extra={**state.extra, "batch_stats": {"mean": jnp.array(9.0)}}
    )
    assert evaluate(moved, {})["seen"].compute() == 102
    bare = moved.replace(extra={"batch_stats": moved.extra["batch_stats"]})
    assert evaluate(bare, {})["seen"].compute() == 909


# A base on which every field can be seen, and another value for each field.
CASES: dict[type, tuple[Any, dict[str, Any]]] = {
    SGD: (
        SGD(0.1, momentum=0.9, weight_decay=0.1, clip=1.0),
        {
            "lr": Linear(0.1),
            "momentum": 0.5,
            "nesterov": True,
            "weight_decay": 0.2,
            "decay": "bias",
            "clip": None,
        },
    ),
    Adam: (
        Adam(0.1, eps=0.1, clip=1.0),
        {"lr": Linear(0.1), "b1": 0.5, "b2": 0.5, "eps": 1.0, "clip": 0.1},
    ),
    AdamW: (
        AdamW(0.1, eps=0.1, clip=1.0),
        {
            "lr": 0.2,
            "b1": 0.5,
            "b2": 0.5,
            "eps": 1.0,
            "weight_decay": 0.2,
            "decay": "bias",
            "clip": 0.1,
        },
    ),
    Constant: (Constant(0.1), {"value": 0.2, "warmup": 0.5}),
    Linear: (Linear(0.1), {"peak": 0.2, "end": 0.05, "warmup": 0.5}),
    Cosine: (Cosine(0.1), {"peak": 0.2, "end": 0.05, "warmup": 0.5}),
    OneCycle: (OneCycle(0.1), {"peak": 0.2, "start": 0.5, "end": 0.5, "warmup": 0.5}),
    EMA: (EMA(0.9), {"decay": 0.5}),
}
FIELDS = [(cls, f.name) for cls in CASES for f in dataclasses.fields(cls)]


def effect(config: Any) -> Any:
    if isinstance(config, optim.Schedule):
        return np.array([config.build(20)(k) for k in range(20)])
    if isinstance(config, EMA):
        state = config.init(state_of(1.0, 2.0))
        return config(state.replace(params={"w": jnp.array(5.0)})).extra["ema"]["params"]["w"]
    return np.concatenate([x.ravel() for x in jax.tree.leaves(run(config))])


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_field_changes_the_result(cls: type, field: str) -> None:
    base, other = CASES[cls]
    assert not np.allclose(
        effect(base), effect(dataclasses.replace(base, **{field: other[field]})), rtol=1e-3
    )


def test_every_config_is_in_the_table() -> None:
    members = inspect.getmembers(optim, dataclasses.is_dataclass)
    mine = {cls for _, cls in members if cls.__module__ == optim.__name__}
    assert mine - {optim.Schedule} == set(CASES)
