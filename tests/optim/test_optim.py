"""jaxtrain.optim: optimizers against PyTorch's formulas in NumPy, schedules, clipping, groups, averages."""

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
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Model, State
from jaxtrain.metrics import Mean
from jaxtrain.optim import EMA, SGD, Adam, AdamW, Constant, Cosine, Group, Linear, Lookahead, OneCycle
from jaxtrain.step import make_eval_step
from jaxtrain.step.factories import eval_state

RNG = np.random.default_rng(0)
START = {"layer": {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)}}
GRADS = [jax.tree.map(lambda x: RNG.normal(size=x.shape), START) for _ in range(5)]


def run(config: Any, grads: list[Any] = GRADS, params: Any = START, steps: int | None = 20) -> list[Any]:
    """Params after every update, in the precision of the NumPy formulas."""
    with jax.enable_x64(True):
        tx = config.build(steps)
        params = jax.tree.map(jnp.asarray, params)
        state, history = tx.init(params), []
        for grad in grads:
            updates, state = tx.update(jax.tree.map(jnp.asarray, grad), state, params)
            params = optax.apply_updates(params, updates)
            history.append(jax.device_get(params))
    return history


def torch_sgd(
    rate: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> list[dict[str, np.ndarray]]:
    """torch.optim.SGD with decay on the kernel alone; the buffer starts as the first gradient."""
    history, params, buffers = [], dict(START["layer"]), {}
    for grads in GRADS:
        for name, param in params.items():
            grad = grads["layer"][name] + (weight_decay * param if name == "kernel" else 0.0)
            buffers[name] = momentum * buffers[name] + grad if name in buffers else grad
            step = grad + momentum * buffers[name] if nesterov else buffers[name]
            params[name] = param - rate * step
        history.append(dict(params))
    return history


def torch_adam(
    rate: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> list[dict[str, np.ndarray]]:
    """torch.optim.Adam, and AdamW with decay on the kernel alone."""
    history, params = [], dict(START["layer"])
    first, second = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
    for t, grads in enumerate(GRADS, start=1):
        for name, param in params.items():
            grad = grads["layer"][name]
            first[name] = b1 * first[name] + (1 - b1) * grad
            second[name] = b2 * second[name] + (1 - b2) * grad**2
            decayed = param * (1 - rate * weight_decay) if name == "kernel" else param
            denominator = np.sqrt(second[name]) / np.sqrt(1 - b2**t) + eps
            params[name] = decayed - rate / (1 - b1**t) * first[name] / denominator
        history.append(dict(params))
    return history


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
    "almost all warm-up": (Linear(1.0, warmup=0.99), {0: 0, 99: 1.0, 100: 0}),
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
    zeros = jax.tree.map(np.zeros_like, START)
    [after] = run(SGD(1.0, weight_decay=0.5, clip=1e-3), [zeros])
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
def test_decay_pattern_selects_the_decayed_paths(cls: Any, pattern: str, decayed: set[str]) -> None:
    zeros = jax.tree.map(np.zeros_like, NETWORK)
    [after] = run(cls(0.1, weight_decay=0.5, decay=pattern), [zeros], NETWORK)
    flat = jax.tree_util.tree_leaves_with_path(after)
    values = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in flat}
    assert {path for path, value in values.items() if np.all(value != 1)} == decayed
    assert all(np.allclose(values[path], 0.95) for path in decayed)


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_biases_and_norm_scales_are_not_decayed_unless_asked(cls: Any) -> None:
    assert cls(0.1).decay == "kernel|embedding"


# --- groups


def sgd_in_groups(config: SGD, rules: dict[str, Group], steps: int) -> list[dict[str, np.ndarray]]:
    """Nesterov SGD in NumPy with one rule for each parameter, every parameter decayed."""
    history, params = [], dict(START["layer"])
    buffers = {name: np.zeros_like(value) for name, value in params.items()}
    for step, grads in enumerate(GRADS):
        for name, param in params.items():
            rule = rules[name]
            if rule.lr == 0 or step >= round(rule.until * steps):
                continue
            grad = grads["layer"][name] + config.weight_decay * rule.weight_decay * param
            buffers[name] = config.momentum * buffers[name] + grad
            params[name] = param - config.lr * rule.lr * (grad + config.momentum * buffers[name])
        history.append(dict(params))
    return history


RULES = {
    "rate and decay": {"kernel": Group("kernel", lr=0.5, weight_decay=3.0), "bias": Group("bias", lr=64.0)},
    "no decay": {"kernel": Group("kernel", weight_decay=0.0), "bias": Group("bias")},
    "frozen": {"kernel": Group("kernel", lr=0.0), "bias": Group("bias", weight_decay=0.1)},
    "until": {"kernel": Group("kernel", until=0.3, lr=2.0), "bias": Group("bias", until=0.04)},
    "never": {"kernel": Group("kernel", until=0.0), "bias": Group("bias")},
    "always": {"kernel": Group("kernel", until=1.0), "bias": Group("bias", until=0.99)},
}


@pytest.mark.parametrize("name", RULES)
def test_groups_set_the_rate_the_decay_and_the_end_of_their_parameters(name: str) -> None:
    rules = RULES[name]
    base = SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.2, decay="")
    found = run(dataclasses.replace(base, groups=tuple(rules.values())), steps=10)
    wanted = sgd_in_groups(base, rules, steps=10)
    chex.assert_trees_all_close([p["layer"] for p in found], wanted, rtol=1e-12)


@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_adam_with_groups_is_adam_of_another_rate_or_none(cls: Any) -> None:
    groups = (Group("kernel", lr=3.0), Group("bias", until=0.1))
    found, fast, slow = (run(c, steps=20) for c in (cls(0.1, groups=groups), cls(0.3), cls(0.1)))
    for k, (params, quick, plain) in enumerate(zip(found, fast, slow, strict=True)):
        np.testing.assert_allclose(params["layer"]["kernel"], quick["layer"]["kernel"], rtol=1e-9)
        still = slow[1] if k >= 2 else plain
        np.testing.assert_array_equal(params["layer"]["bias"], still["layer"]["bias"])


def test_adamw_groups_scale_the_decay() -> None:
    found = run(AdamW(0.1, weight_decay=0.5, groups=(Group("kernel", weight_decay=0.4),)))
    wanted = run(AdamW(0.1, weight_decay=0.2))
    chex.assert_trees_all_close(found, wanted, rtol=1e-9)


def test_first_matching_group_applies_and_other_parameters_use_the_optimizer() -> None:
    groups = (Group("conv/kernel", lr=2.0), Group("kernel", lr=3.0), Group("norm", lr=4.0))
    ones = jax.tree.map(np.ones_like, NETWORK)
    [after] = run(SGD(0.1, groups=groups), [ones], NETWORK)
    flat = jax.tree_util.tree_leaves_with_path(after)
    moved = {jax.tree_util.keystr(k, simple=True, separator="/"): round(10 * (1 - v[0])) for k, v in flat}
    wanted = {"conv/kernel": 2, "blocks/0/kernel": 3, "norm/scale": 4, "norm/bias": 4}
    assert moved == {"conv/bias": 1, "words/embedding": 1, **wanted}


def test_group_does_not_decay_what_the_decay_pattern_excludes() -> None:
    groups = (Group("layer", weight_decay=2.0),)
    zeros = jax.tree.map(np.zeros_like, START)
    [after] = run(SGD(0.1, weight_decay=0.5, groups=groups), [zeros])
    np.testing.assert_allclose(after["layer"]["kernel"], 0.9 * START["layer"]["kernel"], rtol=1e-12)
    np.testing.assert_array_equal(after["layer"]["bias"], START["layer"]["bias"])


def test_frozen_parameters_do_not_count_in_the_clipped_norm() -> None:
    kernel, bias = GRADS[0]["layer"]["kernel"], GRADS[0]["layer"]["bias"]
    limit = float(np.linalg.norm(bias)) / 2
    huge = {"layer": {"kernel": 1e6 * kernel, "bias": bias}}
    for group in (Group("kernel", lr=0.0), Group("kernel", until=0.0)):
        [after] = run(SGD(1.0, clip=limit, groups=(group,)), [huge])
        np.testing.assert_allclose(START["layer"]["bias"] - after["layer"]["bias"], bias / 2, rtol=1e-12)
        np.testing.assert_array_equal(after["layer"]["kernel"], START["layer"]["kernel"])


def test_frozen_parameters_get_no_momentum_even_from_non_finite_gradients() -> None:
    groups = (Group("kernel", lr=0.0), Group("bias", until=0.1))
    tx = SGD(0.1, momentum=0.5, weight_decay=0.3, decay="", groups=groups).build(10)
    params, state = START, tx.init(START)
    for k in range(4):
        grads = {"layer": {"kernel": np.full((3, 2), np.nan), "bias": np.full(2, np.nan if k else 1.0)}}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if k == 0:
            first = optax.tree.get(state, "trace")["layer"]["bias"]
    trace = optax.tree.get(state, "trace")["layer"]
    assert not trace["kernel"].any()
    np.testing.assert_allclose(trace["bias"], first * 0.5**3, rtol=1e-6)
    np.testing.assert_array_equal(params["layer"]["kernel"], START["layer"]["kernel"].astype(np.float32))


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW])
def test_without_groups_state_and_numbers_are_those_of_the_chain(cls: Any) -> None:
    config = cls(Linear(0.1), clip=1.0)
    chain = {
        SGD: [optax.identity(), optax.identity()],
        Adam: [optax.scale_by_adam()],
        AdamW: [optax.scale_by_adam(), optax.add_decayed_weights(0.01, {"layer": {"kernel": 1, "bias": 0}})],
    }[cls]
    rate = optax.scale_by_learning_rate(Linear(0.1).build(20))
    plain, tx = optax.chain(optax.clip_by_global_norm(1.0), *chain, rate), config.build(20)
    params = jax.tree.map(jnp.float32, START)
    states = [tx.init(params), plain.init(params)]
    chex.assert_trees_all_equal_structs(*states)
    for grads in jax.tree.map(jnp.float32, GRADS):
        found, states[0] = tx.update(grads, states[0], params)
        wanted, states[1] = plain.update(grads, states[1], params)
        chex.assert_trees_all_equal(found, wanted)
    everything = dataclasses.replace(config, groups=(Group("layer"),))
    chex.assert_trees_all_equal(run(everything), run(config))


@pytest.mark.parametrize("steps", [3, 476])
def test_until_is_a_fraction_of_the_updates_of_the_run(steps: int) -> None:
    ones = jax.tree.map(np.ones_like, START)
    tx = SGD(1.0, groups=(Group("bias", until=3 / 9.9),)).build(steps)
    update, state, moved = jax.jit(tx.update), tx.init(START), []
    for _ in range(steps):
        updates, state = update(ones, state, START)
        moved.append(bool(np.any(updates["layer"]["bias"])))
    wanted = {3: 1, 476: 144}[steps]
    assert moved == [True] * wanted + [False] * (steps - wanted)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((Group("kernle"),), "'kernle' matches no parameter's path; the paths are layer/bias, layer/kernel"),
        ((Group("layer"), Group("bias")), "every parameter that 'bias' matches belongs to an earlier group"),
        ((Group("bias"), Group("bias", lr=2.0)), "belongs to an earlier group"),
    ],
)
def test_group_without_parameters_is_refused_by_init(groups: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        jax.eval_shape(SGD(0.1, groups=groups).build().init, START)
    assert "\n" not in str(raised.value)


def test_unmatched_group_shows_only_a_few_of_many_paths() -> None:
    with pytest.raises(InputError, match=r"the paths are ([a-z0-9]+/[a-z0-9/]+(, | and )){4}2 more$"):
        SGD(0.1, groups=(Group("x"),)).build().init(NETWORK)


REFUSED = {
    "group of a broken pattern": (
        lambda: Group("("),
        "optimizer.groups path='\\(' is not a regular expression",
    ),
    "group of a negative rate": (lambda: Group("a", lr=-1.0), "must not be negative"),
    "group of a negative decay": (lambda: Group("a", weight_decay=-1.0), "must not be negative"),
    "group beyond the end": (lambda: Group("a", until=1.1), "in \\[0, 1\\]"),
    "group before the start": (lambda: Group("a", until=-0.1), "in \\[0, 1\\]"),
    "end without a length": (lambda: SGD(0.1, groups=(Group("a", until=0.5),)).build(), "build\\(steps="),
    "one group alone": (lambda: SGD(0.1, groups=Group("a")).build(), "a tuple of optim.Group"),
    "groups of text": (lambda: AdamW(groups=("a",)).build(), "a tuple of optim.Group"),
    "decay of Adam": (lambda: Adam(groups=(Group("a", weight_decay=2.0),)).build(), "use AdamW"),
    "averaging never": (lambda: Lookahead(every=0), "lookahead.every is 0"),
    "slow weights that grow": (lambda: Lookahead(decay=1.1), "lookahead.decay is 1.1"),
    "decay that falls": (lambda: Lookahead(power=-1.0), "lookahead.power"),
    "momentum of 1": (lambda: SGD(0.1, momentum=1.0).build(), "optimizer.momentum is 1.0"),
    "negative momentum": (lambda: SGD(0.1, momentum=-0.1).build(), "optimizer.momentum"),
    "negative rate": (lambda: SGD(-0.1).build(), "optimizer.lr is -0.1"),
    "b1 of 1": (lambda: Adam(b1=1.0).build(), "optimizer.b1"),
    "b2 of 1": (lambda: AdamW(b2=1.0).build(), "optimizer.b2"),
    "schedule without a length": (lambda: SGD(OneCycle(0.1)).build(), "lr=OneCycle needs the length"),
    "warm-up of a whole run": (lambda: Linear(0.1, warmup=1.0).build(10), "lr.warmup is 1.0"),
    "negative warm-up": (lambda: Constant(0.1, warmup=-0.1).build(10), "lr.warmup"),
    "average of nothing": (lambda: EMA(decay=1.0), "ema.decay is 1.0"),
    "negative average": (lambda: EMA(decay=-0.1), "ema.decay"),
    "unknown start": (
        lambda: EMA(start="zero"),
        "ema.start is 'zero': it must be one of ramp, debias, initial",
    ),
    "negative clip, which would climb": (lambda: SGD(0.1, clip=-1.0).build(), "clip"),
    "clip of 0, which would never move": (lambda: AdamW(clip=0.0).build(), "clip"),
    "negative decay": (lambda: SGD(0.1, weight_decay=-0.1).build(), "weight_decay"),
    "negative peak": (lambda: SGD(OneCycle(-0.1)).build(10), "peak"),
    "nesterov without momentum": (lambda: SGD(0.1, nesterov=True).build(), "nesterov needs momentum"),
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


DECAYS = {  # the weight of the average before update t, by EMA.start
    "initial": lambda decay, t: decay,
    "ramp": lambda decay, t: min(decay, t / (9 + t)),
    "debias": lambda decay, t: decay * (1 - decay ** (t - 1)) / (1 - decay**t),
}


@pytest.mark.parametrize("start", DECAYS)
def test_ema_follows_params_and_batch_statistics(start: Any) -> None:
    ema, weights, means = EMA(0.9, start), [1.0, 2.0, 4.0, 8.0], [0.0, -1.0, 5.0, 2.0]
    state = ema.init(state_of(weights[0], means[0]))
    chex.assert_trees_all_equal(
        state.extra["ema"], {"params": {"w": 1.0}, "batch_stats": {"mean": 0.0}, "updates": 0}
    )  # masks are not averaged
    average = np.array([weights[0], means[0]])
    for t, (weight, mean) in enumerate(zip(weights[1:], means[1:], strict=True), start=1):
        new = state_of(weight, mean)
        state = ema(new.replace(extra={**new.extra, "ema": state.extra["ema"]}))
        d = DECAYS[start](0.9, t)
        average = d * average + (1 - d) * np.array([weight, mean])
        found = state.extra["ema"]
        np.testing.assert_allclose([found["params"]["w"], found["batch_stats"]["mean"]], average, rtol=1e-6)
    assert state.params["w"] == 8.0 and state.extra["batch_stats"]["mean"] == 2.0


def test_ema_starts_as_a_copy_that_donation_cannot_share() -> None:
    state = EMA().init(state_of(1.0, 2.0))
    donate = jax.jit(lambda s: s.replace(step=s.step + 1), donate_argnums=0)
    assert donate(state).extra["ema"]["params"]["w"] == 1.0


def test_evaluation_uses_the_ema_if_there_is_one() -> None:
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
    slow = Lookahead().build(10).init(state_of(1.0, 2.0)).extra["lookahead"]
    assert evaluate(bare.replace(extra={**bare.extra, "lookahead": slow}), {})["seen"].compute() == 909


def test_a_short_run_is_averaged_over_its_own_updates() -> None:
    """150 updates of a decay for thousands: the initial parameters are out of the average, by default."""
    ema = EMA(0.999)
    state = ema.init(state_of(-100.0, 0.0))
    step = jax.jit(ema)
    for _ in range(150):
        state = step(state.replace(params={"w": jnp.array(1.0)}))
    assert state.extra["ema"]["updates"] == 150
    assert state.extra["ema"]["params"]["w"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_averages_of_half_precision_do_not_stall(dtype: Any) -> None:
    """A parameter of 1 for 999 updates then 1.5; steps of one rounding with a slow copy."""
    ema = EMA(0.999)
    state = ema.init(state_of(1.0, 0.0).replace(params={"w": jnp.ones((), dtype)}))

    def update(state: State, value: jax.Array) -> tuple[State, None]:
        return ema(state.replace(params={"w": value.astype(dtype)})), None

    values, average = np.where(np.arange(3000) < 999, 1.0, 1.5), 1.0
    for t, value in enumerate(values, start=1):
        d = DECAYS["ramp"](0.999, t)
        average = d * average + (1 - d) * value
    state, _ = jax.lax.scan(update, state, jnp.asarray(values))
    assert state.extra["ema"]["params"]["w"] == pytest.approx(average, rel=1e-4)
    params, _ = eval_state(state)
    assert params["w"].dtype == dtype and params["w"] == jnp.asarray(average, dtype)

    stage = Lookahead(every=1, decay=0.9, power=0.0).build(1000)
    state, step = stage.init(state_of(1.0, 0.0).replace(params={"w": jnp.ones((), dtype)})), jax.jit(stage)
    for t in range(40):
        moved = state.params["w"] + jnp.finfo(dtype).eps
        state = step(state.replace(step=jnp.array(t), params={"w": moved}))
    assert state.params["w"].dtype == dtype and state.params["w"] > 1


# --- lookahead


def run_lookahead(
    config: Lookahead, total: int, moves: list[Any], weight: float = 1.0, mean: float = 2.0
) -> Any:
    """States after every step of a run in which each step adds its moves to weights and statistics."""
    stage = config.build(total)

    @jax.jit
    def step(state: State, move: Any) -> State:
        extra = {**state.extra, "batch_stats": {"mean": state.extra["batch_stats"]["mean"] + move[1]}}
        moved = state.replace(step=state.step + 1, params={"w": state.params["w"] + move[0]}, extra=extra)
        return stage(moved)

    states = [stage.init(state_of(weight, mean))]
    for move in moves:
        states.append(step(states[-1], move))
    return states[1:], step


MOVES = [(float(a), float(b)) for a, b in RNG.normal(size=(15, 2))]


@pytest.mark.parametrize("total", [13, 15])
@pytest.mark.parametrize("config", [Lookahead(), Lookahead(4, 0.8, 1.0), Lookahead(1, 0.5, 0.0)])
def test_lookahead_equals_its_definition(config: Lookahead, total: int) -> None:
    slow, fast = np.array([1.0, 2.0]), np.array([1.0, 2.0])
    states, _ = run_lookahead(config, total, MOVES[:total])
    for t, (state, move) in enumerate(zip(states, MOVES, strict=False), start=1):
        fast = fast + move
        if t % config.every == 0:
            d = config.decay**config.every * (t / total) ** config.power
            slow = d * slow + (1 - d) * fast
            fast = slow
        if t == total:
            fast = slow
        found = [state.params["w"], state.extra["batch_stats"]["mean"]]
        stored = state.extra["lookahead"]
        np.testing.assert_allclose(found, fast, rtol=1e-5)
        np.testing.assert_allclose([stored["params"]["w"], stored["batch_stats"]["mean"]], slow, rtol=1e-5)
        assert state.extra["masks"]["w"] and set(stored) == {"params", "batch_stats"}


def test_lookahead_leaves_frozen_weights_exactly_unchanged() -> None:
    states, _ = run_lookahead(Lookahead(every=1), 7, [(0.0, 0.0)] * 7, weight=0.1, mean=1 / 3)
    assert all(s.params["w"] == np.float32(0.1) for s in states)
    assert all(s.extra["batch_stats"]["mean"] == np.float32(1 / 3) for s in states)


def test_lookahead_resumes_from_its_state_exactly() -> None:
    states, step = run_lookahead(Lookahead(), 15, MOVES)
    state = jax.tree.map(jnp.asarray, jax.device_get(states[6]))
    for move in MOVES[7:]:
        state = step(state, move)
    chex.assert_trees_all_equal(state, states[-1])


def test_lookahead_does_not_touch_the_weights_between_two_averagings() -> None:
    stage = Lookahead().build(10)
    state = stage.init(state_of(1.0, 2.0))
    [branch] = [e for e in jax.make_jaxpr(stage)(state).eqns if e.primitive.name == "cond"]
    assert min(len(b.jaxpr.eqns) for b in branch.params["branches"]) == 0


@pytest.mark.parametrize("t", [1, 5])
def test_lookahead_survives_donation_of_the_state(t: int) -> None:
    stage = Lookahead().build(10)
    step = jax.jit(stage, donate_argnums=0)
    state = stage.init(state_of(1.0, 2.0)).replace(step=jnp.array(t))
    for _ in range(3):
        state = step(state)
        weights = [state.params["w"], state.extra["lookahead"]["params"]["w"]]
        assert len({x.unsafe_buffer_pointer() for x in weights}) == 2
    assert state.params["w"] == 1.0


def test_ema_averages_the_weights_after_lookahead() -> None:
    lookahead, ema = Lookahead(every=1, decay=0.5, power=0.0).build(10), EMA(0.5, "initial")
    state = ema.init(lookahead.init(state_of(0.0, 0.0)))
    assert set(state.extra["ema"]) == {"params", "batch_stats", "updates"}
    state = ema(lookahead(state.replace(step=state.step + 1, params={"w": jnp.array(8.0)})))
    assert (state.params["w"], state.extra["ema"]["params"]["w"]) == (4.0, 2.0)
    assert state.extra["lookahead"]["params"]["w"] == 4.0


# For each class a config on which every field has an effect, and another value for each field.
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
            "groups": (Group("kernel", lr=0.5),),
        },
    ),
    Adam: (
        Adam(0.1, eps=0.1, clip=1.0),
        {
            "lr": Linear(0.1),
            "b1": 0.5,
            "b2": 0.5,
            "eps": 1.0,
            "clip": 0.1,
            "groups": (Group("kernel", lr=0.5),),
        },
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
            "groups": (Group("kernel", lr=0.5),),
        },
    ),
    Constant: (Constant(0.1), {"value": 0.2, "warmup": 0.5}),
    Linear: (Linear(0.1), {"peak": 0.2, "end": 0.05, "warmup": 0.5}),
    Cosine: (Cosine(0.1), {"peak": 0.2, "end": 0.05, "warmup": 0.5}),
    OneCycle: (OneCycle(0.1), {"peak": 0.2, "start": 0.5, "end": 0.5, "warmup": 0.5}),
    EMA: (EMA(0.9, "initial"), {"decay": 0.5, "start": "debias"}),
    Lookahead: (Lookahead(), {"every": 4, "decay": 0.5, "power": 1.0}),
    Group: (Group("kernel"), {"path": "bias", "lr": 0.5, "weight_decay": 0.5, "until": 0.1}),
}
FIELDS = [(cls, f.name) for cls in CASES for f in dataclasses.fields(cls)]


def effect(config: Any) -> Any:
    if isinstance(config, optim.Schedule):
        return np.array([config.build(20)(k) for k in range(20)])
    if isinstance(config, EMA):
        state = config.init(state_of(1.0, 2.0))
        return config(state.replace(params={"w": jnp.array(5.0)})).extra["ema"]["params"]["w"]
    if isinstance(config, Lookahead):
        return np.array([s.params["w"] for s in run_lookahead(config, 15, MOVES)[0]])
    if isinstance(config, Group):
        rules = (dataclasses.replace(config, lr=3.0), Group("")) if config.path != "kernel" else (config,)
        return effect(SGD(0.1, momentum=0.9, weight_decay=0.5, groups=rules))
    return np.concatenate([x.ravel() for x in jax.tree.leaves(run(config))])


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_field_changes_the_result(cls: type, field: str) -> None:
    base, other = CASES[cls]
    assert not np.allclose(
        effect(base), effect(dataclasses.replace(base, **{field: other[field]})), rtol=1e-3
    )


def test_every_config_has_a_case() -> None:
    members = inspect.getmembers(optim, dataclasses.is_dataclass)
    mine = {cls for _, cls in members if cls.__module__.startswith(optim.__name__)}
    assert mine - {optim.Schedule, optim.LossScale} == set(CASES)  # test_precision.py has the latter
