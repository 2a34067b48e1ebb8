"""Figures of collected rows are those of scikit-learn, also for repeated examples."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from jaxtrain import metrics
from jaxtrain.core.errors import InputError
from jaxtrain.evaluation.bootstrap import Bootstrap
from jaxtrain.evaluation.calibration import BINS, Reliability
from jaxtrain.evaluation.collect import ROWS, Collect, example_rows
from jaxtrain.evaluation.figures import Figures, figures_of
from jaxtrain.evaluation.groups import group_figures, largest_gaps
from jaxtrain.evaluation.ranking import Ranking
from jaxtrain.evaluation.report import make_report
from jaxtrain.metrics.figures import REPORT
from jaxtrain.metrics.rows import Rows

N, CLASSES = 240, 7
RNG = np.random.default_rng(0)
LABEL = RNG.integers(0, CLASSES, N)
LOGITS = (
    (RNG.normal(size=(N, CLASSES)) + 1.5 * np.eye(CLASSES)[LABEL]).round(1).astype(np.float32)
)  # with ties
WEIGHT = RNG.integers(0, 4, N)
CLOSE = functools.partial(pytest.approx, rel=1e-5, abs=1e-7)


def rows_of(report: Any, outputs: Any, **batch: Any) -> dict[str, np.ndarray]:
    """Return what is collected of a batch, as an evaluation returns it."""
    batch = {name: jnp.asarray(x) for name, x in {**batch, "mask": np.ones(len(outputs), bool)}.items()}
    found = jax.jit(lambda outputs, batch: example_rows(report, outputs, batch, True))(outputs, batch)
    return {name: np.asarray(x) for name, x in found.items()}


def repeated(weight: np.ndarray | None) -> np.ndarray:
    """Return the examples of a bootstrap weighting, each repeated by its weight."""
    return np.arange(N) if weight is None else np.repeat(np.arange(N), weight)


@functools.cache
def classes() -> Figures:
    return figures_of(metrics.Classification(), rows_of(metrics.Classification(), LOGITS, label=LABEL))


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_classification(weight: np.ndarray | None) -> None:
    found, ids = classes().numbers(weight), repeated(weight)
    label, logits = LABEL[ids], LOGITS[ids].astype(np.float64)
    guess, share = logits.argmax(-1), np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    share /= share.sum(-1, keepdims=True)
    for average in ("macro", "micro", "weighted"):
        precision, recall, f1, _ = sk.precision_recall_fscore_support(label, guess, average=average)
        assert found[f"{average}_precision"] == CLOSE(precision)
        assert found[f"{average}_recall"] == CLOSE(recall) and found[f"{average}_f1"] == CLOSE(f1)
    for average in ("macro", "weighted"):
        auroc = sk.roc_auc_score(label, share, multi_class="ovr", average=average)
        assert found[f"{average}_auroc"] == CLOSE(auroc)
        precision = sk.average_precision_score(label, share, average=average)
        assert found[f"{average}_average_precision"] == CLOSE(precision)
    assert found["accuracy"] == CLOSE(sk.accuracy_score(label, guess))
    assert found["log_loss"] == CLOSE(sk.log_loss(label, share))
    distinct = np.array([len(set(row)) == CLASSES for row in LOGITS])[
        ids
    ]  # scikit-learn orders ties its own way
    top5 = np.asarray(
        sk.top_k_accuracy_score(label, logits, k=5, normalize=False, sample_weight=1.0 * distinct)
    )
    rank = (logits > logits[np.arange(len(ids)), label][:, None]).sum(-1)
    assert top5 == (rank[distinct] < 5).sum() and found["top5"] <= (rank < 5).mean()


def test_figures_by_class_and_calibration() -> None:
    tables, right = classes().tables(), LOGITS.argmax(-1) == LABEL
    share = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    for k in range(CLASSES):
        assert tables["auroc"][k] == CLOSE(sk.roc_auc_score(k == LABEL, share[:, k]))
        assert tables["average_precision"][k] == CLOSE(sk.average_precision_score(k == LABEL, share[:, k]))
    curve = tables["reliability"]
    accuracy, probability = calibration_curve(right, share.max(-1), n_bins=BINS)
    seen = curve["examples"] > 0
    np.testing.assert_allclose(curve["accuracy"][seen], accuracy, rtol=1e-6)
    np.testing.assert_allclose(curve["probability"][seen], probability, rtol=1e-5)
    assert np.isnan(curve["accuracy"][~seen]).all() and curve["examples"].sum() == N
    gaps = np.abs(accuracy - probability) @ curve["examples"][seen] / N
    assert classes().numbers()["ece"] == CLOSE(gaps)


def test_a_class_without_examples_has_no_auroc_and_no_zero_either() -> None:
    report, label = metrics.Classification(), np.where(LABEL == 3, 2, LABEL)
    figures = figures_of(report, rows_of(report, LOGITS, label=label))
    found, tables = figures.numbers(), figures.tables()
    assert np.isnan([found["macro_auroc"], found["weighted_auroc"], tables["auroc"][3]]).all()
    assert np.isnan([found["macro_average_precision"], tables["average_precision"][3]]).all()
    assert not np.isnan(tables["auroc"][[0, 1, 2, 4, 5, 6]]).any()


def test_ignored_labels_count_nowhere() -> None:
    report, label = metrics.Classification(ignore=-1), np.where(LABEL == 3, -1, LABEL)
    found = figures_of(report, rows_of(report, LOGITS, label=label)).numbers()
    kept = label >= 0
    assert found["accuracy"] == CLOSE(sk.accuracy_score(LABEL[kept], LOGITS.argmax(-1)[kept]))
    weight = kept.astype(int)
    expected = classes().numbers(weight)
    assert {k: found[k] for k in ("ece", "log_loss", "macro_f1")} == {
        k: CLOSE(expected[k]) for k in ("ece", "log_loss", "macro_f1")
    }


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_binary(weight: np.ndarray | None) -> None:
    report, logit, label = metrics.Binary(threshold=0.4), LOGITS[:, :1], (LABEL == 0).astype(np.int32)
    found, ids = figures_of(report, rows_of(report, logit, label=label)).numbers(weight), repeated(weight)
    share = 1 / (1 + np.exp(-logit[ids, 0].astype(np.float64)))
    guess, label = share > 0.4, label[ids]
    assert found["auroc"] == CLOSE(sk.roc_auc_score(label, share))
    assert found["average_precision"] == CLOSE(sk.average_precision_score(label, share))
    assert found["f1"] == CLOSE(sk.f1_score(label, guess))
    assert found["precision"] == CLOSE(sk.precision_score(label, guess))
    assert found["accuracy"] == CLOSE(sk.accuracy_score(label, guess))
    assert found["log_loss"] == CLOSE(sk.log_loss(label, share))


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_multi_label(weight: np.ndarray | None) -> None:
    report = metrics.MultiLabel()
    logit, label = LOGITS[:, :4], (np.random.default_rng(1).random((N, 4)) < 0.4).astype(np.int32)
    label |= LOGITS[:, :4] > 1.5
    figures, ids = figures_of(report, rows_of(report, logit, label=label)), repeated(weight)
    found = figures.numbers(weight)
    share, label = 1 / (1 + np.exp(-logit[ids].astype(np.float64))), label[ids]
    for average in ("macro", "micro", "weighted"):
        assert found[f"{average}_auroc"] == CLOSE(sk.roc_auc_score(label, share, average=average))
        expected = sk.average_precision_score(label, share, average=average)
        assert found[f"{average}_average_precision"] == CLOSE(expected)
        assert found[f"{average}_f1"] == CLOSE(sk.f1_score(label, share > 0.5, average=average))
    assert found["exact_match"] == CLOSE(sk.accuracy_score(label, share > 0.5))
    if weight is None:
        by_label = sk.roc_auc_score(label, share, average=None)
        np.testing.assert_allclose(figures.tables()["auroc"], by_label, rtol=1e-6)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_regression_of_several_outputs(weight: np.ndarray | None) -> None:
    report, target = metrics.Regression(), 10_000 + RNG.normal(size=(N, 3)).astype(np.float32)
    guess = target + 0.3 * RNG.normal(size=(N, 3)).astype(np.float32)
    found = figures_of(report, rows_of(report, guess, target=target)).numbers(weight)
    target, guess = target[repeated(weight)].astype(np.float64), guess[repeated(weight)].astype(np.float64)
    assert found["r2"] == CLOSE(sk.r2_score(target, guess))
    assert found["mae"] == CLOSE(sk.mean_absolute_error(target, guess))
    assert found["mse"] == CLOSE(sk.mean_squared_error(target, guess))
    assert found["rmse"] == CLOSE(np.sqrt(sk.mean_squared_error(target, guess)))


@pytest.mark.parametrize("weight", [None, WEIGHT[:24]])
def test_segmentation_sums_the_pixels_of_the_examples(weight: np.ndarray | None) -> None:
    report = metrics.Segmentation(ignore=255)
    logits, label = LOGITS.reshape(24, 5, 2, CLASSES), LABEL.reshape(24, 5, 2).copy()
    label[0, 0] = 255
    figures = figures_of(report, rows_of(report, logits, label=label))
    ids = np.arange(24) if weight is None else np.repeat(np.arange(24), weight)
    truth, guess = label[ids].reshape(-1), logits.argmax(-1)[ids].reshape(-1)
    truth, guess = truth[truth != 255], guess[truth != 255]
    found = figures.numbers(weight)
    assert found["mean_iou"] == CLOSE(sk.jaccard_score(truth, guess, average="macro"))
    assert found["weighted_f1"] == CLOSE(sk.f1_score(truth, guess, average="weighted"))
    share = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).max(-1)[ids].reshape(-1)
    share = share[label[ids].reshape(-1) != 255]
    assert found["ece"] == CLOSE(Reliability.of(share, truth == guess).ece())


def test_language_model() -> None:
    report = metrics.LanguageModel(unit="byte", ignore=-1)
    logits, label = LOGITS.reshape(24, 10, CLASSES), LABEL.reshape(24, 10).copy()
    label[3, 5:] = -1
    weight = WEIGHT[:24]
    figures = figures_of(report, rows_of(report, logits, label=label))
    ids = np.repeat(np.arange(24), weight)
    truth = label[ids].reshape(-1)
    share = np.exp(logits[ids].reshape(-1, CLASSES).astype(np.float64))[truth >= 0]
    share /= share.sum(-1, keepdims=True)
    loss = sk.log_loss(truth[truth >= 0], share, labels=range(CLASSES))
    found = figures.numbers(weight)
    assert found == {"perplexity": CLOSE(np.exp(loss)), "bits_per_byte": CLOSE(loss / np.log(2))}


def test_rankings_of_degenerate_scores() -> None:
    label = np.array([1, 0, 1, 0]) > 0
    assert Ranking(np.zeros(4), label).auroc() == sk.roc_auc_score(label, np.zeros(4)) == 0.5
    assert Ranking(np.zeros(4), label).average_precision() == sk.average_precision_score(label, np.zeros(4))
    assert np.isnan(Ranking(np.array([0, np.nan, 1, 2]), label).auroc())
    assert np.isnan(Ranking(np.zeros(0), np.zeros(0, bool)).auroc())
    assert np.isnan(Ranking(np.arange(4.0), np.ones(4, bool)).auroc())
    assert Ranking(np.array([-np.inf, -1.0, 0.0, 0.0]), label).auroc() == 0.375


def test_intervals_cover_the_figure_and_depend_on_seed_and_number_only() -> None:
    bootstrap = Bootstrap(resamples=200)
    low, high = bootstrap.intervals(classes(), N)["accuracy"]
    accuracy = classes().numbers()["accuracy"]
    spread = np.sqrt(accuracy * (1 - accuracy) / N)  # of a share: the intervals must be near those of theory
    assert low < accuracy < high and (high - low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.2)
    weights = bootstrap.weights(N, 5)
    np.testing.assert_array_equal(weights, Bootstrap(resamples=7).weights(N, 5))
    assert weights.sum() == N and (weights != bootstrap.weights(N, 6)).any()
    assert (weights != Bootstrap(seed=1).weights(N, 5)).any() and (
        weights != bootstrap.weights(N, 5, 1)
    ).any()


def test_a_figure_that_is_undefined_in_some_resamples_has_an_interval_of_the_others() -> None:
    report, label = metrics.Binary(), np.r_[1, np.zeros(19)].astype(np.int32)
    figures = figures_of(report, rows_of(report, LOGITS[:20, :1], label=label))
    low, high = Bootstrap(resamples=50).intervals(figures, 20)["auroc"]
    assert 0 <= low <= figures.numbers()["auroc"] <= high <= 1
    nothing = figures_of(report, rows_of(report, LOGITS[:20, :1], label=0 * label))
    assert np.isnan(Bootstrap(resamples=50).intervals(nothing, 20)["auroc"]).all()


def test_groups_have_the_figures_of_their_examples() -> None:
    report, group = metrics.Classification(), np.arange(N) % 3
    rows = rows_of(report, LOGITS, label=LABEL)
    groups = group_figures(report, rows, group, "g", Bootstrap(resamples=20))
    assert [(one.name, one.examples) for one in groups] == [("0", 80), ("1", 80), ("2", 80)]
    accuracies = [sk.accuracy_score(LABEL[group == k], LOGITS.argmax(-1)[group == k]) for k in range(3)]
    assert [one.figures["accuracy"] for one in groups] == CLOSE(accuracies)
    assert all(one.intervals["accuracy"][0] <= one.figures["accuracy"] for one in groups)
    gap = largest_gaps(groups)["accuracy"]
    assert gap.size == CLOSE(max(accuracies) - min(accuracies))
    assert (int(gap.lowest), int(gap.highest)) == (np.argmin(accuracies), np.argmax(accuracies))
    with pytest.raises(InputError, match="240 values of it, and at most 100 groups"):
        group_figures(report, rows, np.arange(N), "id", Bootstrap(resamples=1))


def test_an_interval_is_that_of_the_figure_of_its_name() -> None:
    """The loss reports another accuracy, and the same cross-entropy as ``loss``."""
    report = metrics.Classification()
    rows = {"example_id": np.arange(N), **rows_of(report, LOGITS, label=LABEL)}
    own = classes().numbers()
    values = {"loss": own["log_loss"], "accuracy": 0.25, REPORT: {"accuracy": own["accuracy"]}, ROWS: rows}
    made, _ = make_report(report, values, ci=Bootstrap(resamples=20))
    assert made.figures["report_accuracy"] == own["accuracy"] and "log_loss" not in made.figures
    assert "accuracy" not in made.intervals and "log_loss" not in made.intervals
    for name, figure in (("report_accuracy", own["accuracy"]), ("loss", own["log_loss"])):
        low, high = made.intervals[name]
        assert low <= figure <= high


def test_what_is_collected_is_bounded() -> None:
    batch = {"label": jnp.asarray(LABEL), "mask": jnp.ones(N, bool), "example_id": jnp.arange(N)}
    report = metrics.Classification()

    def collected(limit: int) -> dict[str, Any] | None:
        found = jax.jit(Collect(report, examples=N, limit=limit))(jnp.asarray(LOGITS), batch).get(ROWS)
        return None if found is None else jax.tree.map(np.asarray, found).compute()

    assert "scores" in (collected(N * (5 + CLASSES)) or {})
    without = collected(N * (5 + CLASSES) - 1)
    assert without is not None and "scores" not in without
    assert collected(N * 5 - 1) is None
    numbers = figures_of(report, without).numbers()
    assert "macro_auroc" not in numbers and numbers["top5"] == classes().numbers()["top5"]


def test_rows_are_in_order_and_without_padding() -> None:
    def part(first: int, rows: int) -> Rows:
        values = {"x": jnp.where(jnp.arange(4) < rows, first + jnp.arange(4), 99)}
        return jax.tree.map(np.asarray, Rows.of(values, jnp.arange(4) < rows))

    assert part(0, 4).merge(part(4, 4)).merge(part(8, 1)).compute()["x"].tolist() == list(range(9))
