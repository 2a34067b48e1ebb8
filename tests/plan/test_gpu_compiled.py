"""Programs that are compiled here for an H100, without one: the readers against XLA's own list of thunks."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_programs import needs_compiler
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.plan.collectives import collectives
from jaxtrain.plan.cuda_graphs import CudaGraphs, compile_with_graphs
from jaxtrain.plan.gpu_program import read_gpu_program
from jaxtrain.sharding import described
from jaxtrain.sharding.cards import load_card


def h100s(count: int) -> Mesh:
    """Return a mesh of devices that are not here."""
    return Mesh(np.array(described.described_devices(load_card("h100"), 1, count)), ("data",))


def compile_step(mesh: Mesh, train: Any, *shapes: tuple[tuple[int, ...], tuple[str, ...]]) -> Any:
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, spec in shapes
    ]
    compiled, graphs = compile_with_graphs(jax.jit(train, donate_argnums=0).lower(*arrays))
    return compiled.as_text(), graphs


def mlp(params: Any, inputs: Any, x: Any, y: Any) -> Any:
    def loss(pair: Any) -> Any:
        return jnp.mean((jnp.tanh(x @ pair[0]) @ pair[1] - y) ** 2)

    return jax.tree.map(lambda p, g: p - 0.1 * g, (params, inputs), jax.grad(loss)((params, inputs)))


MLP = (((256, 512), ()), ((512, 256), ()), ((128, 256), ("data",)), ((128, 256), ("data",)))


@needs_compiler
@pytest.mark.full("tests/plan/test_gpu_program.py::test_kernels_by_kind_with_the_bytes_that_they_move")
@pytest.mark.parametrize("devices", [1, 2])
def test_network_for_h100(devices: int) -> None:
    mesh = h100s(devices)
    text, graphs = compile_step(mesh, mlp, *MLP)
    found = read_gpu_program(text, mesh, graphs)
    assert graphs is not None and found.launches == graphs.inside + graphs.outside  # two sources agree
    assert found.of_kind("matrix product")[0] == 5  # two forward, three backward
    assert found.host == () and found.outputs == 2 and found.aliased == 1  # the first argument is donated
    weights = 4 * 2 * 256 * 512
    batch = 4 * 2 * 128 * 256 // devices
    assert found.traffic >= 2 * weights + batch  # every parameter and input is read, and written
    if devices == 1:
        assert found.overlaps == () and graphs == CudaGraphs(1, found.launches, 0)
    else:
        [moved] = found.overlaps
        assert (moved.kind, moved.axes, moved.bytes) == ("all-reduce", ("data",), weights)
        [same] = collectives(text, mesh)
        assert (same.bytes, same.count) == (moved.bytes, moved.count)
        assert graphs.outside >= 1  # the collective


@needs_compiler
@pytest.mark.full("tests/plan/test_gpu_program.py::test_a_loop_launches_its_body_once_per_iteration")
def test_loops_for_h100() -> None:
    mesh = h100s(1)

    def nested(x: Any) -> Any:
        def inner(c: Any, _: Any) -> Any:
            return jnp.tanh(c @ c), None

        def outer(c: Any, _: Any) -> Any:
            return jax.lax.scan(inner, c + 1, None, length=5)[0], c.sum()

        return jax.lax.scan(outer, x, None, length=12)

    text, graphs = compile_step(mesh, nested, ((64, 64), ()))
    assert read_gpu_program(text, mesh).launches == graphs.inside + graphs.outside > 60


@needs_compiler
@pytest.mark.full("tests/plan/test_gpu_program.py::test_library_calls_by_name")
def test_convolution_for_h100() -> None:
    mesh = h100s(1)

    def conv(kernel: Any, images: Any) -> Any:
        def loss(k: Any) -> Any:
            out = jax.lax.conv_general_dilated(
                images, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jnp.sum(jnp.tanh(out))

        return kernel - 0.1 * jax.grad(loss)(kernel)

    text, graphs = compile_step(mesh, conv, ((3, 3, 32, 64), ()), ((32, 16, 16, 32), ()))
    found = read_gpu_program(text, mesh, graphs)
    names = {one.name: one.count for one in found.kernels if one.kind == "convolution"}
    assert names == {"__cudnn$convForward": 1, "__cudnn$convBackwardFilter": 1}
    assert graphs == CudaGraphs(0, 0, found.launches)  # XLA captures no convolution, nor few kernels
    assert sum(len(re.findall(name.replace("$", r"\$"), text)) for name in names) == 2
