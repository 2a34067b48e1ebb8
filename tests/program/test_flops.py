"""jaxtrain.program.flops and .throughput: operations of an update, and the rates made of them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxtrain import data, losses, models, optim
from jaxtrain.core.types import leaf_paths
from jaxtrain.experiment import Experiment
from jaxtrain.models import GPT, as_model
from jaxtrain.models import attention as kernels
from jaxtrain.monitor import peak_flops
from jaxtrain.program import assemble
from jaxtrain.program.flops import flops_of
from jaxtrain.program.throughput import throughput
from jaxtrain.step.gradients import gradient_of

RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, 64, (32, 33))
WORDS = data.Arrays({"tokens": TEXT[:, :-1].astype(np.uint8), "label": TEXT[:, 1:].astype(np.int32)})
IMAGES = data.Arrays(
    {"image": RNG.integers(0, 256, (32, 8, 8, 1)).astype(np.uint8), "label": RNG.integers(0, 4, 32)}
)
NET = GPT(vocab=64, context=32, width=32, depth=2, heads=4, dropout=0.0)
EXP = Experiment(
    model=NET,
    train=WORDS,
    test=WORDS,
    loss=losses.CrossEntropy(),
    optimizer=optim.SGD(lr=0.1),
    batch=8,
    epochs=1,
)
MLP = dataclasses.replace(
    EXP, model=models.MLP(widths=(32,), classes=4), train=IMAGES, test=IMAGES, preprocess=(data.Normalise(),)
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def xla(fn: Any, *args: Any) -> float:
    """XLA's own count, which has what is done element by element in it too."""
    return float(jax.jit(fn).lower(*args).cost_analysis()["flops"])


# --- counted in the program


def convolutions() -> list[Any]:
    rows = []
    for stride, padding, spread, groups in itertools.product((1, 2), ("SAME", "VALID"), (1, 2), (1, 2)):
        rows.append((stride, padding, 1, spread, groups))
    return [*rows, (1, ((1, 2), (0, 1)), 2, 1, 1), (1, ((1, 2), (0, 1)), 2, 2, 2)]


@pytest.mark.parametrize(("stride", "padding", "hole", "spread", "groups"), convolutions())
def test_convolutions_count_as_xla_counts_them(stride, padding, hole, spread, groups):
    x, w = np.ones((4, 11, 10, 8), np.float32), np.ones((3, 5, 8 // groups, 6), np.float32)

    def convolved(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x, w, (stride, stride), padding, (hole, hole), (spread, spread), ("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    def pulled(x: Any, w: Any, g: Any) -> Any:
        out, pull = jax.vjp(convolved, x, w)
        return out, pull(g)

    g = np.ones(jax.eval_shape(convolved, x, w).shape, np.float32)
    once = flops_of(jax.jit(convolved).trace(x, w))
    assert once == xla(convolved, x, w) > 0
    assert flops_of(jax.jit(pulled).trace(x, w, g)) == xla(pulled, x, w, g) == 3 * once


def test_products_count_as_in_xla_without_dead_code():
    x, w = np.ones((5, 3, 7), np.float32), np.ones((5, 7, 2), np.float32)
    product = jax.jit(lambda x, w: jnp.einsum("bik,bkj->bij", x, w))
    assert flops_of(product.trace(x, w)) == xla(product, x, w) == 2 * 5 * 3 * 7 * 2
    unread = jax.jit(lambda x, w: (product(x, w), x.sum())[1])
    assert flops_of(unread.trace(x, w)) == 0
    both = jax.jit(lambda x, w: jax.jit(lambda x, w: (x @ w, x @ w[:, :, :1]))(x, w)[1])
    assert flops_of(both.trace(x, w)) == 2 * 5 * 3 * 7


def test_one_branch_of_cond_counts():
    w = np.ones((8, 8), np.float32)
    run = jax.jit(lambda n, w: lax.cond(n > 0, lambda w: w @ w, lambda w: w @ w @ w, w))
    assert flops_of(run.trace(1, w)) == 2 * 2 * 8**3


def test_cudnn_attention_counts_and_causal_counts_half(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(kernels, "lowest_capability", lambda: (9, 0))
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_200)
    kernels._jax_refusal.cache_clear()
    q = jax.ShapeDtypeStruct((2, 24, 3, 64), jnp.bfloat16)
    for causal, pairs in ((False, 24 * 24), (True, 24 * 25 // 2)):
        total = lambda q: kernels.attend(q, q, q, causal).astype(jnp.float32).sum()  # noqa: B023, E731
        assert flops_of(jax.jit(jax.value_and_grad(total)).trace(q)) == 12 * 2 * 3 * 64 * pairs
    kernels._jax_refusal.cache_clear()


# --- a GPT's formula


def test_gpt_formula_is_six_per_parameter_and_token_plus_causal_attention():
    kernels_of = {"qkv/kernel", "project/kernel", "expand/kernel", "contract/kernel", "embed/embedding"}
    net = NET.clone(mlp=3, positions="learned")
    params, _ = jax.eval_shape(as_model(net).init, jax.random.key(0), {"tokens": np.zeros((1, 32), np.uint8)})
    n = sum(x.size for path, x in leaf_paths(params).items() if any(path.endswith(k) for k in kernels_of))
    pairs = sum(range(1, 33))  # the first token sees itself
    attention = 2 * 12 * 32 * pairs
    assert net.update_flops({"tokens": np.zeros((8, 32))}) == 8 * (32 * 6 * n + attention)
    assert as_model(net).flops({"other": np.zeros((8, 32))}) is None
    assert as_model(models.MLP()).flops is None


@pytest.mark.full("tests/plan/test_plan.py::test_flops_of_a_gpt_are_six_per_parameter_and_token")
def test_gpt_formula_matches_xla_except_for_masked_positions():
    """XLA multiplies all pairs; what it does element by element comes on top."""
    net = GPT(vocab=128, context=64, width=256, depth=2, heads=4, dropout=0.0)
    batch = {"tokens": np.zeros((4, 64), np.uint8), "label": np.zeros((4, 64), np.int32)}
    model = as_model(net)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), batch)
    gradient = gradient_of(model, losses.CrossEntropy())
    traced = jax.jit(lambda p: gradient(p, {}, batch, jax.random.key(0), None).grads).trace(params)
    future = 4 * 2 * 12 * 256 * (64 * 63 // 2)
    formula = net.update_flops(batch)
    assert flops_of(traced) == formula + future
    compiled = traced.lower().compile(compiler_options={"xla_backend_optimization_level": "0"})
    assert formula + future == pytest.approx(compiled.cost_analysis()["flops"], rel=0.03)


# --- of a run


@pytest.mark.full("tests/program/test_flops.py")
def test_throughput_of_a_text_model(mesh1):
    changed = dataclasses.replace(EXP, accumulate=2, remat="dots_saveable", model=NET.clone(head_chunk=8))
    for exp in (EXP, changed):
        found = throughput(assemble(exp, mesh1))
        assert (found.tokens, found.counted_by) == (8 * 32, "formula")
        assert found.flops == NET.update_flops({"tokens": np.zeros((8, 32))})
    assert (found.peak, found.source) == (None, None)
    assert found.rates(0.5) == {"tokens_per_second": 512, "flops_per_second": 2 * found.flops}


def test_throughput_without_a_formula_is_counted_in_the_program(mesh8, monkeypatch):
    hand = 2 * 8 * (2 * 64 * 32 + 3 * 32 * 4)  # the first layer's input has no gradient
    peak = peak_flops.Peak(1e6, "measured 2026-11-22")
    monkeypatch.setattr(peak_flops, "measured_peak", lambda device, precision: peak)
    for exp in (MLP, dataclasses.replace(MLP, remat="nothing_saveable")):
        found = throughput(assemble(exp, mesh8))
        assert (found.flops, found.tokens, found.counted_by) == (hand, None, "program")
    assert (found.peak, found.source) == (1e6, "measured 2026-11-22")
    assert found.rates(2.0) == {"flops_per_second": hand / 2, "mfu": hand / 2 / 1e6}


def test_throughput_compiles_nothing_and_the_step_reuses_its_trace(mesh1):
    program = assemble(MLP, mesh1)
    seen: list[str] = []

    def hear(name: str, *_: Any, **__: Any) -> None:
        seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        throughput(program)
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert seen and not any("compile/backend" in name for name in seen), seen
