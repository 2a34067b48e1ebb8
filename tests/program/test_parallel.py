"""One program on any mesh: the same parameters, in float64, after 20 steps."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import parallel_cases as cases
import pytest

from jaxtrain import models, sharding
from jaxtrain.core.types import State
from jaxtrain.program import assemble
from jaxtrain.sharding import rules

pytestmark = pytest.mark.usefixtures("put_back")


@functools.cache
def initial(name):
    """The state of step 0, on the host. (test_sharded_programs.py: it is the same on every mesh.)"""
    with jax.enable_x64(True):
        return jax.device_get(cases.make(name, None).init())


@functools.cache
def one_device(name):
    with jax.enable_x64(True):
        return cases.train(cases.make(name, None), initial(name))


TABLE = [(name, mesh) for name in cases.FIRST for mesh in cases.MESHES]


@pytest.mark.full("[mlp-data=2,fsdp=2,model=2]")
@pytest.mark.parametrize(("name", "mesh"), TABLE)
def test_twenty_float64_steps_equal_one_device(name, mesh):
    want, want_ids = one_device(name)
    with jax.enable_x64(True):
        program = cases.make(name, mesh)
        split = [
            leaf for leaf in jax.tree.leaves(program.abstract_state) if not leaf.sharding.is_fully_replicated
        ]
        got, ids = cases.train(program, initial(name))
    np.testing.assert_array_equal(ids, want_ids)
    assert bool(split) == (mesh != "data=8")
    assert all(array.dtype == np.float64 for path, array in got.items() if path.startswith("params/"))
    assert cases.distance(got, want) < 1e-9


@pytest.mark.full("tests/program/test_parallel.py::test_twenty_float64_steps_equal_one_device")
def test_cases_train_and_differ():
    """The distance is not small because nothing happens: another seed is far away."""
    for name in cases.experiments():
        got, _ = one_device(name)
        first = {f"params/{k}": v for k, v in cases.leaf_paths(initial(name).params).items()}
        assert cases.distance({k: got[k] for k in first}, first) > 1e-3


@pytest.mark.full("tests/step/test_accumulate.py")
def test_accumulation_is_exact_on_a_mesh():
    """Four microbatches on eight devices equal the full batch on one; dropout would differ."""
    with jax.enable_x64(True):
        exp = cases.experiments()["mlp"]
        exp = dataclasses.replace(exp, model=cases.in_float64(models.MLP(widths=(64, 32), classes=4)))
        split = dataclasses.replace(exp, accumulate=4)
        on = sharding.make_mesh(jax.devices(), {"data": 2, "fsdp": 2, "model": 2})
        want, _ = cases.train(assemble(exp, sharding.make_mesh(jax.devices()[:1])))
        got, _ = cases.train(assemble(split, on))
    assert cases.distance(got, want) < 1e-9


IMAGE = (16, 8, 8, 3)
OTHERS = {
    "convnet": (models.ConvNet(widths=(8, 16), hidden=(32,), classes=4), {"image": IMAGE}),
    "vit": (models.ViT(patch=4, width=32, depth=1, heads=4, classes=4), {"image": IMAGE}),
    "unet": (models.UNet(widths=(4, 8), classes=3), {"image": IMAGE}),
    "airbench": (models.Airbench(widths=(8,), convs=2, whiten=8, classes=4), {"image": IMAGE}),
    "bottleneck": (
        models.ResNet(stages=(1,), stem="cifar", width=8, classes=4),
        {"image": IMAGE},
    ),
    "factors": (models.Factors(users=16, items=24, width=8, hidden=(16, 8)), {"user": (16,), "item": (16,)}),
}


@pytest.mark.full("tests/program/test_parallel.py::test_twenty_float64_steps_equal_one_device")
@pytest.mark.parametrize("name", OTHERS)
def test_gradients_of_every_family_equal_one_device(name):
    """XLA alone computes wrong ones where the kernel of a convolution is sharded over two axes."""
    module, shapes = OTHERS[name]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        model = cases.in_float64(module)
        batch = {
            name: rng.normal(size=shape) if name == "image" else rng.integers(0, 16, shape)
            for name, shape in shapes.items()
        }
        params, extra = model.init(jax.random.key(0), batch)
        # Heads and residual branches start at zero, which would hide what is behind them.
        params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), params)
        on = sharding.make_mesh(jax.devices(), {"data": 2, "fsdp": 2, "model": 2})
        rules.SMALLEST, jax.nn.dot_product_attention = 32, cases.attention
        state = State(np.zeros((), np.int32), params, extra, ())
        placed = sharding.place(state, on, model.axes(batch)).shardings
        rows = sharding.batch_split(on)

        def gradients(model, params, extra, batch):
            def loss(params):
                outputs, changed = model.apply(params, extra, batch, train=True, key=jax.random.key(1))
                return (outputs**2 + outputs).mean(), changed

            return jax.grad(loss, has_aux=True)(params)

        want = jax.jit(functools.partial(gradients, model))(params, extra, batch)
        split = functools.partial(gradients, sharding.gather_params(model, placed.params))
        step = jax.jit(split, in_shardings=(placed.params, placed.extra, rows))
        got = step(params, extra, batch)
    assert any("model" in str(s.spec) and "fsdp" in str(s.spec) for s in jax.tree.leaves(placed.params))
    theirs, ours = jax.device_get((want, got))
    for path, array in cases.leaf_paths(theirs).items():
        gap = np.linalg.norm(cases.leaf_paths(ours)[path] - array)
        assert gap <= 1e-9 * max(np.linalg.norm(array), 1e-3), path
