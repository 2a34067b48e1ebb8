"""jaxtrain.losses.CrossEntropy: ignored labels, one of several outputs, and what evaluations report."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import metrics
from jaxtrain.core.chunked_logits import ChunkedLogits
from jaxtrain.core.errors import InputError
from jaxtrain.losses import CrossEntropy
from jaxtrain.step import make_eval_step, make_init
from jaxtrain.step.gradients import evaluation_metrics

RNG = np.random.default_rng(0)
CLASSES = 5
IDS = np.arange(70, 76)


def case(ignore: int, dtype: Any = np.int32) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """Return logits, labels of which a third are ``ignore``, and which of them count."""
    logits = RNG.normal(size=(6, 4, CLASSES)).astype(np.float32)
    label = RNG.integers(0, CLASSES, (6, 4))
    keep = RNG.random(label.shape) > 0.3
    return jnp.asarray(logits), np.where(keep, label, ignore).astype(dtype), keep


@pytest.mark.full("[255-uint8]")
@pytest.mark.parametrize(
    ("ignore", "dtype"), [(-1, np.int32), (255, np.uint8), (-1, np.uint32), (2, np.int32)]
)
def test_ignored_labels_change_nothing(ignore: int, dtype: Any) -> None:
    logits, label, keep = case(ignore, dtype)
    if dtype == np.uint32:  # which cannot hold -1
        label, keep = np.where(keep, label, 0).astype(dtype), np.ones_like(keep)
    keep = keep & (label.astype(np.int64) != ignore)
    mask = np.array([1, 1, 1, 1, 1, 0], bool)
    loss = CrossEntropy(smoothing=0.1, top=2, iou=True, ignore=ignore)
    batch = {"label": jnp.asarray(label), "mask": jnp.asarray(mask)}
    value, gradient = jax.value_and_grad(lambda x: loss(x, batch)[0])(logits)
    keep = keep & mask[:, None]
    plain = CrossEntropy(smoothing=0.1, top=2, iou=True)
    counted = {"label": jnp.asarray(label[keep].astype(np.int32))}
    wanted = jax.value_and_grad(lambda x: plain(x, counted)[0])(logits[keep])
    chex.assert_trees_all_close((value, gradient[keep]), wanted, rtol=1e-5, atol=1e-8)
    assert not np.any(gradient[~keep])
    found, figures = loss(logits, batch)[1], plain(logits[keep], counted)[1]
    for name in ("loss", "accuracy", "top2", "mean_iou"):
        assert found[name].compute() == pytest.approx(figures[name].compute(), rel=1e-6), name
    assert found["loss"].count == keep.sum()


def test_a_batch_of_ignored_labels_has_loss_and_gradient_zero() -> None:
    logits, label, _ = case(255)
    batch = {"label": jnp.full(label.shape, 255)}
    value, gradient = jax.value_and_grad(lambda x: CrossEntropy(ignore=255)(x, batch)[0])(logits)
    assert float(value) == 0 and not np.any(gradient)


@pytest.mark.full("tests/losses/test_ignored_labels.py::test_ignored_labels_change_nothing")
def test_ignored_labels_of_chunked_logits() -> None:
    features, table = RNG.normal(size=(3, 7, 4)), RNG.normal(size=(CLASSES, 4))
    label = jnp.asarray(RNG.integers(-1, CLASSES, (3, 7)), jnp.int32)
    chunks = ChunkedLogits.of(jnp.float32(features), jnp.float32(table), 2)
    loss, batch = CrossEntropy(0.1, top=2, ignore=-1), {"label": label}
    found, wanted = loss.eval_metrics(chunks, batch), loss.eval_metrics(chunks.full(), batch)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)
    assert found["loss"].count == (label >= 0).sum() < label.size


def test_a_mixed_pair_counts_where_both_labels_count() -> None:
    logits = jnp.asarray(RNG.normal(size=(3, CLASSES)), jnp.float32)
    pair = {"label": jnp.array([0, 1, -1]), "label_mixed": jnp.array([1, -1, 0]), "mix": jnp.full(3, 0.7)}
    value, found = CrossEntropy(ignore=-1)(logits, pair)
    wanted, _ = CrossEntropy()(logits[:1], {name: field[:1] for name, field in pair.items()})
    assert found["loss"].count == 1 and float(value) == pytest.approx(float(wanted), rel=1e-6)


def test_checks_of_raw_labels_and_of_the_guard_accept_the_ignored_label_only() -> None:
    spec = jax.ShapeDtypeStruct((6, 4, CLASSES), np.float32)
    for ignore, dtype in ((-1, np.int32), (255, np.uint8)):
        loss, (logits, label, _) = CrossEntropy(ignore=ignore), case(ignore, dtype)
        loss.check(spec, {"label": label}, IDS)
        assert int(loss.outside(logits, {"label": jnp.asarray(label)})) == 0
        label[2, 1] = 9
        with pytest.raises(InputError, match="label 9 of example 72"):
            loss.check(spec, {"label": label}, IDS)
        assert int(loss.outside(logits, {"label": jnp.asarray(label)})) == 1
    with pytest.raises(InputError, match=r"label -1 .* loss.ignore leaves a label out"):
        CrossEntropy().check(spec, {"label": case(-1)[1]}, IDS)
    with pytest.raises(InputError, match=r"label 1 .* one logit for two classes takes BinaryCrossEntropy"):
        CrossEntropy().check(jax.ShapeDtypeStruct((2, 1), np.float32), {"label": np.array([0, 1])}, IDS)


def test_evaluations_report_the_cross_entropy_without_smoothing() -> None:
    logits, label, _ = case(0)
    loss, batch = CrossEntropy(smoothing=0.2), {"label": jnp.asarray(label)}
    found = {name: metric.compute() for name, metric in evaluation_metrics(loss, logits, batch).items()}
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    assert found["loss"] == pytest.approx(float(plain), rel=1e-6)
    assert found["smoothed_loss"] == pytest.approx(float(loss(logits, batch)[0]), rel=1e-6)
    assert set(evaluation_metrics(CrossEntropy(), logits, batch)) == {"loss", "accuracy"}


def test_the_eval_step_reports_eval_metrics_and_a_subclass_its_own_call() -> None:
    class Doubled(CrossEntropy):
        def __call__(self, outputs: Any, batch: Any) -> Any:
            loss, found = super().__call__(outputs, batch)
            return 2 * loss, {"loss": metrics.Mean.of(2 * loss)} | {"accuracy": found["accuracy"]}

    tx, batch = optax.sgd(0.1), {"x": jnp.zeros((2, 3)), "label": jnp.array([0, 1])}
    model = (
        lambda key, batch: (jnp.zeros((1, 3)), {}),
        lambda params, extra, batch, **_: (batch["x"] + params, extra),
    )
    state = make_init(model, tx)(jax.random.key(0), batch)
    found = make_eval_step(model, CrossEntropy(0.5))(state, batch)
    assert set(found) == {"loss", "smoothed_loss", "accuracy"}
    found = make_eval_step(model, Doubled(0.5))(state, batch)
    assert set(found) == {"loss", "accuracy"} and found["loss"].compute() == pytest.approx(2 * np.log(3))


def test_the_task_of_a_loss_is_its_report() -> None:
    assert CrossEntropy(ignore=7, label="y", output=1).report == metrics.Classification("y", 7, 1)
    assert CrossEntropy(task="language_model").report == metrics.LanguageModel()
    assert CrossEntropy(task="segmentation").report == CrossEntropy(iou=True).report == metrics.Segmentation()
    with pytest.raises(InputError, match=r"loss.task is 'regression': it must be one of classification"):
        CrossEntropy(task="regression")  # type: ignore[arg-type]


def test_labels_of_another_rank_are_one_line() -> None:
    with pytest.raises(InputError, match=r"field 'label' has shape \[4, 1\] for logits \[4, 3\]"):
        CrossEntropy()(jnp.zeros((4, 3)), {"label": jnp.zeros((4, 1), int)})
