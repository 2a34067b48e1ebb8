"""jaxtrain.losses: BinaryCrossEntropy, MAE and Huber, against optax and scikit-learn."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import log_loss

from jaxtrain import metrics
from jaxtrain.core.errors import InputError
from jaxtrain.losses import MAE, MSE, BinaryCrossEntropy, Forecast, Huber

RNG = np.random.default_rng(0)


def case(*shape: int) -> tuple[jax.Array, np.ndarray]:
    return jnp.asarray(3 * RNG.normal(size=shape), jnp.float32), RNG.integers(0, 2, shape)


@pytest.mark.full("[shape1]")
@pytest.mark.parametrize("shape", [(8,), (8, 3), (8, 4, 5)])
def test_binary_cross_entropy_equals_optax_in_value_and_gradient(shape: tuple[int, ...]) -> None:
    logits, label = case(*shape)
    batch = {"label": jnp.asarray(label)}
    ours = jax.value_and_grad(lambda x: BinaryCrossEntropy()(x, batch)[0])(logits)
    theirs = jax.value_and_grad(lambda x: optax.sigmoid_binary_cross_entropy(x, label).mean())(logits)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.full("[last0-bool]")
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("last", [((1,), ()), ((1,), (1,)), ((), (1,))])
def test_one_logit_with_labels_of_any_dtype_equals_scikit_learn(dtype: Any, last: Any) -> None:
    logits, label = case(40)
    field = label.astype(dtype).reshape(40, *last[1])
    batch = {"label": jnp.asarray(field if dtype != np.int64 else field.astype(np.int32))}
    loss = BinaryCrossEntropy(threshold=0.7)
    value, found = loss(logits.reshape(40, *last[0]), batch)
    probability = np.array(jax.nn.sigmoid(logits), np.float64)
    assert float(value) == pytest.approx(log_loss(label, probability), rel=1e-5)
    assert found["accuracy"].compute() == pytest.approx(np.mean((probability > 0.7) == label), rel=1e-6)
    loss.check(None, {"label": field}, np.arange(40))
    assert int(loss.outside(logits, batch)) == 0


@pytest.mark.full(
    "tests/losses/test_binary_and_regression.py::test_binary_cross_entropy_equals_optax_in_value_and_gradient"
)
def test_smoothing_and_pos_weight() -> None:
    logits, label = case(50)
    y, p = label, np.array(jax.nn.sigmoid(logits), np.float64)
    batch = {"label": jnp.asarray(label)}
    weighted = -(2.5 * y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert float(BinaryCrossEntropy(pos_weight=2.5)(logits, batch)[0]) == pytest.approx(weighted, rel=1e-5)
    smooth = 0.8 * y + 0.1
    smoothed = -(smooth * np.log(p) + (1 - smooth) * np.log(1 - p)).mean()
    loss = BinaryCrossEntropy(smoothing=0.2)
    assert float(loss(logits, batch)[0]) == pytest.approx(smoothed, rel=1e-5)
    found = {name: metric.compute() for name, metric in loss.eval_metrics(logits, batch).items()}
    assert found["loss"] == pytest.approx(log_loss(label, p), rel=1e-5)
    assert found["smoothed_loss"] == pytest.approx(smoothed, rel=1e-5)


@pytest.mark.full(
    "tests/losses/test_binary_and_regression.py::test_binary_cross_entropy_equals_optax_in_value_and_gradient"
)
def test_large_logits_are_finite_in_value_and_gradient() -> None:
    logits, batch = jnp.array([1e4, -1e4, 1e4]), {"label": jnp.array([1, 0, 0])}
    value, gradient = jax.value_and_grad(lambda x: BinaryCrossEntropy()(x, batch)[0])(logits)
    assert float(value) == pytest.approx(1e4 / 3) and np.isfinite(gradient).all()
    half = BinaryCrossEntropy()(logits.astype(jnp.bfloat16) / 1e4, batch)[0]
    assert half.dtype == jnp.float32


@pytest.mark.full("[2]")
@pytest.mark.parametrize("ignore", [-1, 2])
def test_masked_and_ignored_labels_change_nothing(ignore: int) -> None:
    logits, label = case(9, 3)
    keep = RNG.random((9, 3)) > 0.3
    mask = np.arange(9) < 7
    batch = {"label": jnp.asarray(np.where(keep, label, ignore), jnp.float32), "mask": jnp.asarray(mask)}
    loss = BinaryCrossEntropy(ignore=ignore)
    value, gradient = jax.value_and_grad(lambda x: loss(x, batch)[0])(logits)
    keep &= mask[:, None]
    wanted = optax.sigmoid_binary_cross_entropy(logits[keep], label[keep]).mean()
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    assert not np.any(gradient[~keep]) and loss(logits, batch)[1]["accuracy"].count == keep.sum()
    assert int(loss.outside(logits, batch)) == 0
    wrong = BinaryCrossEntropy().outside(logits, batch)
    assert int(wrong) == (np.asarray(batch["label"])[:7] == ignore).sum()
    nothing = {"label": jnp.full((9, 3), ignore)}
    assert float(loss(logits, nothing)[0]) == 0


@pytest.mark.full("tests/losses/test_ignored_labels.py::test_a_mixed_pair_counts_where_both_labels_count")
def test_mixed_labels_are_weighted() -> None:
    logits = jnp.array([[2.0], [-1.0]])
    batch = {"label": jnp.array([1, 0]), "label_mixed": jnp.array([0, 1]), "mix": jnp.array([0.7, 0.2])}
    one, two = (
        np.array(optax.sigmoid_binary_cross_entropy(logits[:, 0], batch[name]))
        for name in ("label", "label_mixed")
    )
    mix = np.array(batch["mix"])
    value, found = BinaryCrossEntropy()(logits, batch)
    assert float(value) == pytest.approx(np.mean(mix * one + (1 - mix) * two), rel=1e-6)
    assert found["accuracy"].compute() == 0.5  # the main labels are 1 and 1


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.array([0, 1, 2]), r"label 2 of example 72 in field 'label' is neither 0 nor 1 \(1 such\)"),
        (np.array([0.0, 0.5, 1.0]), "label 0.5 of example 71"),
        (np.array([-1, 1, -1]), r"label -1 of example 70 .*\(2 such\).* loss.ignore"),
    ],
)
def test_raw_labels_that_are_neither_0_nor_1_are_refused(label: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        BinaryCrossEntropy().check(None, {"label": label}, np.array([70, 71, 72]))
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="needs the batch field 'label'"):
        BinaryCrossEntropy().check(None, {"y": label}, np.arange(3))


@pytest.mark.parametrize("bad", [{"smoothing": 1.0}, {"threshold": 0.0}, {"pos_weight": 0.0}, {"task": "x"}])
def test_settings_out_of_range_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"loss.{next(iter(bad))}"):
        BinaryCrossEntropy(**bad)
    with pytest.raises(InputError, match=r"loss.delta"):
        Huber(delta=0)


def test_two_logits_are_refused() -> None:
    with pytest.raises(InputError, match=r"outputs \[4, 2\] and labels \[4\].* CrossEntropy"):
        BinaryCrossEntropy()(jnp.zeros((4, 2)), {"label": jnp.zeros(4, int)})


@pytest.mark.parametrize("loss", [MAE(), Huber(delta=0.7)])
def test_mae_and_huber_equal_optax_and_leave_masked_rows_out(loss: Any) -> None:
    outputs, target = RNG.normal(size=(2, 6, 3)).astype(np.float32)
    mask = np.array([1, 1, 0, 1, 0, 1], bool)
    batch = {"target": jnp.asarray(target), "mask": jnp.asarray(mask)}
    value, found = loss(jnp.asarray(outputs), batch)
    each = np.abs(outputs - target) if isinstance(loss, MAE) else optax.huber_loss(outputs, target, delta=0.7)
    assert float(value) == pytest.approx(float(np.mean(np.asarray(each)[mask])), rel=1e-5)
    assert found["mae"].compute() == pytest.approx(np.abs(outputs - target)[mask].mean(), rel=1e-5)
    assert found["rmse"].compute() == pytest.approx(np.sqrt(((outputs - target) ** 2)[mask].mean()), rel=1e-5)


def test_the_task_of_a_loss_is_its_report() -> None:
    assert BinaryCrossEntropy(threshold=0.3, ignore=-1).report == metrics.Binary("label", 0.3, -1)
    assert type(BinaryCrossEntropy(task="multi_label").report) is metrics.MultiLabel
    for loss in (MSE("y", "a"), MAE("y", "a"), Huber("y", "a"), Forecast("y", output="a")):
        assert loss.report == metrics.Regression("y", "a")
