"""Convolutions over the mesh axis ``model``: pairs, whose activations stay where they are computed."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from gpu_programs import compile_step, h100, needs_compiler

from jaxtrain import models, sharding
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import State
from jaxtrain.models import as_model
from jaxtrain.models.layers import conv_axes
from jaxtrain.plan.collectives import collectives

MESH = "data=4,model=2"
BASIC = models.ResNet(stages=(1, 1), block="basic", stem="cifar", width=16, classes=4)


def over_model(text: str, mesh: Any) -> dict[str, int]:
    """Bytes of the collectives over ``model`` by kind, without those of a few numbers."""
    found = [one for one in collectives(text, mesh) if "model" in one.axes and one.bytes > 1000]
    return {one.kind: one.bytes for one in found}


def activation(rows: int, side: int, channels: int, itemsize: int) -> int:
    return math.prod((rows, side, side, channels, itemsize))


def place(module: Any, shape: tuple[int, ...]) -> tuple[Any, Any, Any, Any, Any]:
    mesh = sharding.make_mesh(jax.devices(), sharding.parse_mesh(MESH, 8))
    model, batch = as_model(module), {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
    params, extra = jax.eval_shape(model.init, jax.random.key(0), batch)
    state = State(jax.ShapeDtypeStruct((), jnp.int32), params, extra, ())
    return mesh, model, batch, state, sharding.place(state, mesh, model.axes(batch)).shardings


def test_a_pair_of_convolutions_communicates_once_in_each_direction():
    """The sum of its outputs, and of its input's gradient; nothing is gathered over ``model``."""
    mesh, model, batch, state, placed = place(BASIC, (16, 8, 8, 3))

    def loss(params: Any, extra: Any, batch: Any) -> Any:
        outputs, extra = model.apply(params, extra, batch, train=True, key=jax.random.key(1))
        return (outputs**2).mean(), extra

    split = (placed.params, placed.extra)
    step = jax.jit(
        jax.grad(loss, has_aux=True), in_shardings=(*split, sharding.batch_split(mesh)), out_shardings=split
    )
    lowered = step.lower(state.params, state.extra, batch)
    text = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"}).as_text()
    pairs = [
        activation(4, 8, 16, 4),
        activation(4, 8, 16, 4),
        activation(4, 4, 32, 4),
        activation(4, 8, 16, 4),
    ]
    assert over_model(text, mesh) == {"all-reduce": sum(pairs)}  # forward, backward; of both blocks


def test_conv_axes_replicate_what_has_no_partner():
    axes = conv_axes(3)
    assert list(axes)[:4] == ["conv0/kernel$", "conv0/bias$", "(norm0|conv0_norm)/", "conv1/kernel$"]
    assert not any("conv2" in match for match in axes)
    with pytest.raises(InputError, match="no parameter of this model is split over model"):
        place(models.CNN(widths=(8, 16), convs=1, classes=4), (16, 8, 8, 3))


@needs_compiler
@pytest.mark.full(
    "tests/program/test_conv_rules.py::test_a_pair_of_convolutions_communicates_once_in_each_direction"
)
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_activations_of_a_resnet_are_never_gathered_on_gpus(block):
    net = BASIC.clone(block=block)
    image = jax.ShapeDtypeStruct((64, 16, 16, 3), jnp.float32)
    batch = {"image": image, "label": jax.ShapeDtypeStruct((64,), jnp.int32)}
    mesh = sharding.make_mesh(h100(8), sharding.parse_mesh(MESH, 8))
    moved = over_model(compile_step(net, batch, MESH), mesh)
    assert moved.keys() == {"all-reduce"}
    inputs = (16, 16) if block == "basic" else (16, 64)  # of the first and the second block
    sums = [activation(16, 16, 16, 2), activation(16, 8, 32, 2)]  # outputs of conv1
    sums += [activation(16, 16, channels, 2) for channels in inputs]
    assert moved["all-reduce"] == pytest.approx(sum(sums), rel=0.05)
