"""jaxtrain.models.remat: the same gradients from fewer stored activations."""

from __future__ import annotations

import functools
import math
import typing
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Model
from jaxtrain.models import CNN, GPT, Remat, ResNet, UNet, ViT, as_model, compute_in

pytestmark = pytest.mark.full("tests/models/test_models_gpt.py")

KEY = jax.random.key(3, impl="unsafe_rbg")  # compiles in half the time
RNG = np.random.default_rng(0)
POLICIES = [name for name in typing.get_args(Remat) if name != "none"]
SMALL = GPT(vocab=11, context=8, width=8, depth=1, heads=2, mlp=2, dropout=0.3)
NETS = {
    "GPT": SMALL,
    "ViT": ViT(patch=2, width=8, depth=3, heads=2, mlp=2, classes=3, dropout=0.3),
    "ResNet": ResNet(stages=(1,), block="basic", stem="cifar", width=4, classes=3),
    "UNet": UNet(widths=(2, 4), classes=3, dropout=0.3),
    "CNN": CNN(widths=(4,), classes=3, dropout=0.3),  # has no argument ``remat``: wrapped as one block
}
BATCH = {
    "tokens": RNG.integers(0, 11, (4, 8), dtype=np.uint8),
    "image": RNG.normal(size=(4, 4, 4, 3)).astype(np.float32),
}


def batch_of(name: str) -> Any:
    field = "tokens" if name == "GPT" else "image"
    return {field: BATCH[field]}


@functools.cache
def random_state(name: str) -> Any:
    """Return random params and statistics of the net's shapes, without compiling an initialisation."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(as_model(NETS[name]).init, KEY, batch_of(name))
    return jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape).astype(x.dtype), shapes)


def objective(model: Model, batch: Any) -> Any:
    def loss(params: Any, extra: Any) -> Any:
        outputs, extra = model.apply(params, extra, batch, train=True, key=KEY)
        return (outputs**2).mean(), extra

    return loss


@functools.cache
def loss_and_gradient(name: str, remat: Remat) -> Any:
    """Return the loss, the new statistics, and the gradient."""
    loss = objective(as_model(NETS[name], remat), batch_of(name))
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(*random_state(name))


def residual_bytes(model: Model, params: Any, extra: Any, batch: Any) -> int:
    """Return the bytes stored by the forward pass for the backward pass, params included."""
    loss = objective(model, batch)
    backward = jax.eval_shape(lambda p: jax.vjp(lambda q: loss(q, extra)[0], p)[1], params)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(backward))


CASES = [
    ("ResNet", "nothing_saveable"),
    ("GPT", "dots_with_no_batch_dims_saveable"),
    ("UNet", "dots_saveable"),
]


@pytest.mark.parametrize(("name", "remat"), CASES)
def test_loss_statistics_and_gradients_equal_those_without_remat(name: str, remat: Remat) -> None:
    chex.assert_trees_all_close(
        loss_and_gradient(name, remat), loss_and_gradient(name, "none"), rtol=1e-5, atol=1e-6
    )
    (loss, extra), grads = loss_and_gradient(name, remat)
    assert loss > 0 and jax.tree.leaves(grads)[-1].any()
    moved = jax.tree.map(lambda a, b: (a != b).any(), extra, random_state(name)[1])
    assert all(jax.tree.leaves(moved)), "statistics that move, once"


@pytest.mark.parametrize("name", NETS)
def test_parameter_paths_and_the_evaluation_program_do_not_change(name: str) -> None:
    plain, wrapped = as_model(NETS[name]), as_model(NETS[name], "nothing_saveable")
    batch = batch_of(name)
    chex.assert_trees_all_equal_shapes(
        jax.eval_shape(plain.init, KEY, batch), jax.eval_shape(wrapped.init, KEY, batch)
    )
    texts = []
    for model in (plain, wrapped):
        apply = functools.partial(model.apply, train=False, key=None)
        texts.append(
            jax.jit(lambda *args, apply=apply: apply(*args)).lower(*random_state(name), batch).as_text()
        )
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", NETS)
def test_less_is_stored_for_the_backward_pass(name: str) -> None:
    bytes_of = {
        remat: residual_bytes(as_model(NETS[name], remat), *random_state(name), batch_of(name))
        for remat in typing.get_args(Remat)
    }
    assert bytes_of["nothing_saveable"] < bytes_of["dots_saveable"] < bytes_of["none"]
    assert bytes_of["nothing_saveable"] <= bytes_of["dots_with_no_batch_dims_saveable"]
    assert bytes_of["dots_with_no_batch_dims_saveable"] <= bytes_of["dots_saveable"]
    if name == "GPT":
        assert len(set(bytes_of.values())) == 4


def test_each_block_has_its_own_barrier() -> None:
    """Each recomputed part has a barrier, without which XLA would merge the two computations."""

    def barriers(name: str, remat: Remat) -> int:
        loss = objective(as_model(NETS[name], remat), batch_of(name))
        return (
            jax.jit(jax.grad(loss, has_aux=True))
            .lower(*random_state(name))
            .as_text()
            .count("optimization_barrier")
        )

    assert barriers("GPT", "none") == 0
    assert barriers("ViT", "dots_saveable") == 3
    assert barriers("UNet", "nothing_saveable") == 3  # down, bottom and up
    assert barriers("GPT", "nothing_saveable") == barriers("CNN", "nothing_saveable") == 1


def test_compiled_step_needs_less_memory_if_the_compiler_keeps_the_barriers() -> None:
    """XLA:CPU removes the barriers early, and then stores the activations, unless an option prevents it."""
    net = GPT(vocab=11, context=64, width=16, depth=3, heads=2, dropout=0.0)
    batch = {"tokens": np.zeros((8, 64), np.uint8)}
    state = jax.eval_shape(as_model(net).init, KEY, batch)

    def temporary(remat: Remat) -> int:
        loss = objective(as_model(net, remat), batch)
        step = jax.jit(
            jax.grad(loss, has_aux=True),
            compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"},
        )
        return step.lower(*state).compile().memory_analysis().temp_size_in_bytes

    assert temporary("nothing_saveable") < 0.5 * temporary("none")


@pytest.mark.parametrize("remat", POLICIES)
def test_pair_of_functions_is_wrapped_in_training_only(remat: Remat) -> None:
    pair = Model(
        init=lambda key, batch: ({"w": jnp.full(3, 0.1)}, {"seen": jnp.zeros(())}),
        apply=lambda params, extra, batch, *, train, key: (
            jnp.sin(jnp.sin(jnp.einsum("bi,bi->b", batch["x"], jnp.sin(batch["x"] * params["w"][None])))),
            {"seen": extra["seen"] + 1} if train else extra,
        ),
    )
    batch = {"x": jnp.ones((4, 3))}
    assert as_model(pair) is pair and as_model((pair.init, pair.apply), "none") == pair
    params, extra = pair.init(KEY, batch)
    plain = jax.value_and_grad(objective(pair, batch), has_aux=True)(params, extra)
    for model in (as_model(pair, remat), as_model(tuple(pair[:2]), remat)):
        found = jax.value_and_grad(objective(model, batch), has_aux=True)(params, extra)
        chex.assert_trees_all_close(found, plain, rtol=1e-6)
        assert found[0][1]["seen"] == 1
        assert residual_bytes(model, params, extra, batch) < residual_bytes(pair, params, extra, batch)
        assert model.apply(params, extra, batch, train=False, key=None)[1]["seen"] == 0
        one, other = (functools.partial(m.apply, train=False, key=None) for m in (model, pair))
        assert str(jax.make_jaxpr(one)(params, extra, batch)) == str(
            jax.make_jaxpr(other)(params, extra, batch)
        )


def test_policy_applies_in_half_precision() -> None:
    batch, (params, extra) = batch_of("GPT"), random_state("GPT")
    plain = compute_in(as_model(SMALL), "bfloat16")
    wrapped = compute_in(as_model(SMALL, "nothing_saveable"), "bfloat16")
    assert residual_bytes(wrapped, params, extra, batch) < 0.5 * residual_bytes(plain, params, extra, batch)


def test_module_gets_the_policy_in_training_and_none_otherwise() -> None:
    calls: list[Any] = []

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False, remat: Remat = "none") -> jax.Array:
            calls.append((train, remat))
            return nn.Dense(2)(x)

    model, batch = as_model(Net(), "dots_saveable"), {"x": jnp.ones((2, 3))}
    params, extra = model.init(KEY, batch)
    model.apply(params, extra, batch, train=True, key=KEY)
    model.apply(params, extra, batch, train=False, key=None)
    assert calls == [(False, "none"), (True, "dots_saveable"), (False, "none")]


@pytest.mark.parametrize("junk", ["all", "", None, "everything_saveable"])
def test_unknown_policy_is_refused_with_the_known_ones(junk: Any) -> None:
    with pytest.raises(
        InputError, match=r"remat is .*: it must be one of none, nothing_saveable, dots_saveable"
    ):
        as_model(SMALL, junk)
