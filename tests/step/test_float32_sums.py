"""jaxtrain.step.float32_sums: sums of half-precision numbers accumulate in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxtrain.core.errors import InputError
from jaxtrain.data import Digits
from jaxtrain.experiment import Experiment
from jaxtrain.losses import CrossEntropy
from jaxtrain.metrics import Mean
from jaxtrain.models import (
    CNN,
    GPT,
    MLP,
    Factors,
    GRUForecaster,
    LSTMClassifier,
    ResNet,
    UNet,
    ViT,
    as_model,
    compute_in,
)
from jaxtrain.optim import SGD
from jaxtrain.program.update import build_train_step
from jaxtrain.sharding import make_mesh
from jaxtrain.step import make_init, make_train_step
from jaxtrain.step.float32_sums import HALF, sum_in_float32

KEY = jax.random.key(0)
TOKENS = jnp.zeros((4, 8), jnp.int32)
IMAGE = {"image": jnp.ones((4, 16, 16, 3))}


class OwnBias(nn.Module):
    """A user's module, with a bias, a scale and a learned token that no layer of Flax makes."""

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = image.reshape(image.shape[0], -1, 3)
        token = self.param("token", nn.initializers.normal(), (1, 1, 3))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 3)), x], 1)
        x = nn.GroupNorm(num_groups=1)(nn.Embed(5, 3)(jnp.zeros(x.shape[:2], jnp.int32)) + x)
        scale, bias = (self.param(name, nn.initializers.ones, (1, 1, 3)) for name in ("scale", "bias"))
        x = x * scale + bias
        return nn.RMSNorm()(x)


FAMILIES = {
    "gpt": (GPT(vocab=9, context=8, width=8, depth=1, heads=2, positions="learned"), {"tokens": TOKENS}),
    "gpt chunked": (GPT(vocab=9, context=8, width=8, depth=1, heads=2, head_chunk=4), {"tokens": TOKENS}),
    "vit": (ViT(patch=8, width=8, depth=1, heads=2, classes=5, positions="learned"), IMAGE),
    "resnet": (ResNet(stages=(1,), width=4, classes=5, block="basic", stem="cifar"), IMAGE),
    "cnn": (CNN(widths=(4,), classes=5), IMAGE),
    "unet": (UNet(), IMAGE),
    "lstm": (LSTMClassifier(width=4, embedding=4), {"tokens": TOKENS, "length": jnp.full(4, 8)}),
    "gru": (GRUForecaster(width=4, horizon=3, variables=2), {"series": jnp.ones((4, 8, 2))}),
    "factors": (
        Factors(users=9, items=9, width=4, hidden=(4,)),
        {"user": TOKENS[:, 0], "item": TOKENS[:, 1]},
    ),
    "own": (OwnBias(), IMAGE),
}


def total(outputs: Any, batch: Any) -> Any:
    loss = sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(outputs))
    return loss, {"loss": Mean(loss, jnp.float32(1))}


def step_of(model: Any, batch: Any, **settings: Any) -> tuple[Any, tuple[Any, ...]]:
    tx = optax.sgd(0.1)
    state = jax.eval_shape(make_init(model, tx), KEY, batch)
    return make_train_step(model, total, tx, **settings), (state, batch, KEY)


def programs(jaxpr: Jaxpr) -> list[Jaxpr]:
    """Return the program and all programs inside it, but not those of one element of a scatter."""
    found = [jaxpr]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values() if eqn.primitive.name != "scatter-add" else ():
            for one in value if isinstance(value, tuple | list) else (value,):
                if isinstance(one, ClosedJaxpr | Jaxpr):
                    found += programs(one.jaxpr if isinstance(one, ClosedJaxpr) else one)
    return found


def half_sums(closed: ClosedJaxpr) -> list[str]:
    """Return the sums of the program that accumulate in half precision, also those from step to step."""
    found = []
    for jaxpr in programs(closed.jaxpr):
        for eqn in jaxpr.eqns:
            name, aval = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
            if name in ("reduce_sum", "scatter-add") and aval.dtype in HALF:
                found.append(f"{name} {aval}")
            if name == "scan":
                body, first, count = (
                    eqn.params["jaxpr"].jaxpr,
                    eqn.params["num_consts"],
                    eqn.params["num_carry"],
                )
                carries = dict(zip(body.invars[first : first + count], body.outvars[:count], strict=True))
                adds = {x: e for e in body.eqns if e.primitive.name == "add_any" for x in e.outvars}
                found += [
                    f"scan {x.aval}"
                    for x, out in carries.items()
                    if x.aval.dtype in HALF and out in adds and x in adds[out].invars
                ]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_no_sum_of_a_train_step_accumulates_in_half_precision(name: str) -> None:
    model, batch = FAMILIES[name]
    step, args = step_of(compute_in(model, "bfloat16"), batch)
    assert half_sums(jax.make_jaxpr(step)(*args)) == []


def test_the_sums_that_jax_makes_accumulate_in_half_precision() -> None:
    """What the test above would find: without it a rename in JAX would turn that test off."""
    kinds = set()
    for name in ("gpt", "lstm", "own"):
        model, batch = FAMILIES[name]
        pair = compute_in(model, "bfloat16")
        params, extra = jax.eval_shape(pair.init, KEY, batch)

        def loss(params: Any, pair: Any = pair, extra: Any = extra, batch: Any = batch) -> Any:
            return total(pair.apply(params, extra, batch, train=True, key=KEY)[0], batch)[0]

        kinds |= {found.split()[0] for found in half_sums(jax.make_jaxpr(jax.grad(loss))(params))}
    assert kinds == {"reduce_sum", "scatter-add", "scan"}


@pytest.mark.parametrize(
    "case", ["float16", "remat", "accumulate", "its own dtype", "factory of the user's own loop"]
)
def test_other_ways_to_half_precision_are_covered(case: str) -> None:
    model, batch = FAMILIES["gpt"]
    settings = {"accumulate": 2} if case == "accumulate" else {}
    if case == "its own dtype":
        model, batch = nn.Dense(4, dtype=jnp.bfloat16), {"x": jnp.ones((8, 3))}
    elif case == "remat":
        model = compute_in(as_model(model, "nothing_saveable"), "bfloat16")
    else:
        model = compute_in(model, "float16" if case == "float16" else "bfloat16")
    if case == "factory of the user's own loop":
        params, extra = jax.eval_shape(model.init, KEY, batch)

        def update(params: Any) -> Any:
            outputs = lambda p: model.apply(p, extra, batch, train=True, key=KEY)[0]  # noqa: E731
            return jax.grad(lambda p: total(outputs(p), batch)[0])(params)

        assert half_sums(jax.make_jaxpr(update)(params))
        assert not half_sums(jax.make_jaxpr(sum_in_float32(update))(params))
        return
    step, args = step_of(model, batch, **settings)
    assert half_sums(jax.make_jaxpr(step)(*args)) == []


def in_own_dtype(closed: ClosedJaxpr, *args: Any) -> Any:
    """Evaluate a program whose sums run one row after another in the dtype of their operation.

    XLA:CPU adds bfloat16 in float32. The kernels that XLA compiles for an NVIDIA GPU do not.
    """
    env = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *args], strict=True))
    for eqn in closed.jaxpr.eqns:
        values = [x.val if hasattr(x, "val") else env[x] for x in eqn.invars]
        if eqn.primitive.name == "reduce_sum" and eqn.params["axes"] == (0,):
            result = np.add.accumulate(np.asarray(values[0]), 0, dtype=values[0].dtype)[-1]
        else:
            result = eqn.primitive.bind(*values, **eqn.params)
        env[eqn.outvars[0]] = jnp.asarray(result)
    return env[closed.jaxpr.outvars[0]]


def test_a_bias_gradient_over_16384_rows_is_near_float64() -> None:
    rng = np.random.default_rng(0)
    slope = jnp.asarray(rng.normal(0.1, 1, (16_384, 32)), jnp.bfloat16)

    def gradient(bias: jax.Array) -> jax.Array:
        def loss(bias: jax.Array) -> jax.Array:
            return ((bias.astype(jnp.bfloat16)[None] * slope).astype(jnp.float32)).sum()

        return jax.grad(loss)(bias)

    exact = np.asarray(slope).astype(np.float64).sum(0)

    def error(fn: Any) -> float:
        found = np.asarray(in_own_dtype(jax.make_jaxpr(fn)(jnp.zeros(32)), jnp.zeros(32)))
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    assert error(gradient) > 0.01  # the emulation shows the fault
    assert error(sum_in_float32(gradient)) < 0.004  # one rounding of the result: 2 ** -9 at most
    assert error(sum_in_float32(gradient, lambda _: True)) < 1e-5


def test_programs_inside_a_program_are_rewritten_and_compute_the_same() -> None:
    def fn(x: jax.Array) -> Any:
        half = x.astype(jnp.bfloat16)
        added = jax.jit(lambda y: jax.lax.reduce_sum(y, (0,)))(half)
        chosen = jax.lax.cond(x[0, 0] > 0, lambda y: jax.lax.reduce_sum(y, (0,)), lambda y: y[0], half)
        looped = jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jax.lax.reduce_sum(c[1], (0,))[None] + c[1]), (0, half)
        )[1]
        scanned = jax.lax.scan(lambda c, y: (c + y, jax.lax.reduce_sum(y, (0,))), half[0], half)
        again = jax.grad(lambda y: jax.checkpoint(lambda z: jnp.sin(z + y[None]))(half).sum().astype(float))
        return added, chosen, looped, scanned, again(half[0])

    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
    assert len(half_sums(jax.make_jaxpr(fn)(x))) >= 5
    assert half_sums(jax.make_jaxpr(sum_in_float32(fn))(x)) == []
    found, expected = jax.jit(sum_in_float32(fn))(x), jax.jit(fn)(x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0.02, atol=0.02)


@pytest.mark.full(
    "tests/step/test_float32_sums.py::test_no_sum_of_a_train_step_accumulates_in_half_precision"
)
def test_a_float32_program_is_unchanged() -> None:
    model, batch = FAMILIES["cnn"]
    params, extra = jax.jit(as_model(model).init)(KEY, batch)

    def update(params: Any) -> Any:
        return jax.grad(
            lambda p: total(as_model(model).apply(p, extra, batch, train=True, key=KEY)[0], batch)[0]
        )(params)

    assert jax.jit(sum_in_float32(update)).lower(params).as_text() == jax.jit(update).lower(params).as_text()


@pytest.mark.parametrize(("dtype", "wide"), [("float32", 2), ("compute", 0)])
def test_products_for_gradients_write_the_dtype_that_devices_add_up(dtype: str, wide: int) -> None:
    """The program before XLA, for an NVIDIA GPU; the collectives are checked in tests/program."""
    model, batch = compute_in(MLP(widths=(6,), classes=3), "bfloat16"), {"image": jnp.ones((4, 5))}
    step, args = step_of(model, batch, grad_reduce_dtype=dtype)
    text = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 5 and sum(line.endswith("xf32>") for line in products) == wide
    assert "across dimensions = [0] : (tensor<4x6xbf16>" not in text


def test_an_unknown_grad_reduce_dtype_is_refused() -> None:
    message = "grad_reduce_dtype is 'bfloat16': it must be one of float32, compute"
    with pytest.raises(InputError, match=message):
        make_train_step(MLP(), total, optax.sgd(0.1), grad_reduce_dtype="bfloat16")  # type: ignore[arg-type]


def own_factory(model: Any, loss_fn: Any, tx: Any, prepare: Any, post_update: Any, **settings: Any) -> Any:
    """A step factory that differentiates by itself."""

    def step(state: Any, batch: Any, key: jax.Array) -> Any:
        def objective(params: Any) -> Any:
            outputs, _ = model.apply(params, state.extra, batch, train=True, key=key)
            return loss_fn(outputs, batch)

        grads, metrics = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    assert settings in ({}, {"grad_reduce_dtype": "compute"})
    return step


@pytest.mark.parametrize("dtype", ["float32", "compute"])
def test_the_step_factory_of_an_experiment_is_covered(dtype: str) -> None:
    exp = Experiment(
        model=MLP(widths=(6,), classes=10),
        train=Digits("train"),
        test=Digits("test"),
        loss=CrossEntropy(),
        optimizer=SGD(lr=0.1),
        batch=8,
        epochs=1,
        precision="bfloat16",
        step_factory=own_factory,
        grad_reduce_dtype=dtype,  # type: ignore[arg-type]
    )
    batch = {"image": jnp.ones((8, 8, 8, 1)), "label": jnp.zeros(8, jnp.int32)}
    model, tx = compute_in(exp.model, "bfloat16"), optax.sgd(0.1)
    state = jax.eval_shape(make_init(model, tx), KEY, batch)
    step = build_train_step(exp, make_mesh(jax.devices()[:1]), model, tx, lambda batch, key: batch, ())
    assert half_sums(jax.make_jaxpr(own_factory(model, exp.loss, tx, None, ()))(state, batch, KEY))
    assert half_sums(jax.make_jaxpr(step)(state, batch, KEY)) == []


@pytest.mark.parametrize(("product", "dtype"), [("convolution", "bfloat16"), ("dot", "float32")])
def test_gradients_of_convolution_kernels_stay_in_half_precision(product: str, dtype: str) -> None:
    """A gradient that no operation has in float32 is moved as it is, and converted at the end."""
    shape = (3, 3, 4, 8) if product == "convolution" else (4, 8)
    x = jnp.ones((2, 6, 6, 4), jnp.bfloat16)

    def loss(kernel: jax.Array) -> jax.Array:
        kernel = jax.lax.optimization_barrier(kernel.astype(jnp.bfloat16))
        if product == "dot":
            return (x @ kernel).astype(jnp.float32).sum()
        layout = jax.lax.conv_dimension_numbers(x.shape, shape, ("NHWC", "HWIO", "NHWC"))
        out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
        return out.astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(sum_in_float32(jax.grad(loss), lambda _: True))(jnp.ones(shape)).jaxpr
    *_, last = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "optimization_barrier")
    assert last.outvars[0].aval.dtype == dtype and jaxpr.outvars[0].aval.dtype == "float32"
