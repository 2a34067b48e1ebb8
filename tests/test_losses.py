"""jaxtrain.losses: values, gradients and the checks that come before them."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import losses
from jaxtrain.errors import InputError
from jaxtrain.losses import MSE, CrossEntropy

RNG = np.random.default_rng(0)
CLASSES = 5


def classification(shape: tuple[int, ...] = (6,), scale: float = 3.0) -> tuple[jax.Array, jax.Array]:
    logits = scale * RNG.normal(size=(*shape, CLASSES)).astype(np.float32)
    return jnp.array(logits), jnp.array(RNG.integers(0, CLASSES, shape), jnp.int32)


def optax_loss(logits: jax.Array, label: jax.Array, smoothing: float) -> jax.Array:
    target = optax.smooth_labels(jax.nn.one_hot(label, CLASSES), smoothing)
    return optax.softmax_cross_entropy(logits, target).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("shape", [(6,), (3, 4)])
def test_cross_entropy_equals_optax_in_value_and_gradient(shape: tuple[int, ...], smoothing: float) -> None:
    logits, label = classification(shape)
    loss = CrossEntropy(smoothing)
    ours = jax.value_and_grad(lambda x: loss(x, {"label": label})[0])(logits)
    theirs = jax.value_and_grad(optax_loss)(logits, label, smoothing)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_masked_rows_change_neither_loss_nor_gradient(smoothing: float) -> None:
    logits, label = classification((6,))
    keep = jnp.array([True, False, True, True, False, False])
    batch = {"label": jnp.where(keep, label, 99), "mask": keep}  # padding may hold any label
    loss = CrossEntropy(smoothing, top=2)
    value, gradient = jax.value_and_grad(lambda x: loss(x, batch)[0])(logits)
    rows = np.flatnonzero(keep)
    kept = jax.value_and_grad(optax_loss)(logits[rows], label[rows], smoothing)
    chex.assert_trees_all_close((value, gradient[rows]), kept, rtol=1e-5)
    assert not np.any(gradient[~np.array(keep)])
    _, metrics = loss(logits, batch)
    _, wanted = loss(logits[rows], {"label": label[rows]})
    for name in ("loss", "accuracy", "top2"):
        assert metrics[name].compute() == pytest.approx(wanted[name].compute(), rel=1e-6)
        assert metrics[name].count == 3


def test_sequence_labels_are_masked_by_position_or_by_row() -> None:
    logits, label = classification((3, 4))
    cells = jnp.array(RNG.integers(0, 2, (3, 4)), bool)
    rows = jnp.array([True, False, True])
    for keep in (cells, rows):
        index = np.nonzero(np.broadcast_to(np.array(keep).reshape(3, -1), (3, 4)))
        value, metrics = CrossEntropy()(logits, {"label": label, "mask": keep})
        assert float(value) == pytest.approx(float(optax_loss(logits[index], label[index], 0.0)), rel=1e-5)
        assert metrics["accuracy"].compute() == np.mean(np.array(logits.argmax(-1) == label)[index])


@pytest.mark.parametrize("loss", [CrossEntropy(0.1, top=2), MSE()])
def test_batch_whose_every_row_is_masked_has_loss_and_gradient_zero(loss: Any) -> None:
    logits, label = classification((4,))
    batch = {"label": label, "target": jnp.ones_like(logits), "mask": jnp.zeros(4, bool)}
    value, gradient = jax.value_and_grad(lambda x: loss(x, batch)[0])(logits)
    assert float(value) == 0
    assert not np.any(gradient)
    assert all(m.count == 0 and math.isnan(m.compute()) for m in loss(logits, batch)[1].values())


@pytest.mark.parametrize("top", [2, 3, CLASSES])
def test_top_k_counts_labels_among_the_best_k(top: int) -> None:
    logits, label = classification((40,))
    best = np.argsort(-np.array(logits), axis=-1)[:, :top]
    metrics = CrossEntropy(top=top)(logits, {"label": label})[1]
    assert set(metrics) == {"loss", "accuracy", f"top{top}"}
    expected = np.mean((best == np.array(label)[:, None]).any(-1))
    assert metrics[f"top{top}"].compute() == pytest.approx(expected, rel=1e-6)


def test_half_precision_logits_are_averaged_in_float32() -> None:
    logits, label = classification((64,), scale=8.0)
    value, metrics = CrossEntropy()(logits.astype(jnp.bfloat16), {"label": label})
    assert value.dtype == metrics["loss"].total.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert float(value) == pytest.approx(float(optax_loss(rounded, label, 0.0)), rel=1e-5)


def test_large_logits_do_not_overflow() -> None:
    logits = jnp.array([[1e30, 0.0, 0.0], [0.0, 300.0, -300.0]])
    value, _ = CrossEntropy()(logits, {"label": jnp.array([0, 1])})
    assert float(value) == 0


IDS = np.array([70, 71, 72])
BAD_LABELS = {
    "negative": ({"label": np.array([0, -1, 4])}, CrossEntropy(), "label -1 of example 71"),
    "the number of classes": ({"label": np.array([0, 1, 5])}, CrossEntropy(), "label 5 of example 72"),
    "in a sequence": ({"label": np.array([[0, 1], [2, 3], [7, 9]])}, CrossEntropy(), "label 7 of example 72"),
    "unsigned": ({"label": np.array([0, 255, 4], np.uint8)}, CrossEntropy(), "label 255 of example 71"),
    "float": ({"label": np.array([0.0, 1.0, 2.0])}, CrossEntropy(), "'label' is float64"),
    "boolean": ({"label": np.array([True, False, True])}, CrossEntropy(), "'label' is bool"),
    "absent": ({"image": np.zeros(3), "y": np.zeros(3, int)}, CrossEntropy(), "'label'.*'image', 'y'"),
    "other field": ({"y": np.array([0, 6, 0])}, CrossEntropy(label="y"), "label 6 of example 71"),
    "top above classes": ({"label": np.array([0, 1, 2])}, CrossEntropy(top=6), "loss.top=6 of only 5"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_check_refuses_labels_that_are_no_class_and_names_the_example(case: str) -> None:
    batch, loss, message = BAD_LABELS[case]
    with pytest.raises(InputError, match=message) as raised:
        loss.check(jax.ShapeDtypeStruct((3, CLASSES), np.float32), batch, IDS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_check_accepts_every_class(dtype: type, shape: tuple[int, ...]) -> None:
    label = np.resize(np.arange(CLASSES), shape).astype(dtype)
    CrossEntropy(top=CLASSES).check(
        jax.ShapeDtypeStruct((*shape, CLASSES), np.float32), {"label": label}, IDS
    )


@pytest.mark.parametrize("bad", [{"smoothing": 1.0}, {"smoothing": -0.1}, {"top": 0}])
def test_settings_out_of_range_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"loss.{next(iter(bad))}"):
        CrossEntropy(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(6,), (3, 4, 2)])
def test_mse_equals_numpy_in_value_and_gradient(shape: tuple[int, ...]) -> None:
    outputs, target = RNG.normal(size=(2, *shape)).astype(np.float32)
    value, gradient = jax.value_and_grad(lambda x: MSE()(x, {"target": target})[0])(jnp.array(outputs))
    np.testing.assert_allclose(value, np.mean((outputs - target) ** 2), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * (outputs - target) / target.size, rtol=1e-5)
    metrics = MSE()(jnp.array(outputs), {"target": target})[1]
    assert metrics["mae"].compute() == pytest.approx(np.mean(np.abs(outputs - target)), rel=1e-5)


def test_mse_leaves_masked_rows_out() -> None:
    outputs, target = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    keep = np.array([True, True, False, True])
    outputs[2] = np.nan
    value, metrics = MSE()(jnp.array(outputs), {"target": jnp.array(target), "mask": jnp.array(keep)})
    np.testing.assert_allclose(value, np.mean((outputs - target)[keep] ** 2), rtol=1e-5)
    assert metrics["loss"].count == metrics["mae"].count == 9


def test_mse_takes_integer_targets() -> None:
    value, _ = MSE()(jnp.array([[1.5]]), {"target": jnp.array([[1]])})
    assert float(value) == 0.25


@pytest.mark.parametrize(("outputs", "target"), [((8, 1), (8,)), ((8,), (8, 1)), ((8, 3), (8, 1))])
def test_mse_refuses_shapes_that_would_broadcast(outputs: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="must have one shape"):
        MSE()(jnp.zeros(outputs), {"target": jnp.zeros(target)})


CASES: dict[type, dict[str, Any]] = {
    CrossEntropy: {"smoothing": 0.2, "top": 2, "label": "other"},
    MSE: {"target": "other"},
}
FIELDS = [(cls, f.name) for cls in CASES for f in dataclasses.fields(cls)]


def results(loss: Any) -> dict[str, float]:
    outputs = jnp.array([[1.0, 3.0, 2.0], [0.0, 1.0, 5.0]])
    batch = {"label": jnp.array([0, 2]), "target": jnp.zeros((2, 3))}
    if "other" in dataclasses.astuple(loss):
        batch["other"] = jnp.array([1, 1]) if isinstance(loss, CrossEntropy) else jnp.ones((2, 3))
    value, metrics = loss(outputs, batch)
    return {"value": float(value), **{name: metric.compute() for name, metric in metrics.items()}}


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_field_of_a_loss_changes_its_result(cls: type, field: str) -> None:
    assert results(cls(**{field: CASES[cls][field]})) != results(cls())


def test_every_loss_is_in_the_table() -> None:
    members = inspect.getmembers(losses, dataclasses.is_dataclass)
    assert {cls for _, cls in members if cls.__module__ == losses.__name__} == set(CASES)
