"""jaxtrain.losses: values, gradients, metrics and checks of raw data."""

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
from jaxtrain.core.errors import InputError
from jaxtrain.losses import MAE, MSE, BinaryCrossEntropy, CrossEntropy, Forecast, Huber

RNG = np.random.default_rng(0)
CLASSES = 5


def classification(shape: tuple[int, ...] = (6,), scale: float = 3.0) -> tuple[jax.Array, jax.Array]:
    logits = scale * RNG.normal(size=(*shape, CLASSES)).astype(np.float32)
    return jnp.array(logits), jnp.array(RNG.integers(0, CLASSES, shape), jnp.int32)


def optax_loss(logits: jax.Array, label: jax.Array, smoothing: float) -> jax.Array:
    target = optax.smooth_labels(jax.nn.one_hot(label, CLASSES), smoothing)
    return optax.softmax_cross_entropy(logits, target).mean()


@pytest.mark.full("[shape1-0.0]")
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
    wanted_pair = jax.value_and_grad(optax_loss)(logits[rows], label[rows], smoothing)
    chex.assert_trees_all_close((value, gradient[rows]), wanted_pair, rtol=1e-5)
    assert not np.any(gradient[~np.array(keep)])
    _, metrics = loss(logits, batch)
    _, wanted = loss(logits[rows], {"label": label[rows]})
    for name in ("loss", "accuracy", "top2"):
        assert metrics[name].compute() == pytest.approx(wanted[name].compute(), rel=1e-6)
        assert metrics[name].count == 3


@pytest.mark.full("tests/losses/test_losses.py::test_masked_rows_change_neither_loss_nor_gradient")
def test_sequence_labels_are_masked_by_position_or_by_row() -> None:
    logits, label = classification((3, 4))
    cells = jnp.array(RNG.integers(0, 2, (3, 4)), bool)
    rows = jnp.array([True, False, True])
    for keep in (cells, rows):
        index = np.nonzero(np.broadcast_to(np.array(keep).reshape(3, -1), (3, 4)))
        value, metrics = CrossEntropy()(logits, {"label": label, "mask": keep})
        assert float(value) == pytest.approx(float(optax_loss(logits[index], label[index], 0.0)), rel=1e-5)
        assert metrics["accuracy"].compute() == np.mean(np.array(logits.argmax(-1) == label)[index])


@pytest.mark.full("[loss1]")
@pytest.mark.parametrize("loss", [CrossEntropy(0.1, top=2), MSE()])
def test_batch_with_all_rows_masked_has_loss_and_gradient_zero(loss: Any) -> None:
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


@pytest.mark.full("tests/step/test_float32_sums.py")
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
    "top above classes": (
        {"label": np.array([0, 1, 2])},
        CrossEntropy(top=6),
        "loss.top=6 is more than .* 5 classes",
    ),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_check_refuses_labels_outside_the_classes_and_names_the_example(case: str) -> None:
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


@pytest.mark.parametrize("classes", [128, 256, 257, 300, 65_536])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.int32, jnp.uint32])
def test_outside_with_more_classes_than_the_label_dtype_can_represent(dtype: Any, classes: int) -> None:
    largest = min(classes - 1, jnp.iinfo(dtype).max)
    batch = {"label": jnp.array([0, 1, largest], dtype)}
    assert int(CrossEntropy().outside(jnp.zeros((3, classes)), batch)) == 0
    batch["label_mixed"] = jnp.array([0, largest, 5], dtype)
    outputs = jnp.zeros((3, largest))  # one class fewer: both fields have one bad label
    assert int(CrossEntropy().outside(outputs, batch)) == 2


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
    assert set(metrics) == {"loss", "mae", "rmse"}
    assert metrics["mae"].compute() == pytest.approx(np.mean(np.abs(outputs - target)), rel=1e-5)
    assert metrics["rmse"].compute() == pytest.approx(np.sqrt(np.mean((outputs - target) ** 2)), rel=1e-5)


def test_mse_leaves_masked_rows_out() -> None:
    outputs, target = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    keep = np.array([True, True, False, True])
    outputs[2] = np.nan
    value, metrics = MSE()(jnp.array(outputs), {"target": jnp.array(target), "mask": jnp.array(keep)})
    np.testing.assert_allclose(value, np.mean((outputs - target)[keep] ** 2), rtol=1e-5)
    assert metrics["loss"].count == metrics["mae"].count == metrics["rmse"].count == 9


def test_half_precision_outputs_are_compared_in_float32() -> None:
    value, _ = MSE()(jnp.array([[256.0]], jnp.bfloat16), {"target": jnp.array([[257.0]])})
    assert value.dtype == jnp.float32 and float(value) == 1  # 257 is not a bfloat16


def test_mse_takes_integer_targets() -> None:
    value, _ = MSE()(jnp.array([[1.5]]), {"target": jnp.array([[1]])})
    assert float(value) == 0.25


@pytest.mark.parametrize(("outputs", "target"), [((8, 1), (8,)), ((8,), (8, 1)), ((8, 3), (8, 1))])
def test_mse_refuses_shapes_that_would_broadcast(outputs: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="must have the same shape"):
        MSE()(jnp.zeros(outputs), {"target": jnp.zeros(target)})


# --- class maps


@pytest.mark.full("tests/metrics/test_reports.py::test_segmentation_on_eight_devices_equals_scikit_learn")
def test_iou_of_segmentation_labels_excludes_masked_rows() -> None:
    logits, label = classification((3, 4, 5))
    keep = np.array([True, False, True])
    batch = {"label": label.astype(jnp.uint8), "mask": jnp.array(keep)}
    metrics = CrossEntropy(iou=True)(logits, batch)[1]
    assert set(metrics) == {"loss", "accuracy", "mean_iou"}
    guess, truth = np.array(logits.argmax(-1))[keep], np.array(label)[keep]
    each = [((guess == k) & (truth == k)).sum() / ((guess == k) | (truth == k)).sum() for k in range(CLASSES)]
    assert metrics["mean_iou"].compute() == pytest.approx(np.mean(each), rel=1e-6)
    assert metrics["mean_iou"].actual.sum() == 2 * 4 * 5


# --- forecasts

SHAPE = (4, 3, 2)  # batch, horizon, variables


def windows() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    outputs, target = RNG.normal(size=(2, *SHAPE)).astype(np.float32)
    return outputs, {"target": target, "series": RNG.normal(size=(4, 6, 2)).astype(np.float32)}


def test_forecast_is_the_mse_and_reports_repeating_the_last_row() -> None:
    outputs, batch = windows()
    ours, theirs = (
        jax.value_and_grad(lambda x, loss=loss: loss(x, batch)[0])(jnp.array(outputs))
        for loss in (Forecast(), MSE())
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
    error = batch["target"] - outputs
    repeat = batch["target"] - np.repeat(batch["series"][:, -1:], 3, axis=1)
    wanted = {
        "loss": np.mean(error**2),
        "mae": np.mean(np.abs(error)),
        "repeat_last_mse": np.mean(repeat**2),
        "repeat_last_mae": np.mean(np.abs(repeat)),
    }
    found = {name: metric.compute() for name, metric in Forecast()(jnp.array(outputs), batch)[1].items()}
    assert found == pytest.approx(wanted, rel=1e-5)


def test_forecast_leaves_masked_rows_out_of_all_its_figures() -> None:
    outputs, batch = windows()
    keep = np.array([True, False, True, True])
    unmasked = {name: field[keep] for name, field in batch.items()}
    batch["target"][1], batch["series"][1] = 1e9, np.nan
    value, metrics = Forecast()(jnp.array(outputs), {**batch, "mask": jnp.array(keep)})
    wanted, figures = Forecast()(jnp.array(outputs[keep]), unmasked)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    for name, metric in metrics.items():
        assert metric.count == 3 * 3 * 2
        assert metric.compute() == pytest.approx(figures[name].compute(), rel=1e-5)


@pytest.mark.parametrize(
    ("outputs", "history", "message"),
    [
        ((4, 3, 1), (4, 6, 2), "must have the same shape"),
        (SHAPE, (4, 6, 1), "same variables"),
        (SHAPE, (4, 6, 3), "same variables"),
        (SHAPE, (4, 2), "batch, steps, variables"),
    ],
)
def test_forecast_refuses_shapes_that_would_broadcast(outputs: Any, history: Any, message: str) -> None:
    batch = {"target": jnp.zeros(SHAPE), "series": jnp.zeros(history)}
    with pytest.raises(InputError, match=message) as raised:
        Forecast()(jnp.zeros(outputs), batch)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_forecast_check_names_the_example_whose_target_is_not_finite(poison: float) -> None:
    batch, spec = windows()[1], jax.ShapeDtypeStruct(SHAPE, np.float32)
    ids = np.array([70, 71, 72, 73])
    Forecast().check(spec, batch, ids)
    batch["target"][2, 1, 0] = batch["target"][3, 0, 0] = poison
    with pytest.raises(InputError, match=r"'target' of example 72 .* \(2 such values\)") as raised:
        Forecast().check(spec, batch, ids)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["target", "series"])
def test_forecast_check_names_a_missing_field(field: str) -> None:
    batch = windows()[1]
    del batch[field]
    with pytest.raises(InputError, match=f"needs the batch field '{field}'"):
        Forecast().check(jax.ShapeDtypeStruct(SHAPE, np.float32), batch, np.arange(4))


CASES: dict[type, dict[str, Any]] = {
    CrossEntropy: {
        "smoothing": 0.2,
        "top": 2,
        "label": "other",
        "iou": True,
        "ignore": 2,
        "output": "second",
        "task": "segmentation",
    },
    BinaryCrossEntropy: {
        "smoothing": 0.2,
        "threshold": 0.9,
        "pos_weight": 2.0,
        "label": "other",
        "ignore": 0,
        "output": "second",
        "task": "multi_label",
    },
    MSE: {"target": "other", "output": "second"},
    MAE: {"target": "other", "output": "second"},
    Huber: {"target": "other", "output": "second", "delta": 0.5},
    Forecast: {"target": "other", "history": "other", "output": "second"},
}
FIELDS = [(cls, f.name) for cls in CASES for f in dataclasses.fields(cls)]


def results(loss: Any) -> dict[str, Any]:
    outputs: Any = jnp.array([[1.0, 3.0, 2.0], [0.0, 1.0, 5.0]])
    batch = {"label": jnp.array([0, 2]), "target": jnp.zeros((2, 3))}
    if isinstance(loss, BinaryCrossEntropy):
        batch["label"] = jnp.array([[0, 1, 0], [1, 1, 0]])
    if isinstance(loss, Forecast):
        outputs, batch = outputs[..., None], {"target": jnp.zeros((2, 3, 1)), "series": jnp.zeros((2, 5, 1))}
    if "other" in dataclasses.astuple(loss):
        batch["other"] = jnp.array([1, 1]) if isinstance(loss, CrossEntropy) else jnp.ones_like(outputs)
    if loss.output is not None:
        outputs = {"first": outputs, "second": outputs + jnp.arange(outputs.size).reshape(outputs.shape)}
    value, metrics = loss(outputs, batch)
    figures = {name: metric.compute() for name, metric in metrics.items()}
    return {"value": float(value), **figures, "task": type(loss.report)}


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_field_of_a_loss_changes_its_result(cls: type, field: str) -> None:
    assert results(cls(**{field: CASES[cls][field]})) != results(cls())


def test_every_loss_has_a_case() -> None:
    assert {cls for _, cls in inspect.getmembers(losses, dataclasses.is_dataclass)} == set(CASES)


def test_loss_weights_both_mixed_labels_and_accuracy_uses_the_main_one() -> None:
    logits = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
    batch = {
        "label": jnp.array([0, 0]),
        "label_mixed": jnp.array([1, 2]),
        "mix": jnp.array([0.7, 0.2]),
    }
    for smoothing in (0.0, 0.1):
        loss, metrics = CrossEntropy(smoothing)(logits, batch)
        one = [
            CrossEntropy(smoothing)(logits[i : i + 1], {"label": batch["label"][i : i + 1]})[0]
            for i in (0, 1)
        ]
        two = [
            CrossEntropy(smoothing)(logits[i : i + 1], {"label": batch["label_mixed"][i : i + 1]})[0]
            for i in (0, 1)
        ]
        wanted = (0.7 * one[0] + 0.3 * two[0] + 0.2 * one[1] + 0.8 * two[1]) / 2
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)
        assert metrics["accuracy"].compute() == 1  # 0 of 0.7 and 2 of 0.8 are the likeliest
