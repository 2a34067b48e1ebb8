"""step.guard: what the guard adds to a program for a GPU, none of which is needed here."""

from __future__ import annotations

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gpu_programs import h100, needs_compiler
from jax.sharding import NamedSharding, PartitionSpec
from tiny import EXPERIMENT

from jaxtrain import models, optim, sharding
from jaxtrain.core.types import Model, State
from jaxtrain.losses import CrossEntropy
from jaxtrain.models import as_model
from jaxtrain.plan.collectives import collectives
from jaxtrain.plan.gpu_program import read_gpu_program
from jaxtrain.program import update
from jaxtrain.sharding import described
from jaxtrain.step import make_init, make_train_step
from jaxtrain.step.factories import identity
from jaxtrain.step.guard import guard_step
from jaxtrain.step.merged_norm import LEAVES_PER_SUM, merged_norm


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
    return guard_step(step, "stop", norm=merged_norm)


def reductions(text):
    return text.count("stablehlo.reduce(")


@pytest.mark.full("tests/step/test_guard_program.py::test_merged_norm_is_the_norm")
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


AXES = ("data", "fsdp", "model")


def mesh_of_cpus(*sizes):
    return jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("platform", "sizes", "sums"),
    [("gpu", (8, 1, 1), 0), ("gpu", (2, 4, 1), 1), ("cpu", (8, 1, 1), None), ("cpu", (2, 4, 1), None)],
)
def test_program_merges_norms_on_gpus(platform, sizes, sums):
    """Of sharded parameters each device has one number, and the devices add these up."""
    mesh, (model, batch), tx = mesh_of_cpus(*sizes), many_leaves(9), optax.sgd(0.1)
    device = types.SimpleNamespace(platform=platform)
    fake = types.SimpleNamespace(devices=np.array([device] * 8), shape=mesh.shape, size=8)
    state = jax.eval_shape(make_init(model, tx), jax.random.key(0), batch)
    spec = PartitionSpec(None, "fsdp") if sums else PartitionSpec()
    state = state.replace(params=[jax.ShapeDtypeStruct((3, 4), "float32")] * 9)
    batch["x"] = jnp.ones((4, 3))
    shardings = [NamedSharding(mesh, spec)] * 9
    step = update.build_train_step(EXPERIMENT, fake, model, tx, identity, (), shardings=shardings)
    text = jax.jit(step).trace(state, batch, jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()
    assert ("stablehlo.pad" in text) == (sums is not None)
    assert text.count("stablehlo.all_reduce") == (sums or 0)


@pytest.mark.parametrize("count", [2, LEAVES_PER_SUM])
def test_merged_norm_of_sharded_leaves_has_two_reductions(count):
    """The squares of all local parts, the sum of the rows; and one sum over the devices."""
    mesh = mesh_of_cpus(2, 2, 2)
    specs = [PartitionSpec("fsdp"), PartitionSpec(None, "model"), PartitionSpec()] * count
    shardings = [NamedSharding(mesh, spec) for spec in specs[:count]]
    norm = jax.jit(lambda leaves: merged_norm(leaves, shardings), in_shardings=(shardings,))
    text = norm.trace([jnp.ones((4, 6))] * count).lower(lowering_platforms=("cuda",)).as_text()
    assert (reductions(text), text.count("stablehlo.all_reduce")) == (2, 1)
    assert "all_gather" not in text


def test_merged_norm_is_the_norm():
    """Of many parameters of several shapes and dtypes; a NaN in one of them is seen."""
    shapes = [(3, 3, 2, 5), (7,), (), (300, 2), *[(i, 3) for i in range(1, LEAVES_PER_SUM + 1)]]
    change = [np.sin(np.arange(np.prod(shape)) + 1, dtype=np.float32).reshape(shape) for shape in shapes]
    change[1] = change[1].astype(jnp.bfloat16)
    before = State(np.int32(0), [np.zeros_like(x) for x in change], {}, ())

    def norm(change, norm):
        step = guard_step(lambda state, batch, key: (state.replace(params=batch), {}), "stop", norm)
        return jax.jit(step)(before, change, None)[1]["guard"].by_name()["update_norm"]

    assert norm(change, merged_norm) == pytest.approx(norm(change, optax.tree.norm), rel=1e-6)
    change[0][1, 1, 1, 1] = np.nan
    assert np.isnan(norm(change, merged_norm))


def test_merged_norm_of_sharded_leaves_is_the_norm():
    """Parts that several devices store count once; a NaN in the part of one device is seen by all."""
    mesh = mesh_of_cpus(2, 2, 2)
    cases = {
        (4, 6): ("fsdp",),
        (3, 2): (None, "model"),
        (5,): (),
        (2, 4): ("model", "fsdp"),
        (3, 8): (None, ("fsdp", "model")),
        (3, 3, 2, 4): (None, None, None, "model"),
    }
    shardings = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in cases.values()]
    leaves = [np.sin(np.arange(np.prod(shape)) + 1, dtype=np.float32).reshape(shape) for shape in cases]
    norm = jax.jit(lambda leaves: merged_norm(leaves, shardings), in_shardings=(shardings,))
    want = np.linalg.norm(np.concatenate([leaf.ravel() for leaf in leaves]).astype(np.float64))
    assert float(norm(leaves)) == pytest.approx(want, rel=1e-6)
    leaves[4][2, 7] = np.nan
    seen = [np.asarray(shard.data) for shard in norm(leaves).addressable_shards]
    assert len(seen) == 8 and np.isnan(seen).all()


def test_merged_norm_of_no_parameters_is_zero():
    before = State(jnp.zeros((), jnp.int32), {}, {}, ())
    step = jax.jit(guard_step(lambda state, batch, key: (state, {}), "stop", norm=merged_norm))
    assert step(before, {}, None)[1]["guard"].by_name()["update_norm"] == 0


@needs_compiler
@pytest.mark.full(
    "tests/step/test_guard_program.py::test_merged_norm_is_the_norm",
    "tests/step/test_guard_program.py::test_merged_norm_of_sharded_leaves_has_two_reductions",
)
@pytest.mark.parametrize("text", ["data=1", "data=2,fsdp=4"])
def test_guard_adds_at_most_a_tenth_of_the_launches_on_gpus(text):
    count = 1 if text == "data=1" else 8
    mesh = sharding.make_mesh(h100(count), sharding.parse_mesh(text, count))
    model = as_model(
        models.GPT(vocab=64, context=32, width=64, depth=2, heads=4, dropout=0.0, attention="xla")
    )
    tx = optim.AdamW(lr=1e-3, clip=1.0).build(100)
    tokens = jax.ShapeDtypeStruct(
        (512, 32), jnp.int32
    )  # so that activations, not parameters, are most of the bytes
    batch, key = {"tokens": tokens, "label": tokens}, jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(make_init(model, tx), key, batch)
    placed = sharding.place(state, mesh, model.axes(batch)).shardings
    rows, copies = sharding.batch_split(mesh), sharding.replicated(mesh)

    def compiled(guarded: Any) -> tuple[Any, Any]:
        gathered = sharding.gather_params(model, placed.params)
        step = guarded(make_train_step(gathered, CrossEntropy(task="language_model"), tx))
        jitted = jax.jit(
            step, in_shardings=(placed, rows, copies), out_shardings=(placed, copies), donate_argnums=0
        )
        with described.without_compilation_cache():
            made = jitted.lower(state, batch, key).compile()
        return made, read_gpu_program(made.as_text(), mesh)

    (off, without), (on, program) = (
        compiled(lambda step: step),
        compiled(
            lambda step: guard_step(
                step, "stop", norm=functools.partial(merged_norm, shardings=placed.params)
            )
        ),
    )
    assert 50 < without.launches <= program.launches <= 1.1 * without.launches
    assert program.traffic <= 1.02 * without.traffic
    assert on.memory_analysis().alias_size_in_bytes == off.memory_analysis().alias_size_in_bytes
    gathers = [[one for one in collectives(x.as_text(), mesh) if one.kind != "all-reduce"] for x in (off, on)]
    assert gathers[0] == gathers[1]
