"""jaxtrain.metrics: sums and counts that merge exactly."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import monitor
from jaxtrain.metrics import ClassCounts, ConfusionMatrix, Mean, MeanIoU, RegionCounts, RootMean, merge
from jaxtrain.step.packing import PackedMetrics

RNG = np.random.default_rng(0)
RAGGED = [[4, 8], [3, 3, 5]]  # where to cut ten rows; [3, 3] leaves an empty part


def merged(parts: list[Any]) -> Any:
    return functools.reduce(lambda a, b: a.merge(b), parts)


@pytest.mark.parametrize("cuts", RAGGED)
@pytest.mark.parametrize("shape", [(10,), (10, 2, 2)])
def test_mean_over_ragged_parts_equals_the_mean_over_all(cuts: list[int], shape: tuple[int, ...]) -> None:
    values = RNG.integers(-99, 99, shape).astype(np.float32)
    keep = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0, 1], bool)
    parts = zip(np.split(values, cuts), np.split(keep, cuts), strict=True)
    assert merged([Mean.of(jnp.array(v), jnp.array(k)) for v, k in parts]).compute() == np.mean(
        values[keep], dtype=np.float64
    )
    assert merged([Mean.of(jnp.array(v)) for v in np.split(values, cuts)]).compute() == np.mean(
        values, dtype=np.float64
    )


@pytest.mark.parametrize("mask_type", [bool, np.int32, np.float32])
def test_mean_takes_a_mask_of_the_leading_axes(mask_type: type) -> None:
    values = RNG.integers(-9, 9, (4, 3)).astype(np.float32)
    rows, cells = np.array([1, 0, 1, 1]), RNG.integers(0, 2, (4, 3))
    by_row = Mean.of(jnp.array(values), jnp.array(rows.astype(mask_type)))
    by_cell = Mean.of(jnp.array(values), jnp.array(cells.astype(mask_type)))
    assert by_row.compute() == np.mean(values[rows > 0], dtype=np.float64)
    assert by_cell.compute() == np.mean(values[cells > 0], dtype=np.float64)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_mean_drops_masked_rows_even_nan(poison: float) -> None:
    values = jnp.array([[1.0, 3.0], [poison, poison]])
    assert Mean.of(values, jnp.array([True, False])).compute() == 2.0
    assert not math.isfinite(Mean.of(values).compute())


def test_empty_mean_is_nan_and_merges_without_effect() -> None:
    empty = Mean.of(jnp.array([5.0]), jnp.array([False]))
    assert math.isnan(empty.compute())
    assert math.isnan(Mean.of(jnp.zeros((0,))).compute())
    assert empty.merge(Mean.of(jnp.array([2.0, 4.0]))).compute() == 3.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_])
def test_mean_counts_in_float32_at_least(dtype: Any) -> None:
    ones = Mean.of(jnp.ones(4097, dtype))  # above what half precision can count
    assert ones.total.dtype == ones.count.dtype == jnp.float32
    assert (float(ones.total), float(ones.count)) == (4097.0, 4097.0)


def test_mean_keeps_float64() -> None:
    with jax.enable_x64(True):
        values = jnp.array([1.0, 1e-12, 7.0], jnp.float64)
        for mean in (Mean.of(values[:2]), Mean.of(values, jnp.array([True, True, False]))):
            assert mean.total.dtype == mean.count.dtype == jnp.float64
            assert mean.compute() == (1 + 1e-12) / 2


def test_mean_is_a_pytree_that_passes_through_jit_and_sharding(mesh8: Any) -> None:
    from jaxtrain import sharding

    values = RNG.integers(-9, 9, (16,)).astype(np.float32)
    split = jax.device_put(values, sharding.batch_split(mesh8))
    found = jax.jit(Mean.of)(split)
    assert isinstance(found, Mean)
    assert found.compute() == np.mean(values, dtype=np.float64)


def reference(predicted: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    counts = np.zeros((classes, classes), int)
    for truth, guess in zip(label.ravel(), predicted.ravel(), strict=True):
        counts[truth, guess] += 1
    return counts


def by_class(counts: np.ndarray) -> dict[str, Any]:
    """The figures of a confusion matrix."""
    return RegionCounts(np.diag(counts), counts.sum(0), counts.sum(1)).compute()


@pytest.mark.full("[shape0-cuts0]")
@pytest.mark.parametrize("cuts", RAGGED)
@pytest.mark.parametrize("shape", [(10,), (10, 3)])
def test_confusion_matrix_over_ragged_parts_equals_that_over_all(
    cuts: list[int], shape: tuple[int, ...]
) -> None:
    logits = RNG.normal(size=(*shape, 4)).astype(np.float32)
    label = RNG.integers(0, 4, shape).astype(np.int32)
    keep = RNG.integers(0, 2, 10).astype(bool)
    logits[~keep] = np.nan
    parts = zip(*(np.split(a, cuts) for a in (logits, label, keep)), strict=True)
    found = merged([ConfusionMatrix.of(*map(jnp.array, part)) for part in parts])
    np.testing.assert_array_equal(found.counts, reference(logits.argmax(-1)[keep], label[keep], 4))


def test_confusion_matrix_without_a_mask_counts_every_row() -> None:
    logits, label = RNG.normal(size=(50, 3)).astype(np.float32), RNG.integers(0, 3, 50)
    found = ConfusionMatrix.of(jnp.array(logits), jnp.array(label, jnp.int32))
    np.testing.assert_array_equal(found.counts, reference(logits.argmax(-1), label, 3))


def test_figures_by_class_equal_their_definitions() -> None:
    counts = np.array([[5, 2, 0], [1, 7, 0], [3, 1, 0]])  # class 2 is never predicted
    found = by_class(counts)
    assert found["accuracy"] == 12 / 19
    np.testing.assert_allclose(found["precision"], [5 / 9, 7 / 10, 0], rtol=1e-15)
    np.testing.assert_allclose(found["recall"], [5 / 7, 7 / 8, 0], rtol=1e-15)
    np.testing.assert_allclose(found["f1"], [10 / 16, 14 / 18, 0], rtol=1e-15)
    np.testing.assert_allclose(found["iou"], [5 / 11, 7 / 11, 0], rtol=1e-15)
    assert found["mean_iou"] == pytest.approx((5 / 11 + 7 / 11) / 3, rel=1e-15)


@pytest.mark.parametrize("extra", ["neither", "true", "predicted"])
def test_mean_iou_is_over_the_classes_that_occur_on_either_side(extra: str) -> None:
    counts = np.zeros((4, 4), int)
    counts[:2, :2] = [[6, 2], [0, 4]]
    each = [6 / 8, 4 / 6]
    if extra != "neither":  # class 3 is once the truth or once the guess, and never both
        counts[(3, 0) if extra == "true" else (0, 3)] = 1
        each = [6 / 9, 4 / 6, 0]
    found = by_class(counts)["mean_iou"]
    assert type(found) is float and found == pytest.approx(np.mean(each), rel=1e-15)
    assert MeanIoU(np.diag(counts), counts.sum(0), counts.sum(1)).compute() == found


@pytest.mark.full("tests/metrics/test_metrics.py::test_confusion_matrix_without_a_mask_counts_every_row")
def test_counts_take_class_maps_of_uint8() -> None:
    logits, label = RNG.normal(size=(2, 5, 6, 30)).astype(np.float32), RNG.integers(0, 30, (2, 5, 6))
    found = ConfusionMatrix.of(jnp.array(logits), jnp.array(label, jnp.uint8))
    np.testing.assert_array_equal(found.counts, reference(logits.argmax(-1), label, 30))


def test_root_mean_is_the_root_over_all_and_not_the_mean_of_roots() -> None:
    squares = np.array([1.0, 9.0, 4.0, 100.0], np.float32)
    parts = [RootMean.of(jnp.array(squares[:3])), RootMean.of(jnp.array(squares[3:]))]
    both = merged(parts)
    assert type(both) is RootMean and type(merged([Mean(1.0, 1.0), Mean(1.0, 1.0)])) is Mean
    assert both.compute() == math.sqrt(114 / 4)
    assert math.isnan(RootMean.of(jnp.array([5.0]), jnp.array([False])).compute())


def test_every_metric_merges_on_the_host() -> None:
    logits, label = RNG.normal(size=(3, 8, 4)).astype(np.float32), RNG.integers(0, 4, (3, 8))

    @jax.jit
    def step(logits: Any, label: Any) -> dict[str, Any]:
        hit = (logits.argmax(-1) == label).astype(jnp.float32)
        kinds = {"mean": Mean, "root": RootMean}
        means = {name: kind.of(hit) for name, kind in kinds.items()}
        counted = {"iou": MeanIoU.of(logits, label), "all": RegionCounts.of(logits, label)}
        return {**means, **counted}

    batches = [step(*batch) for batch in zip(logits, label.astype(np.int32), strict=True)]
    found = monitor.merge_all(PackedMetrics.of(metrics).rows()[0] for metrics in batches)
    wanted = by_class(reference(logits.argmax(-1), label, 4))
    assert found["mean"] == wanted["accuracy"] and found["root"] == math.sqrt(wanted["accuracy"])
    assert type(found["iou"]) is float and found["iou"] == wanted["mean_iou"] == found["all"]["mean_iou"]


def test_counts_of_an_epoch_may_exceed_int32() -> None:
    half = np.array([[2**30, 0], [0, 2**30]], np.int32)
    assert merged([ConfusionMatrix(half)] * 5).counts.tolist() == [[5 * 2**30, 0], [0, 5 * 2**30]]
    counts = merged([ClassCounts(half[0], half[0], half[0])] * 5)
    assert counts.hits.tolist() == counts.actual.tolist() == [5 * 2**30, 0]


def test_means_over_nothing_are_nan_and_figures_by_class_zero() -> None:
    found = by_class(np.zeros((2, 2), np.int32))
    assert math.isnan(found["accuracy"]) and math.isnan(found["mean_iou"])
    assert not np.any([found["precision"], found["recall"], found["f1"], found["iou"]])


def test_merge_is_by_name_and_starts_from_none() -> None:
    first = {"loss": Mean(2.0, 1.0), "hits": ConfusionMatrix(np.eye(2, dtype=int))}
    assert merge(None, first)["loss"] == first["loss"]
    both = merge(merge(None, first), {"loss": Mean(4.0, 2.0), "hits": ConfusionMatrix(np.ones((2, 2), int))})
    assert both["loss"] == Mean(6.0, 3.0)
    assert both["hits"].counts.tolist() == [[2, 1], [1, 2]]
