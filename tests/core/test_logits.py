"""jaxtrain.core.chunked_logits: a head and loss in chunks are the plain ones, without the logits."""

from __future__ import annotations

import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain import data, optim, sharding
from jaxtrain.core.chunked_logits import ChunkedLogits
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import leaf_paths
from jaxtrain.experiment import Experiment
from jaxtrain.losses import CrossEntropy
from jaxtrain.metrics import Mean
from jaxtrain.models import GPT, as_model, compute_in, generate
from jaxtrain.plan import collectives
from jaxtrain.program import assemble
from jaxtrain.step import make_eval_step, make_init
from jaxtrain.step.gradients import evaluate_loss, gradient_of
from jaxtrain.step.guard import count_bad_labels

BATCH, LENGTH, WIDTH, VOCAB = 3, 7, 5, 11
KEY = jax.random.key(0)
NET = GPT(vocab=11, context=8, width=8, depth=1, heads=2, mlp=2, dropout=0.0)
CHUNKED = NET.clone(head_chunk=3)


def example(mixed: bool = False, mask: str = "") -> tuple[Any, Any, dict[str, Any]]:
    rng = np.random.default_rng(0)
    features, table = rng.normal(size=(BATCH, LENGTH, WIDTH)), rng.normal(size=(VOCAB, WIDTH))
    batch: dict[str, Any] = {"label": rng.integers(0, VOCAB, (BATCH, LENGTH))}
    if mixed:
        batch |= {"label_mixed": rng.integers(0, VOCAB, (BATCH, LENGTH)), "mix": rng.random(BATCH)}
    if mask:
        batch["mask"] = (
            rng.random((BATCH, LENGTH)) < 0.6 if mask == "cells" else np.array([True, False, True])
        )
    return features, table, batch


def valued(loss: Any, chunk: int | None, features: Any, table: Any, batch: Any) -> Any:
    """Loss, metrics, and the gradients of features and table."""

    def objective(features: Any, table: Any) -> Any:
        if chunk is None:
            return loss(features @ table.T, batch)
        return loss(ChunkedLogits.of(features, table, chunk), batch)

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(features, table)


@pytest.mark.full("[1-plain]")
@pytest.mark.parametrize(
    ("loss", "case"),
    [
        (CrossEntropy(), {}),
        (CrossEntropy(smoothing=0.1, top=3), {"mask": "cells"}),
        (CrossEntropy(top=2), {"mask": "rows", "mixed": True}),
    ],
    ids=["plain", "smoothed, top 3, cells masked", "mixed, rows masked"],
)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_nothing_in_float64(loss: Any, case: Any, chunk: int) -> None:
    with jax.enable_x64(True):
        parts = example(**case)
        expected, found = (valued(loss, one, *parts) for one in (None, chunk))
        for path, value in leaf_paths(expected).items():
            assert value.dtype == jnp.float64
            np.testing.assert_allclose(leaf_paths(found)[path], value, rtol=1e-10, atol=1e-12, err_msg=path)
        assert abs(expected[1][1]).max() > 0.01


@pytest.mark.full("tests/core/test_logits.py::test_chunks_change_nothing_in_float64")
def test_the_first_of_equal_logits_is_the_prediction() -> None:
    label = np.arange(VOCAB)[None]
    logits = ChunkedLogits.of(jnp.zeros((1, VOCAB, 2)), jnp.ones((VOCAB, 2)), 4)
    for outputs in (logits, logits.full()):
        metrics = CrossEntropy(top=3)(outputs, {"label": label})[1]
        assert (float(metrics["accuracy"].total), float(metrics["top3"].total)) == (1, 3)


@pytest.mark.full("tests/core/test_logits.py::test_chunks_change_nothing_in_float64")
def test_class_counts_and_labels_of_another_shape_get_full_logits() -> None:
    features, table, batch = example()
    logits = ChunkedLogits.of(jnp.float32(features), jnp.float32(table), 2)
    counted = CrossEntropy(iou=True)(logits, batch)[1]
    assert counted["mean_iou"].actual.shape == (VOCAB,) and counted["mean_iou"].actual.sum() == 21


def test_other_losses_and_metrics_get_full_logits() -> None:
    features, table, batch = example()
    logits = ChunkedLogits.of(jnp.float32(features), jnp.float32(table), 2)

    def own(outputs: Any, batch: Any) -> Any:
        return jnp.square(outputs).mean(), {"loss": Mean.of(outputs.max(-1))}

    found, _ = evaluate_loss(own, logits, batch)
    assert float(found) == pytest.approx(np.square(features @ table.T).mean(), rel=1e-5)
    seen: list[Any] = []

    def metrics(outputs: Any, batch: Any) -> Any:
        seen.append(outputs.shape)
        return {"largest": Mean.of(outputs.max(-1))}

    tokens = {"tokens": np.zeros((2, 8), np.uint8), "label": np.zeros((2, 8), np.int32)}
    state = jax.eval_shape(make_init(CHUNKED, optim.SGD(lr=0.1).build(1)), KEY, tokens)
    out = jax.eval_shape(
        make_eval_step(CHUNKED, count_bad_labels(CrossEntropy()), metrics_fn=metrics), state, tokens
    )
    assert seen == [(2, 8, 11)] and set(out) >= {"loss", "accuracy", "largest"}


def test_labels_out_of_range_are_detected() -> None:
    features, table, batch = example()
    logits = ChunkedLogits.of(features, table, 2)
    batch["label"][1, 2] = VOCAB
    assert int(CrossEntropy().outside(logits, {"label": jnp.asarray(batch["label"])})) == 1
    with pytest.raises(InputError, match=r"label 11 of example 8 .* 11 classes"):
        CrossEntropy().check(logits, batch, np.array([7, 8, 9]))  # type: ignore[arg-type]


@pytest.mark.full("tests/core/test_logits.py::test_chunks_change_nothing_in_float64")
def test_gpt_with_chunks_trains_and_samples_like_gpt_without() -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 11, (4, 9))
    batch = {"tokens": text[:, :-1].astype(np.uint8), "label": text[:, 1:].astype(np.int32)}
    params, _ = jax.eval_shape(as_model(NET).init, KEY, batch)
    params = jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), params)

    def both(params: Any) -> Any:
        one, other = (gradient_of(as_model(net), CrossEntropy()) for net in (NET, CHUNKED))
        return one(params, {}, batch, KEY, None), other(params, {}, batch, KEY, None)

    plain, chunked = jax.jit(both)(params)
    chex.assert_trees_all_close(chunked, plain, rtol=1e-4, atol=1e-6)
    sampled = jax.eval_shape(lambda p: generate(CHUNKED, p, {}, [[1, 2]], 9, KEY, context=8), params)
    assert sampled.shape == (1, 11)


@pytest.mark.full("tests/core/test_logits.py::test_chunks_change_nothing_in_float64")
def test_experiment_with_chunks_can_be_assembled(mesh1: Any) -> None:
    text = np.random.default_rng(0).integers(0, 11, (16, 9))
    source = data.Arrays({"tokens": text[:, :-1].astype(np.uint8), "label": text[:, 1:].astype(np.int32)})
    exp = Experiment(
        model=CHUNKED,
        train=source,
        test=source,
        loss=CrossEntropy(),
        optimizer=optim.SGD(lr=0.1),
        batch=8,
        epochs=1,
    )
    assert assemble(exp, mesh1).abstract_outputs.shape == (8, 8, 11)
    source.fields["label"][3, 0] = 11
    with pytest.raises(InputError, match="label 11 of example 3"):
        assemble(exp, mesh1)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunk_below_one_is_refused(chunk: int) -> None:
    with pytest.raises(InputError, match=f"GPT.head_chunk is {chunk}: it must be at least 1, or None"):
        jax.eval_shape(
            as_model(NET.clone(head_chunk=chunk)).init, KEY, {"tokens": np.zeros((1, 8), np.uint8)}
        )


# --- half precision


def test_products_read_bfloat16_and_sum_in_float32() -> None:
    batch = {"tokens": np.zeros((2, 8), np.uint8), "label": np.zeros((2, 8), np.int32)}
    model = compute_in(CHUNKED, "bfloat16")
    params, _ = jax.eval_shape(as_model(CHUNKED).init, KEY, batch)

    def loss(params: Any) -> Any:
        return CrossEntropy()(model.apply(params, {}, batch, train=True, key=None)[0], batch)[0]

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    head = [line for line in text.splitlines() if "dot_general" in line and "11x8" in line]
    head += [line for line in text.splitlines() if "dot_general" in line and "x11xbf16" in line]
    assert len(head) >= 4  # forward, again, to the features, to the table
    for line in head:
        inputs, result = line.rsplit("->", 1)
        assert inputs.count("xbf16>") == 2 and "xf32>" in result


def test_gradient_of_the_table_does_not_lose_small_chunks() -> None:
    """512 equal parts added up in bfloat16 would stop growing at 256 of them."""
    length = 512
    ones, batch = jnp.ones((1, length, 1)), {"label": jnp.zeros((1, length), jnp.int32)}

    def objective(table: Any) -> Any:
        features, table = ones.astype(jnp.bfloat16), table.astype(jnp.bfloat16)
        logits = ChunkedLogits.of(features, table, 1)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), logits)  # as ``compute_in`` does
        return CrossEntropy()(wide, batch)[0]

    found = jax.jit(jax.grad(objective))(jnp.zeros((2, 1)))
    np.testing.assert_allclose(found, [[-0.5], [0.5]], rtol=0.005)


# --- what it is for

LARGE = (16, 32, 4096)
WHOLE = math.prod(LARGE) * 4


def large(chunk: int | None, mesh: Any = None) -> Any:
    """Loss and gradients of a large vocabulary, compiled; a mesh splits batch and vocabulary."""
    rng = np.random.default_rng(0)
    features, table = rng.normal(size=(*LARGE[:2], 8)), rng.normal(size=(LARGE[2], 8))
    parts = np.float32(features), np.float32(table), rng.integers(0, LARGE[2], LARGE[:2])

    def objective(features: Any, table: Any, label: Any) -> Any:
        logits = ChunkedLogits.of(features, table, chunk or LARGE[1])
        loss, metrics = CrossEntropy(smoothing=0.1, top=3)(
            logits.full() if chunk is None else logits, {"label": label}
        )
        return loss, metrics

    specs = (P("data"), P("model"), P("data"))
    placed = {} if mesh is None else {"in_shardings": tuple(NamedSharding(mesh, spec) for spec in specs)}
    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True), **placed)
    return run.lower(*parts).compile(), parts


@pytest.mark.full("tests/core/test_logits.py::test_chunks_change_nothing_in_float64")
def test_full_logits_are_never_in_memory() -> None:
    plain, chunked = (large(chunk)[0] for chunk in (None, 2))
    shape = re.compile(r"\[(16,32,4096|512,4096|4096,512|4096,16,32)\]")
    assert shape.search(plain.as_text()) and not shape.search(chunked.as_text())
    temporaries = [one.memory_analysis().temp_size_in_bytes for one in (plain, chunked)]
    assert temporaries[0] > WHOLE > 2 * temporaries[1]


@pytest.mark.full("tests/core/test_logits.py::test_chunks_change_nothing_in_float64")
def test_a_mesh_computes_the_same_and_sends_no_logits() -> None:
    mesh = sharding.make_mesh(jax.devices(), sharding.parse_mesh("data=2,model=4", 8))
    (one, parts), (split, _) = large(4), large(4, mesh)
    sent = collectives(split.as_text(), mesh)
    assert sum(each.bytes for each in sent if each.kind != "all-reduce") < WHOLE / 1000
    assert {each.axes for each in sent} == {("data",), ("model",)}
    placed = jax.device_put(parts, split.input_shardings[0])
    chex.assert_trees_all_close(
        jax.device_get(split(*placed)), jax.device_get(one(*parts)), rtol=1e-4, atol=1e-7
    )
