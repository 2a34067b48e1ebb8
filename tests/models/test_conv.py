"""``models.cpu_conv``: equal to ``flax.linen.Conv``, with unchanged programs for GPUs."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain.models.cpu_conv import conv
from jaxtrain.program import flops

pytestmark = pytest.mark.full("tests/models/test_models.py")

# batch, height, width, channels, outputs, kernel, padding. Above and below the limits of both CPU
# implementations: more than 16 examples or outputs, fewer than 8 channels in and out; odd and even sides and
# kernels.
CASES = [
    (20, 8, 8, 3, 9, 3, "SAME"),
    (20, 7, 9, 9, 5, 3, "SAME"),
    (18, 9, 7, 2, 20, 2, "VALID"),
    (17, 4, 4, 10, 10, 4, "SAME"),
    (17, 12, 11, 3, 6, 5, "VALID"),
    (3, 11, 6, 1, 7, 3, "SAME"),
    (2, 5, 5, 4, 3, 5, "VALID"),
    (2, 6, 13, 6, 4, 2, "SAME"),
]


def pair(outputs: int, kernel: int, **settings: Any) -> tuple[nn.Conv, nn.Conv]:
    return conv(outputs, kernel, **settings), nn.Conv(outputs, (kernel, kernel), **settings)


def gradients(module: nn.Conv) -> Any:
    """Return outputs, and gradients of a nonlinear function of them."""

    def loss(variables: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = module.apply(variables, image)
        return jnp.sin(out).sum(), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def same(found: Any, wanted: Any, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_in_float64(case: tuple[Any, ...]) -> None:
    *shape, outputs, kernel, padding = case
    with jax.enable_x64(True):
        ours, stock = pair(outputs, kernel, padding=padding, param_dtype=jnp.float64, dtype=jnp.float64)
        image = jnp.asarray(np.random.default_rng(0).normal(size=shape))
        variables = stock.init(jax.random.key(0), image)
        same(gradients(ours)(variables, image), gradients(stock)(variables, image), rtol=1e-10, atol=1e-11)


def test_parameters_are_the_same() -> None:
    ours, stock = pair(6, 3)
    image = jnp.ones((2, 5, 5, 3))
    same(ours.init(jax.random.key(1), image), stock.init(jax.random.key(1), image), rtol=0)


@pytest.mark.parametrize(
    "settings", [{"strides": 2}, {"feature_group_count": 2}, {"kernel_dilation": 2}], ids=str
)
def test_other_convolutions_are_passed_to_jax(settings: dict[str, Any]) -> None:
    ours, stock = pair(4, 3, **settings)
    image = jax.random.normal(jax.random.key(0), (20, 8, 8, 2))
    variables = stock.init(jax.random.key(0), image)
    assert str(jax.make_jaxpr(ours.apply)(variables, image)) == str(
        jax.make_jaxpr(stock.apply)(variables, image)
    )


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_programs_for_gpus_are_those_of_flax(case: tuple[Any, ...]) -> None:
    *shape, outputs, kernel, padding = case
    image = jnp.ones(shape)
    ours, stock = pair(outputs, kernel, padding=padding)
    variables = stock.init(jax.random.key(0), image)

    def text(module: nn.Conv, platform: str) -> str:
        traced = gradients(module).trace(variables, image)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert text(ours, "cuda") == text(stock, "cuda")
    assert text(ours, "cpu") != text(stock, "cpu")  # otherwise the test would prove nothing


def test_kernel_gradient_does_not_use_the_slow_implementation() -> None:
    """It is not run by YNNPACK, unlike other convolutions on XLA:CPU, and its operands are not swapped."""
    image, out = jnp.ones((32, 8, 8, 9)), jnp.ones((32, 8, 8, 24))
    ours = conv(24, 3, use_bias=False)
    variables = ours.init(jax.random.key(0), image)

    def gradient(variables: Any, image: jax.Array, out: jax.Array) -> Any:
        return jax.vjp(lambda v: ours.apply(v, image), variables)[1](out)

    text = jax.jit(gradient).lower(variables, image, out).compile().as_text()
    (found,) = re.findall(r"convolution\(.*", text)
    assert "size=9x8" in found and "reversal" not in found and "__ynn_fusion" not in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision(dtype: Any) -> None:
    ours, stock = pair(9, 3, dtype=dtype, param_dtype=dtype)
    image = jax.random.normal(jax.random.key(0), (17, 6, 6, 4), dtype)
    variables = stock.init(jax.random.key(0), image)
    found, wanted = gradients(ours)(variables, image), gradients(stock)(variables, image)
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(wanted)]
    as_float = [jax.tree.map(lambda x: np.asarray(x, np.float32), tree) for tree in (found, wanted)]
    same(*as_float, rtol=0.05, atol=0.5)


def test_forward_mode_vmap_scan_and_remat() -> None:
    ours, stock = pair(9, 3)
    image = jax.random.normal(jax.random.key(0), (3, 17, 5, 5, 2))
    variables = stock.init(jax.random.key(0), image[0])

    def results(module: nn.Conv) -> Any:
        def loss(v: Any, x: jax.Array) -> jax.Array:
            return jnp.sin(module.apply(v, x)).sum()

        def scanned(v: Any) -> jax.Array:
            body = jax.checkpoint(lambda total, x: (total + loss(v, x), None))
            return jax.lax.scan(body, 0.0, image)[0]

        def everything(v: Any, x: jax.Array) -> Any:
            return (
                jax.jvp(loss, (v, x[0]), (v, x[1])),
                jax.jvp(lambda x: loss(v, x), (x[0],), (x[1],)),
                jax.vmap(jax.grad(loss), (None, 0))(v, x),
                jax.grad(lambda v: jax.vmap(loss, (None, 0))(v, x).sum())(v),
                jax.grad(scanned)(v),
            )

        return jax.jit(everything)(variables, image)

    same(results(ours), results(stock), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", [CASES[3], CASES[6]], ids=str)
def test_second_derivatives(case: tuple[Any, ...]) -> None:
    *shape, outputs, kernel, padding = case
    with jax.enable_x64(True):
        nets = pair(outputs, kernel, padding=padding, param_dtype=jnp.float64, dtype=jnp.float64)
        image = jnp.asarray(np.random.default_rng(0).normal(size=shape))
        variables = nets[1].init(jax.random.key(0), image)

        def products(module: nn.Conv) -> Any:
            """Return Hessian-vector products, forward over reverse and reverse over reverse."""

            def gradient(at: Any) -> Any:
                return jax.grad(lambda at: jnp.sin(module.apply(*at)).sum())(at)

            def along(at: Any) -> Any:
                return sum(
                    jnp.vdot(g, x) for g, x in zip(*map(jax.tree.leaves, (gradient(at), at)), strict=True)
                )

            at = (variables, image)
            return jax.jit(lambda at: (jax.jvp(gradient, (at,), (at,))[1], jax.grad(along)(at)))(at)

        same(products(nets[0]), products(nets[1]), rtol=1e-9, atol=1e-9)


def test_sharded_over_eight_devices(mesh8: Any) -> None:
    ours, stock = pair(8, 3)
    image = jax.random.normal(jax.random.key(0), (24, 8, 8, 3))
    variables = stock.init(jax.random.key(0), image)
    axes = jax.sharding.PartitionSpec(mesh8.axis_names)
    split = jax.device_put(image, jax.sharding.NamedSharding(mesh8, axes))
    same(gradients(ours)(variables, split), gradients(stock)(variables, image), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_flops_are_counted_as_for_flax(case: tuple[Any, ...]) -> None:
    *shape, outputs, kernel, padding = case
    image = jnp.zeros(shape)
    counts = []
    for module in pair(outputs, kernel, padding=padding):
        variables = module.init(jax.random.key(0), image)
        counts.append(flops.flops_of(gradients(module).trace(variables, image)))
    assert counts[0] == counts[1] > 0
