"""What XLA makes of the shardings: the communication of programs written by hand, and no more memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain import data, losses, models, monitor, optim, sharding
from jaxtrain.experiment import Experiment
from jaxtrain.plan.collectives import collectives
from jaxtrain.program import assemble

LR = 0.1


def mesh(text):
    return sharding.make_mesh(jax.devices(), sharding.parse_mesh(text, 8))


def source(features: int, n: int = 32) -> data.Arrays:
    rng = np.random.default_rng(features)
    return data.Arrays(
        {
            "image": rng.normal(size=(n, features)).astype(np.float32),
            "label": rng.integers(0, 4, n).astype(np.int32),
        }
    )


def experiment(model, train: data.Arrays, **changes) -> Experiment:
    settings = {"loss": losses.CrossEntropy(), "optimizer": optim.SGD(lr=LR), "batch": 16, "epochs": 2}
    return Experiment(model=model, train=train, test=train, **(settings | changes))


@pytest.mark.full("tests/program/test_contracts.py::test_eight_devices_compute_the_step_of_one")
def test_data_parallel_update_uses_the_averaged_gradient(mesh8):
    """Goyal et al. (arXiv:1706.02677), equation 2: each worker's mean gradient, and then their mean.

    By hand, in NumPy: for softmax regression the gradient of an example's loss is x (p - y).
    """
    train = source(6)
    program = assemble(experiment(models.MLP(widths=(), classes=4), train), mesh8)
    state = program.init()
    before = jax.device_get(state.params)["head"]
    batch = program.train.batch(0)
    ids = np.asarray(batch["rows"])[:, 0]
    state, _ = program.train_step(state, batch, program.key)
    after = jax.device_get(state.params)["head"]

    grads = {"kernel": [], "bias": []}
    for mine in np.split(ids, 8):
        x, y = train.fields["image"][mine].astype(np.float64), np.eye(4)[train.fields["label"][mine]]
        scores = x @ before["kernel"] + before["bias"]
        p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        grads["kernel"].append(x.T @ (p - y) / len(mine))
        grads["bias"].append((p - y).mean(0))
    for name, parts in grads.items():
        np.testing.assert_allclose(
            after[name], before[name] - LR * np.mean(parts, axis=0), rtol=1e-5, atol=1e-7
        )


SPECS = {
    "data=8": ((), (), (), ()),
    "fsdp=8": ((None, "fsdp"), (), ("fsdp",), ()),
    "model=8": ((None, "model"), ("model",), ("model",), ()),
    "data=2,fsdp=2,model=2": (("fsdp", "model"), ("model",), ("model", "fsdp"), ()),
}
"""Of the first layer's kernel and bias, and the second's."""


def by_hand(on: jax.sharding.Mesh, specs, params, batch):
    """The collectives of a two-layer perceptron in a few lines of JAX, as one would write it without us."""
    names = (("dense0", "kernel"), ("dense0", "bias"), ("head", "kernel"), ("head", "bias"))
    shapes = [params[layer][kind] for layer, kind in names]
    shardings = [NamedSharding(on, PartitionSpec(*spec)) for spec in specs]
    used = [NamedSharding(on, PartitionSpec(*(None if a == "fsdp" else a for a in spec))) for spec in specs]
    rows, replicated = NamedSharding(on, PartitionSpec(("data", "fsdp"))), NamedSharding(on, PartitionSpec())

    def loss(params, x, y):
        w1, b1, w2, b2 = [jax.lax.with_sharding_constraint(p, s) for p, s in zip(params, used, strict=True)]
        logits = jax.nn.relu(x @ w1 + b1[None]) @ w2 + b2[None]
        logp = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(logp, y[:, None], 1)[:, 0]
        return nll.mean(), (logits.argmax(1) == y).mean()

    def step(params, x, y):
        (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(params, x, y)
        norm = jnp.sqrt(sum((g**2).sum() for g in grads))
        return [p - LR * g for p, g in zip(params, grads, strict=True)], (value, accuracy, norm)

    compiled = jax.jit(step, in_shardings=(shardings, rows, rows), out_shardings=(shardings, replicated))
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes]
    return compiled.lower(abstract, batch["image"], batch["label"]).compile()


def kinds(compiled, on):
    """Collectives by kind and axes, without the scalars of metrics, as {(kind, axes): bytes}."""
    return {(c.kind, c.axes): c.bytes for c in collectives(compiled.as_text(), on) if c.bytes > 64}


@pytest.mark.full("tests/program/test_contracts.py::test_eight_devices_compute_the_step_of_one")
@pytest.mark.parametrize("text", SPECS)
def test_collectives_match_a_hand_written_program(text):
    on = mesh(text)
    exp = experiment(models.MLP(widths=(1024,), classes=4), source(64), placement="stream")
    program = assemble(exp, on)
    like = program.abstract_state
    batch = program.train.batch(0)
    ours = program.train_step.lower(like, batch, program.key).compile()
    theirs = by_hand(on, SPECS[text], like.params, batch)
    assert kinds(ours, on).keys() == kinds(theirs, on).keys()
    for key, size in kinds(theirs, on).items():
        assert kinds(ours, on)[key] == pytest.approx(size, abs=64), key
    program.close()


def gpt(vocab: int, **sizes) -> Experiment:
    rng = np.random.default_rng(0)
    text = rng.integers(0, vocab, (32, 33)).astype(np.int32)
    train = data.Arrays({"tokens": text[:, :-1], "label": text[:, 1:]})
    settings = {"context": 32, "width": 64, "depth": 2, "heads": 8, "dropout": 0.0}
    return experiment(models.GPT(vocab=vocab, **(settings | sizes)), train, optimizer=optim.AdamW())


@pytest.mark.full("tests/program/test_contracts.py::test_eight_devices_compute_the_step_of_one")
@pytest.mark.parametrize("text", ["model=8", "data=4,model=2"])
def test_tensor_parallelism_never_gathers_the_vocabulary(text):
    """Megatron (arXiv:1909.08053, section 3): one all-reduce of activations for each half of a block, forward
    and backward, and one each for the embedding and the head; logits [.., vocab] stay where they are."""
    on, vocab = mesh(text), 1024
    program = assemble(gpt(vocab), on)
    compiled = program.train_step.lower(program.abstract_state, program.train.batch(0), program.key).compile()
    found = [c for c in collectives(compiled.as_text(), on) if c.axes == ("model",)]
    activations = 16 // sharding.batch_parts(on) * 32 * 64 * 4
    reduced = sum(c.bytes for c in found if c.kind == "all-reduce")
    blocks, ends = 2 * 4, 2
    assert (blocks + ends) * activations <= reduced < (blocks + ends + 1) * activations
    # What else moves is a few numbers for each token, for the softmax and the accuracy.
    others = sum(c.bytes for c in found if c.kind != "all-reduce")
    assert others <= 2 * 4 * on.shape["model"] * activations // 64 // 4


@functools.cache
def ten_million(text: str):
    """Of a GPT of 10.7 M parameters on a mesh: the program, and its ``init`` before compilation."""
    on, compiled = mesh(text), {}
    original = sharding.compile

    def spy(fn, **shardings):
        compiled[getattr(fn, "__name__", "")] = made = original(fn, **shardings)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "compile", spy)
        program = assemble(gpt(256, width=384, depth=6, heads=6), on)
    first = {name: array[:1] for name, array in gpt(256).train.fields.items()}
    return program, compiled["init"].lower(program.key, first)


def bytes_on_a_device(tree) -> int:
    shards = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree)]
    return sum(int(np.prod(shape)) * size for shape, size in shards)


@pytest.mark.full("tests/program/test_golden_shardings.py::test_sharding_of_every_array_is_golden")
def test_fsdp_stores_an_eighth_of_parameters_and_optimizer_per_device():
    program, _ = ten_million("fsdp=8")
    total = sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves((program.abstract_state.params, program.abstract_state.opt_state))
    )
    assert sum(x.size for x in jax.tree.leaves(program.abstract_state.params)) > 10_000_000
    assert (
        bytes_on_a_device((program.abstract_state.params, program.abstract_state.opt_state))
        <= 1.05 * total / 8
    )
    replicated, _ = ten_million("data=8")
    assert bytes_on_a_device((replicated.abstract_state.params, replicated.abstract_state.opt_state)) == total


@pytest.mark.full("tests/program/test_contracts.py::test_eight_devices_compute_the_step_of_one")
def test_state_is_never_gathered_on_one_device():
    """Initialisation writes each device's part and computes no more than a large array at a time."""
    program, init = ten_million("fsdp=8")
    memory = init.compile().memory_analysis()
    assert memory.output_size_in_bytes == pytest.approx(bytes_on_a_device(program.abstract_state), rel=0.01)
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state))
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state))
    assert memory.temp_size_in_bytes < 3 * largest < total / 10


@pytest.mark.full("tests/program/test_contracts.py::test_eight_devices_compute_the_step_of_one")
def test_sharded_init_equals_one_device():
    exp = gpt(256, depth=1)
    one = assemble(exp, sharding.make_mesh(jax.devices()[:1])).init()
    split = assemble(exp, mesh("data=2,fsdp=2,model=2")).init()
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.full("tests/program/test_contracts.py::test_eight_devices_compute_the_step_of_one")
@pytest.mark.parametrize("text", ["data=8", "fsdp=8", "data=4,model=2", "data=2,fsdp=2,model=2"])
def test_one_float32_sgd_step_equals_one_device(text):
    exp = experiment(models.MLP(widths=(1024,), classes=4), source(64))
    results = []
    for on in (sharding.make_mesh(jax.devices()[:1]), mesh(text)):
        program = assemble(exp, on)
        state, metrics = program.train_step(program.init(), program.train.batch(0), program.key)
        results.append((jax.device_get(state.params), monitor.merge_all(metrics.rows())))
    (one, one_metrics), (split, split_metrics) = results
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(one), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    assert split_metrics == pytest.approx(one_metrics, rel=1e-5)
