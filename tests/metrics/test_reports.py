"""jaxtrain.metrics: task reports equal scikit-learn, with padding, ignored labels and absent classes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from jaxtrain import metrics, monitor, sharding
from jaxtrain.core.chunked_logits import ChunkedLogits
from jaxtrain.core.errors import InputError
from jaxtrain.metrics import (
    Binary,
    Classification,
    ConfusionMatrix,
    LanguageModel,
    MultiLabel,
    Regression,
    Segmentation,
    report_figures,
)
from jaxtrain.step.packing import PackedMetrics

BATCH = 16


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def figures(report: Any, outputs: Any, mesh: Any = None, **fields: np.ndarray) -> dict[str, Any]:
    """Report as an evaluation does: in batches of 16, the last one padded, merged on the host."""
    n = len(next(iter(fields.values())))
    step = jax.jit(lambda outputs, batch: PackedMetrics.of(report(outputs, batch)))
    rows = []
    for start in range(0, n, BATCH):
        take = np.minimum(np.arange(start, start + BATCH), n - 1)  # padding repeats the last example
        batch = {name: jnp.asarray(field[take]) for name, field in fields.items()}
        batch["mask"] = jnp.asarray(np.arange(start, start + BATCH) < n)
        part = jax.tree.map(lambda x, take=take: jnp.asarray(np.asarray(x)[take]), outputs)
        if mesh is not None:
            part, batch = jax.device_put((part, batch), sharding.batch_split(mesh))
        rows += step(part, batch).rows()
    return report_figures(monitor.merge_all(rows))


def macro(name: str, truth: np.ndarray, guess: np.ndarray, **kwargs: Any) -> float:
    kwargs = {"average": "macro", "zero_division": 0, **kwargs}
    return getattr(sk, f"{name}_score")(truth, guess, **kwargs)


def check_classes(found: dict[str, Any], truth: np.ndarray, guess: np.ndarray, classes: int) -> None:
    """Compare with scikit-learn; the order of its sums may differ in the last bit."""
    labels = np.arange(classes)
    wanted = sk.precision_recall_fscore_support(truth, guess, labels=labels, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), wanted, strict=True):
        np.testing.assert_allclose(found[name], values, rtol=1e-15, err_msg=name)
    np.testing.assert_array_equal(found["confusion"], sk.confusion_matrix(truth, guess, labels=labels))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess), rel=1e-15)
    for name in ("precision", "recall", "f1"):
        assert found[f"macro_{name}"] == pytest.approx(macro(name, truth, guess), rel=1e-15)


@pytest.mark.parametrize("case", ["all", "absent classes", "one class", "ignored", "bfloat16"])
def test_classification_equals_scikit_learn(case: str) -> None:
    random = rng()
    logits = random.normal(size=(45, 6)).astype(np.float32)
    label = random.integers(0, 6, 45).astype(np.int32)
    report, keep = Classification(), np.ones(45, bool)
    if case == "absent classes":  # 5 is neither a label nor a prediction, 4 no label
        label, logits[:, 5] = label % 4, -99
    if case == "one class":
        label[:], logits[:, 2] = 2, 99
    if case == "ignored":
        label[random.random(45) < 0.3] = 255
        keep, report = label != 255, Classification(ignore=255)
    if case == "bfloat16":
        logits = np.asarray(jnp.asarray(logits, jnp.bfloat16))
    found = figures(report, logits, label=label)
    assert "labels_left_out" not in found
    guess = np.asarray(jnp.asarray(logits).argmax(-1))
    check_classes(found, label[keep], guess[keep], 6)


def test_segmentation_on_eight_devices_equals_scikit_learn(mesh8: Any) -> None:
    random = rng()
    logits = random.normal(size=(21, 4, 5, 3)).astype(np.float32)
    label = random.integers(0, 3, (21, 4, 5)).astype(np.uint8)
    label[random.random(label.shape) < 0.3] = 255
    found = figures(Segmentation(ignore=255), logits, mesh8, label=label)
    keep = label != 255
    truth, guess = label[keep], logits.argmax(-1)[keep]
    check_classes(found, truth, guess, 3)
    np.testing.assert_allclose(found["iou"], sk.jaccard_score(truth, guess, average=None), rtol=1e-15)
    assert found["mean_iou"] == pytest.approx(macro("jaccard", truth, guess), rel=1e-15)


@pytest.mark.full("tests/metrics/test_metrics.py::test_confusion_matrix_without_a_mask_counts_every_row")
def test_negative_labels_are_never_counted_and_the_report_says_how_many_there_were() -> None:
    random = rng()
    logits, label = random.normal(size=(40, 3)).astype(np.float32), random.integers(-1, 4, 40)
    found = figures(Classification(), logits, label=label.astype(np.int32))
    keep = (label >= 0) & (label < 3)
    check_classes(found, label[keep], logits.argmax(-1)[keep], 3)
    assert found["labels_left_out"] == (~keep).sum() > 0
    matrix = ConfusionMatrix.of(jnp.asarray(logits), jnp.asarray(label, jnp.int32))
    np.testing.assert_array_equal(matrix.counts, found["confusion"])


def test_54_000_classes_are_counted_by_class_without_a_matrix() -> None:
    label = (np.arange(20) * 2700 + 1).astype(np.int32)
    guess = np.where(np.arange(20) % 2, label, label - 1)
    logits = np.zeros((20, 54_000), np.float32)
    logits[np.arange(20), guess] = 1
    found = figures(Classification(), logits, label=label)
    assert "confusion" not in found and found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx(macro("f1", label, guess), rel=1e-15)
    assert np.flatnonzero(found["recall"]).tolist() == label[1::2].tolist()
    with pytest.raises(InputError, match=r"54,000 classes has 2,916,000,000 cells: use metrics.ClassCounts"):
        ConfusionMatrix.of(jnp.zeros((2, 54_000)), jnp.zeros(2, int))


def test_one_hot_labels_count_as_classes_and_rows_of_zeros_do_not_count() -> None:
    random = rng()
    logits, label = random.normal(size=(20, 4)).astype(np.float32), random.integers(0, 4, 20)
    one_hot = np.eye(4, dtype=np.float32)[label]
    one_hot[3] = 0
    keep = np.arange(20) != 3
    check_classes(figures(Classification(), logits, label=one_hot), label[keep], logits.argmax(-1)[keep], 4)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int32, np.float32])
@pytest.mark.parametrize("last", [((), ()), ((1,), ()), ((1,), (1,)), ((), (1,))])
def test_binary_equals_scikit_learn(dtype: Any, last: Any) -> None:
    random = rng()
    logits = random.normal(size=40).astype(np.float32)
    label = (random.random(40) < 0.4).astype(dtype)
    report = Binary(threshold=0.3)
    found = figures(report, logits.reshape(40, *last[0]), label=label.reshape(40, *last[1]))
    truth, guess = label.astype(int), 1 / (1 + np.exp(-logits.astype(np.float64))) > 0.3
    for name in ("precision", "recall", "f1"):
        wanted = getattr(sk, f"{name}_score")(truth, guess, zero_division=0)
        assert found[name] == pytest.approx(wanted, rel=1e-15)
    counts = [found[f"{kind}s"] for kind in ("true_negative", "false_positive", "false_negative")]
    assert counts == sk.confusion_matrix(truth, guess).ravel()[:3].tolist()
    assert found["accuracy"] == sk.accuracy_score(truth, guess)


def test_binary_leaves_out_ignored_and_wrong_labels() -> None:
    label = np.array([1, 0, -1, -1, 7], np.int32)
    logits = np.array([1.0, 1.0, 1.0, -1.0, 1.0], np.float32)
    found = figures(Binary(ignore=-1), logits, label=label)
    assert (found["precision"], found["support"], found["labels_left_out"]) == (0.5, 1, 1)
    assert figures(Binary(), logits, label=label)["labels_left_out"] == 3


def test_multi_label_equals_scikit_learn() -> None:
    random = rng()
    logits = random.normal(size=(37, 4)).astype(np.float32)
    label = (random.random((37, 4)) < 0.4).astype(np.float32)
    label[:, 2], logits[:, 3] = 0, -9  # a label that never occurs, and one that is never predicted
    found, guess = figures(MultiLabel(), logits, label=label), logits > 0
    for name in ("precision", "recall", "f1"):
        by_label = getattr(sk, f"{name}_score")(label, guess, average=None, zero_division=0)
        np.testing.assert_allclose(found[name], by_label, rtol=1e-15)
        for average in ("macro", "micro"):
            wanted = macro(name, label, guess, average=average)
            assert found[f"{average}_{name}"] == pytest.approx(wanted, rel=1e-15)
    assert found["accuracy"] == pytest.approx(np.mean(guess == label), rel=1e-7)
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(label, guess), rel=1e-7)


@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 3), (40, 5, 2)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_regression_equals_scikit_learn(shape: tuple[int, ...], offset: float) -> None:
    random = rng()
    target = (random.normal(size=shape) + offset).astype(np.float32)
    outputs = (target + 0.5 * random.normal(size=shape)).astype(np.float32)
    found = figures(Regression(), outputs, target=target)
    columns = shape[-1] if len(shape) > 1 else 1
    truth, guess = (x.reshape(-1, columns).astype(np.float64) for x in (target, outputs))
    assert found["r2"] == pytest.approx(sk.r2_score(truth, guess), rel=1e-5)
    assert found["mse"] == pytest.approx(sk.mean_squared_error(truth, guess), rel=1e-5)
    assert found["rmse"] == pytest.approx(math.sqrt(sk.mean_squared_error(truth, guess)), rel=1e-5)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(truth, guess), rel=1e-5)


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_r2_of_a_constant_target_is_that_of_scikit_learn(error: float) -> None:
    target = np.full(40, 0.1, np.float32)
    outputs = target + np.float32(error)
    assert figures(Regression(), outputs, target=target)["r2"] == float(error == 0)
    assert math.isnan(figures(Regression(), outputs[:1], target=target[:1])["r2"])
    assert math.isnan(figures(Regression(), outputs * np.nan, target=target)["r2"])


def test_r2_merges_batches_of_other_means_and_a_batch_without_examples() -> None:
    target = np.repeat([0.0, 1000.0, -1000.0], 16).astype(np.float32) + rng().normal(size=48).astype(
        np.float32
    )
    outputs = target + rng(1).normal(size=48).astype(np.float32)
    parts = [
        metrics.R2.of(jnp.asarray(o), jnp.asarray(t))
        for o, t in zip(outputs.reshape(3, 16), target.reshape(3, 16), strict=True)
    ]
    empty = metrics.R2.of(jnp.ones(4), jnp.full(4, 1e6), jnp.zeros(4, bool))
    rows = [PackedMetrics.of({"r2": part}).rows()[0] for part in (empty, *parts, empty)]
    found = monitor.merge_all(rows)["r2"]
    wanted = sk.r2_score(target.astype(np.float64), outputs.astype(np.float64))
    assert 1 - found == pytest.approx(1 - wanted, rel=1e-5)


@pytest.mark.parametrize("unit", ["token", "byte"])
def test_language_model_reports_perplexity_and_bits(unit: Any) -> None:
    random = rng()
    features, table = random.normal(size=(5, 6, 3)), random.normal(size=(7, 3))
    label = random.integers(0, 7, (5, 6)).astype(np.int32)
    label[random.random(label.shape) < 0.3] = -100
    chunks = ChunkedLogits.of(jnp.float32(features), jnp.float32(table), 2)
    batch = {"label": jnp.asarray(label), "mask": jnp.array([True] * 4 + [False])}
    logits = features @ table.T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    keep = label[:4] >= 0
    nll = -np.take_along_axis(logp, label.clip(0)[..., None], -1)[:4, :, 0][keep].mean()
    for outputs in (chunks, chunks.full()):
        found = report_figures(LanguageModel(ignore=-100, unit=unit)(outputs, batch))
        assert set(found) == {"perplexity", f"bits_per_{unit}"}
        assert found["perplexity"] == pytest.approx(np.exp(nll), rel=1e-5)
        assert found[f"bits_per_{unit}"] == pytest.approx(nll / np.log(2), rel=1e-5)


class Heads(NamedTuple):
    aux: Any
    main: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Outputs:
    aux: Any
    main: Any


SEVERAL = {
    "dict": (lambda aux, main: {"aux": aux, "main": main}, "main"),
    "tuple": (lambda aux, main: (aux, main), 1),
    "list": (lambda aux, main: [aux, main], -1),
    "named tuple": (Heads, "main"),
    "named tuple by position": (Heads, 1),
    "dataclass": (Outputs, "main"),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_one_of_several_outputs_is_named(kind: str) -> None:
    build, name = SEVERAL[kind]
    logits, label = rng().normal(size=(20, 3)).astype(np.float32), rng().integers(0, 3, 20)
    outputs = build(np.zeros((20, 7), np.float32), logits)
    found = figures(Classification(output=name), outputs, label=label.astype(np.int32))
    check_classes(found, label, logits.argmax(-1), 3)


@pytest.mark.parametrize(
    ("report", "outputs", "message"),
    [
        (
            Classification(),
            {"a": 1, "b": 2},
            r"returns 2 outputs \(a, b\): name one of them, report.output='a'",
        ),
        (Classification(output="c"), {"a": 1}, "report.output is 'c': the model's outputs are a"),
        (
            Classification(output="a"),
            {"a": (1, 2)},
            r"report.output is 'a', which is 2 outputs itself \(0, 1\)",
        ),
        (Binary(output="1"), [1, 2], "report.output is '1': the model's outputs are 0, 1"),
        (Binary(output=2), (1, 2), "report.output is 2: the model's outputs are 0, 1"),
        (Regression(output="x"), np.zeros(3), "report.output is 'x', and the model returns one array"),
        (Classification(), np.zeros((3, 1, 2)), r"'label' has shape \[3\] for logits \[3, 1, 2\]"),
        (Binary(), np.zeros((3, 2)), r"outputs \[3, 2\] and labels \[3\] .* must have the same shape"),
        (MultiLabel(), np.zeros(3), "use metrics.Binary"),
        (Classification("other"), np.zeros((3, 2)), "report.label is 'other': the batch has the fields"),
        (Regression(), np.zeros((3, 1)), "must have the same shape"),
        (Classification("target"), np.zeros((3, 2)), "class labels must be integers"),
    ],
)
def test_a_report_that_does_not_fit_is_one_line(report: Any, outputs: Any, message: str) -> None:
    batch = {"label": jnp.zeros(3, int), "target": jnp.zeros(3), "mask": jnp.ones(3, bool)}
    with pytest.raises(InputError, match=message) as raised:
        report(jax.tree.map(jnp.asarray, outputs), batch)
    assert "\n" not in str(raised.value)


def test_means_over_nothing_are_nan_and_not_zero() -> None:
    logits, label = np.zeros((5, 3), np.float32), np.full(5, 255, np.int32)
    for report, outputs in ((Segmentation(ignore=255), logits), (Binary(ignore=255), logits[:, 0])):
        found = figures(report, outputs, label=label)
        means = {
            name: value for name, value in found.items() if name.startswith(("accuracy", "macro", "mean_iou"))
        }
        assert means and all(math.isnan(value) for value in means.values()), means
        assert "labels_left_out" not in found


def test_one_logit_is_no_classification() -> None:
    logits, label = np.zeros((4, 1), np.float32), np.array([0, 1, 1, 0], np.int32)
    with pytest.raises(InputError, match=r"one logit for two classes is reported by metrics.Binary"):
        figures(Classification(), logits, label=label)
    assert figures(Classification(), logits, label=0 * label)["accuracy"] == 1


@pytest.mark.parametrize("bad", [{"threshold": 0.0}, {"threshold": 1.0}])
def test_settings_of_reports_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"report.threshold"):
        Binary(**bad)
    with pytest.raises(InputError, match=r"report.unit is 'word': it must be token or byte"):
        LanguageModel(unit="word")  # type: ignore[arg-type]
