"""What every model and every shipped experiment must keep, as one table.

Rows are the shipped experiments with their own loss, optimizer, stages and modes, on made-up examples of
their own fields; models are made narrower so that the table takes minutes, not hours. Columns are the tests.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from jaxtrain import checkpoint, data, losses, models, optim, sharding
from jaxtrain.core.errors import InputError
from jaxtrain.experiment import Experiment, find, override
from jaxtrain.models import as_model, compute_in
from jaxtrain.program import abstract_state, assemble

N = 64
# Settings that make a full-size experiment small; nothing else about it changes.
SMALLER = {
    "cifar_airbench94": ["model.net.widths=24,32,32"],
    "cifar_cnn": ["model.widths=8,16"],
    "cifar_ddp_net": ["model.widths=8,16"],
    "cifar_lenet": ["batch=32", "eval_batch=32"],
    "cifar_resnet18": ["model.stages=1,1", "model.width=8"],
    "digits_cnn": ["model.widths=8,16"],
    "imagenet_resnet50": ["model.stages=1,1", "model.width=8", "train.size=32", "test.size=32"],
    "imagenet_vit_s16": [
        "model.width=32", "model.depth=1", "model.heads=2", "train.size=32", "valid.size=32", "test.size=32",
    ],
    "pets_unet": ["model.widths=8,16", "train.size=16", "valid.size=16", "test.size=16"],
    "ratings_factors": ["model.users=20", "model.items=30"],
    "sentiment_lstm": ["model.vocab=300", "model.width=16", "train.length=12", "test.length=12"],
    "series_gru": [
        "model.width=32", "model.horizon=2", "train.window=8", "train.horizon=2",
        "valid.window=8", "valid.horizon=2", "test.window=8", "test.horizon=2",
    ],
    "shakespeare_gpt": [
        "model.width=32", "model.depth=1", "model.heads=2", "model.context=16",
        "train.context=16", "valid.context=16", "test.context=16",
    ],
}  # fmt: skip
NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("[!_]*.py"))
MLP_ROW = "mlp"  # the one model that no shipped experiment trains
ROWS = [*NAMES, MLP_ROW]


def base(name: str) -> Experiment:
    if name == MLP_ROW:
        digits = data.Digits("train")
        return Experiment(
            model=models.MLP(widths=(16,), classes=10, dropout=0.2),
            train=digits,
            test=digits,
            loss=losses.CrossEntropy(),
            optimizer=optim.AdamW(lr=3e-3),
            preprocess=(data.Normalise(scale=16),),
            batch=32,
            epochs=1,
        )
    return find(str(ROOT / "experiments" / f"{name}.py")).load()[0]


@functools.cache
def small(name: str) -> Experiment:
    """The experiment at batch 32 and a constant rate, on 64 made-up examples."""
    exp = override(base(name), SMALLER.get(name, []))
    source = made_up(exp)
    return dataclasses.replace(
        exp,
        train=source,
        test=source,
        valid=None,
        holdout=0,
        batch=32,
        eval_batch=32,
        epochs=5,
        precision="float32",
        optimizer=dataclasses.replace(exp.optimizer, lr=1e-3),
    )


def made_up(exp: Experiment) -> data.Arrays:
    """Random examples of the experiment's own fields, shapes and types."""
    rng, example = np.random.default_rng(0), exp.train.example()
    outputs = jax.eval_shape(lambda: forward(exp, example))
    most = {"tokens": getattr(exp.model, "vocab", 0), "label": outputs.shape[-1]}
    most |= {"user": getattr(exp.model, "users", 0), "item": getattr(exp.model, "items", 0)}
    fields = {}
    for field, one in example.items():
        shape = (N, *one.shape[1:])
        if field == "length":
            fields[field] = rng.integers(1, example["tokens"].shape[1] + 1, shape).astype(one.dtype)
        elif np.issubdtype(one.dtype, np.floating):
            fields[field] = rng.normal(size=shape).astype(one.dtype)
        else:
            fields[field] = rng.integers(0, most.get(field, 256), shape).astype(one.dtype)
    return data.Arrays(fields)


def forward(exp: Experiment, batch: Any) -> Any:
    model = as_model(exp.model)
    batch = data.compose(*exp.preprocess)({k: jnp.asarray(v) for k, v in batch.items()}, None)
    params, extra = model.init(jax.random.key(0), batch)
    return model.apply(params, extra, batch, train=False, key=None)[0]


def prepared(exp: Experiment, rows: int = 32) -> dict[str, Any]:
    """The first examples, preprocessed and not augmented."""
    raw = exp.train.gather(np.arange(rows))
    return dict(data.compose(*exp.preprocess)({k: jnp.asarray(v) for k, v in raw.items()}, None))


def same(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def distinct() -> list[str]:
    """One row for each pair of a model's kind and a loss's kind."""
    kinds = {}
    for name in ROWS:
        exp = base(name)
        kinds.setdefault((type(exp.model), type(exp.loss)), name)
    return sorted(kinds.values())


row = pytest.mark.parametrize("name", ROWS)


def test_table_names_existing_experiments() -> None:
    assert set(SMALLER) <= set(NAMES)


@functools.cache
def forward_passes(name: str) -> dict[str, Any]:
    """One initialisation and one look at four examples, each with two keys, from two compiled functions."""
    exp = small(name)
    model, batch = as_model(exp.model), prepared(exp, 4)
    init = jax.jit(model.init)

    @jax.jit
    def look(params: Any, extra: Any, key: Any) -> Any:
        outputs, after = model.apply(params, extra, batch, train=True, key=key)
        tested, same_extra = model.apply(params, extra, batch, train=False, key=None)
        assert same_extra is extra
        return {"train": outputs, "extra": after, "eval": tested}

    one, two = jax.random.key(3), jax.random.key(4)
    params, extra = init(one, batch)
    before = jax.device_get((params, extra))
    found = {
        "one": look(params, extra, one),
        "again": look(params, extra, one),
        "two": look(params, extra, two),
    }
    same((params, extra), before)
    return {"init": (params, extra), "init again": init(one, batch), "init two": init(two, batch), **found}


@pytest.mark.full("[mlp]")
@row
def test_init_and_apply_are_pure(name: str) -> None:
    found = forward_passes(name)
    same(found["init"], found["init again"])
    same(found["one"], found["again"])
    pairs = zip(jax.tree.leaves(found["init"][0]), jax.tree.leaves(found["init two"][0]), strict=True)
    assert any((a != b).any() for a, b in pairs)


@pytest.mark.full("[mlp]")
@row
def test_train_mode_controls_dropout_and_statistics(name: str) -> None:
    found, model = forward_passes(name), small(name).model
    same(found["one"]["eval"], found["two"]["eval"])
    assert found["one"]["eval"].dtype == jnp.float32 and len(found["one"]["eval"]) == 4
    drops = any(getattr(model, field, 0) > 0 for field in ("dropout", "channel_dropout"))
    assert drops == bool((found["one"]["train"] != found["two"]["train"]).any())
    before, after = found["init"][1], found["one"]["extra"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert any(jax.tree.leaves(moved)) == ("batch_stats" in before)


@pytest.mark.full("[mlp]", "[shakespeare_gpt]", "[pets_unet]", "[ratings_factors]")
@row
def test_output_shape_fits_the_loss(name: str) -> None:
    exp = small(name)
    outputs, batch = jax.eval_shape(lambda: forward(exp, exp.train.gather(np.arange(32)))), prepared(exp)
    target = batch.get("label", batch.get("target"))
    assert outputs.dtype == jnp.float32
    assert outputs.shape[: target.ndim] == target.shape
    assert outputs.ndim == target.ndim + ("label" in batch)


def widened(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree)


@functools.cache
def initial(name: str) -> Any:
    return jax.device_get(assemble(small(name), sharding.make_mesh(jax.devices()[:1])).init())


@functools.cache
def stepped(name: str, devices: int) -> dict[str, Any]:
    """Two steps in float64: in float32 Adam takes full steps on the rounding noise of a zero gradient."""
    exp = small(name)
    source = data.Arrays(widened(exp.train.fields))
    exp = dataclasses.replace(exp, train=source, test=source)
    with jax.enable_x64(True):
        state = widened(initial(name))
        mesh = sharding.make_mesh(jax.devices()[:devices])
        made = assemble(exp, mesh)

        def step(state: Any, number: int) -> Any:
            state = jax.device_put(state, sharding.replicated(mesh))
            return jax.device_get(made.train_step(state, made.train.batch(number), made.key))

        state, first = step(state, 0)
        # The step number chooses dropout and augmentation: the same number, the same function of params.
        _, lower = step(state.replace(step=np.zeros_like(state.step)), 0)
        state, second = step(state, 1)
        assert jax.tree.leaves(state.params)[0].dtype == np.float64
        figures = [{k: v.compute() for k, v in metrics.items()} for metrics in (first, lower, second)]
        return {
            "params": state.params,
            "figures": figures,
            "compiled": made.train_step._cache_size(),
        }


@pytest.mark.full("[mlp]")
@row
def test_eight_devices_compute_the_step_of_one(name: str) -> None:
    one, eight = stepped(name, 1), stepped(name, 8)
    # Attention and normalisation reduce in float32 even here.
    chex.assert_trees_all_close(one["params"], eight["params"], rtol=1e-5, atol=1e-6)
    for left, right in zip(one["figures"], eight["figures"], strict=True):
        assert left == pytest.approx(right, rel=1e-5)


@pytest.mark.full("[mlp]")
@row
def test_the_second_step_compiles_nothing(name: str) -> None:
    assert stepped(name, 8)["compiled"] == 1


@pytest.mark.full("[mlp]")
@row
def test_one_optimizer_step_lowers_the_loss_on_a_fixed_batch(name: str) -> None:
    first, lower, _ = stepped(name, 1)["figures"]
    assert lower["loss"] < first["loss"]


@pytest.mark.full("[mlp]", "[sentiment_lstm]")
@row
def test_learning_rate_out_of_range_is_rejected(name: str) -> None:
    exp, batch = small(name), prepared(small(name), 2)
    net = getattr(exp.model, "net", exp.model)
    for field in ("dropout", "channel_dropout", "bn_momentum"):
        for rate in (-0.1, 1.0) if hasattr(net, field) else ():
            model = as_model(net.clone(**{field: rate}))
            with pytest.raises(InputError, match=rf"{field} is {rate}: it must be in \[0, 1\)"):
                jax.eval_shape(model.init, jax.random.key(0), batch)


@pytest.mark.full("[ratings_factors]")
@pytest.mark.parametrize("name", distinct())
def test_overfits_32_examples(name: str) -> None:
    """A model, a loss and an optimizer that are joined up wrongly do not."""
    exp = small(name)
    off = {f: 0.0 for f in ("dropout", "channel_dropout") if hasattr(exp.model, f)}
    exp = dataclasses.replace(
        exp,
        model=exp.model.clone(**off) if off else exp.model,
        optimizer=optim.Adam(lr=1e-2),
        augment=(),
        post_update=(),
    )
    made = assemble(exp, sharding.make_mesh(jax.devices()[:1]))
    state, batch = made.init(), made.train.batch(0)
    state, metrics = made.train_step(state, batch, made.key)
    loss = metrics["loss"].compute()
    goal = floor(exp) + 0.1 * loss
    for _ in range(15):  # look now and then, and stop where it is reached
        if loss < goal:
            break
        for _ in range(20):
            state, metrics = made.train_step(state, batch, made.key)
        loss = metrics["loss"].compute()
    assert loss < goal


def floor(exp: Experiment) -> float:
    """The least cross-entropy that smoothed labels allow."""
    smoothing = getattr(exp.loss, "smoothing", 0)
    if not smoothing:
        return 0.0
    classes = jax.eval_shape(lambda: forward(exp, exp.train.gather(np.arange(1)))).shape[-1]
    rest, top = smoothing / classes, 1 - smoothing + smoothing / classes
    return float(-top * np.log(top) - (classes - 1) * rest * np.log(rest))


@pytest.mark.full("[mlp]")
@row
def test_state_survives_a_checkpoint_bit_for_bit(name: str, tmp_path: Any) -> None:
    rng, exp = np.random.default_rng(0), small(name)
    example = exp.train.gather(np.arange(1))
    one, eight = (abstract_state(exp, sharding.make_mesh(jax.devices()[:n]), example) for n in (1, 8))

    def filled(leaf: Any) -> Any:
        values = rng.integers(0, 9, leaf.shape) if leaf.dtype == np.int32 else rng.normal(size=leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    state = jax.tree.map(filled, eight)
    with checkpoint.open(tmp_path) as saved:
        saved.save(1, state, None)
    with checkpoint.open(tmp_path) as saved:
        again, step = saved.restore_or(lambda: pytest.fail("nothing was saved"), one)
    assert step == 1
    same(state, again)


@pytest.mark.full("[mlp]", "[ratings_factors]")
@row
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_state(name: str) -> None:
    exp = dataclasses.replace(small(name), precision="bfloat16")
    made = assemble(exp, sharding.make_mesh(jax.devices()[:1]))
    after, packed = jax.eval_shape(made.train_step, made.abstract_state, made.train.batch(0), made.key)
    metrics = jax.eval_shape(dict, packed)
    for leaf in jax.tree.leaves((after, made.abstract_state)):
        assert leaf.dtype != jnp.bfloat16
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, made.abstract_state)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((after.params, metrics["loss"])))

    model, batch = compute_in(exp.model, "bfloat16"), prepared(exp, 4)
    params, extra = jax.eval_shape(model.init, jax.random.key(0), batch)
    apply = functools.partial(model.apply, train=True, key=jax.random.key(0))
    products = dots(jax.make_jaxpr(apply)(params, extra, batch).jaxpr)
    assert set(products) <= {"bfloat16"} and (products or name == "ratings_factors")


def dots(jaxpr: Any) -> list[str]:
    """The type of the operands of every matrix product and convolution, inner programs included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(str(eqn.invars[0].aval.dtype))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                found += dots(getattr(inner, "jaxpr", inner))
    return found
