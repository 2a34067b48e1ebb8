"""step.guard: what the guard adds to a program for a GPU, none of which is needed here."""

from __future__ import annotations

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gpu_programs import h100, needs_compiler
from tiny import EXPERIMENT

from jaxtrain import models, optim
from jaxtrain.core.types import Model, State
from jaxtrain.losses import CrossEntropy
from jaxtrain.program import update
from jaxtrain.step import make_init, make_train_step
from jaxtrain.step.factories import identity
from jaxtrain.step.guard import LEAVES_PER_SUM, guard_step


def many_leaves(count):
    """A model of ``count`` parameters, and a batch for it."""
    model = Model(
        lambda key, batch: ([jnp.ones((3, 2))] * count, {}),
        lambda params, extra, batch, *, train, key: (batch["x"] @ sum(params), extra),
    )
    return model, {"x": jnp.ones((4, 3)), "label": jnp.array([0, 1, 0, 1])}


def lowered(model, batch, guarded, platform="cuda"):
    """StableHLO of the guarded step for ``platform``, on a machine that need not have one."""
    tx = optax.adam(1e-3)
    state = jax.eval_shape(make_init(model, tx), jax.random.key(0), batch)
    step = jax.jit(guarded(make_train_step(model, CrossEntropy(), tx)))
    return step.trace(state, batch, jax.random.key(0)).lower(lowering_platforms=(platform,)).as_text()


def merged(step):
    return guard_step(step, "stop", merge_norms=True)


def reductions(text):
    return text.count("stablehlo.reduce(")


def test_merged_norm_adds_as_many_reductions_for_20_parameters_as_for_2():
    added = [
        reductions(lowered(*many_leaves(count), merged))
        - reductions(lowered(*many_leaves(count), lambda step: step))
        for count in (2, LEAVES_PER_SUM, 2 * LEAVES_PER_SUM)
    ]
    assert added == [2, 2, 3]


def test_state_passes_a_barrier_on_cpus_only():
    """On a GPU the selection is then part of the kernels that compute the update."""

    def barriers(platform):
        text = lowered(*many_leaves(2), merged, platform)
        return sorted(line.count("tensor<3x2xf32>") for line in text.splitlines() if "barrier" in line)

    assert barriers("cpu") == [0, 6] and barriers("cuda") == [0]  # 2 parameters and 4 moments


@pytest.mark.parametrize(
    ("platform", "axes", "merges"),
    [
        ("gpu", {"data": 1}, True),
        ("gpu", {"data": 8}, True),
        ("gpu", {"data": 2, "fsdp": 4}, False),
        ("cpu", {"data": 1}, False),
    ],
)
def test_program_merges_norms_on_gpus_with_whole_parameters(platform, axes, merges):
    sizes = {"data": 1, "fsdp": 1, "model": 1} | axes
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(
        devices=np.array([device] * 8), shape=sizes, size=int(np.prod(list(sizes.values())))
    )
    model, batch = many_leaves(9)
    tx = optax.sgd(0.1)
    step = update.build_train_step(EXPERIMENT, mesh, model, tx, identity, ())
    state = jax.eval_shape(make_init(model, tx), jax.random.key(0), batch)
    text = jax.jit(step).trace(state, batch, jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()
    assert ("stablehlo.pad" in text) == merges


def test_merged_norm_is_the_norm():
    """Of many parameters of several shapes and dtypes; a NaN in one of them is seen."""
    shapes = [(3, 3, 2, 5), (7,), (), (300, 2), *[(i, 3) for i in range(1, LEAVES_PER_SUM + 1)]]
    change = [np.sin(np.arange(np.prod(shape)) + 1, dtype=np.float32).reshape(shape) for shape in shapes]
    change[1] = change[1].astype(jnp.bfloat16)
    before = State(np.int32(0), [np.zeros_like(x) for x in change], {}, ())

    def norm(change, merge):
        step = guard_step(lambda state, batch, key: (state.replace(params=batch), {}), "stop", merge)
        return jax.jit(step)(before, change, None)[1]["guard"].by_name()["update_norm"]

    assert norm(change, True) == pytest.approx(norm(change, False), rel=1e-6)
    change[0][1, 1, 1, 1] = np.nan
    assert np.isnan(norm(change, True))


def test_merged_norm_of_no_parameters_is_zero():
    before = State(jnp.zeros((), jnp.int32), {}, {}, ())
    step = jax.jit(guard_step(lambda state, batch, key: (state, {}), "stop", merge_norms=True))
    assert step(before, {}, None)[1]["guard"].by_name()["update_norm"] == 0


def launches(text):
    """The number of kernels and copies that the entry computation of a program starts."""
    entry = text[text.index("\nENTRY ") :]
    found = re.findall(r"^\s+(?:ROOT )?%\S+ = .*? ([a-z][\w-]*)\(", entry, re.MULTILINE)
    return sum(op not in ("parameter", "constant", "get-tuple-element", "tuple", "bitcast") for op in found)


@needs_compiler
@pytest.mark.full(
    "tests/step/test_guard_program.py::test_merged_norm_adds_as_many_reductions_for_20_parameters_as_for_2"
)
def test_guard_adds_at_most_a_tenth_of_the_launches_on_a_gpu():
    (device,) = h100()
    where = jax.sharding.SingleDeviceSharding(device)
    model = models.GPT(vocab=64, context=32, width=64, depth=2, heads=2, dropout=0.0, attention="xla")
    tx = optim.AdamW(lr=1e-3, clip=1.0).build(100)
    batch = {"tokens": jnp.zeros((4, 32), jnp.int32), "label": jnp.zeros((4, 32), jnp.int32)}
    state = jax.eval_shape(make_init(model, tx), jax.random.key(0), batch)
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (state, batch, jax.random.key(0))
    )

    def compiled(guarded):
        step = guarded(make_train_step(model, CrossEntropy(task="language_model"), tx))
        return jax.jit(step, donate_argnums=0).lower(*args).compile()

    off, on = compiled(lambda step: step), compiled(merged)
    assert 50 < launches(off.as_text()) <= launches(on.as_text()) <= 1.1 * launches(off.as_text())
    assert on.memory_analysis().alias_size_in_bytes == off.memory_analysis().alias_size_in_bytes
