"""jaxtrain.data.order: batch k is a pure function of (seed, k), and every epoch visits each example once."""

from __future__ import annotations

import itertools
import zlib
from typing import Any

import numpy as np
import pytest

from jaxtrain.core.errors import InputError
from jaxtrain.data.order import Order, Sequential, holdout, permutation

SIZES = [(1, 1), (7, 7), (7, 2), (10, 3), (3, 10), (2, 5), (100, 32)]


def stream(order: Order, steps: int) -> np.ndarray:
    return np.concatenate([order.indices(step) for step in range(steps)])


def crc(values: np.ndarray) -> int:
    return zlib.crc32(values.astype("<i8").tobytes())


@pytest.mark.parametrize(("n", "batch"), SIZES)
@pytest.mark.parametrize("seed", [0, -5, 2**40])
def test_batches_are_concatenated_permutations(seed: int, n: int, batch: int) -> None:
    order, epochs = Order(seed, n, batch), 4
    visited = stream(order, -(-epochs * n // batch))[: epochs * n].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(visited), np.tile(np.arange(n), (epochs, 1)))


@pytest.mark.parametrize(("n", "batch"), [(n, batch) for n, batch in SIZES if batch <= n])
def test_drop_remainder_truncates_permutations(n: int, batch: int) -> None:
    order, per_epoch = Order(0, n, batch, True), n // batch
    visited = stream(order, 4 * per_epoch).reshape(4, per_epoch * batch)
    for epoch, row in enumerate(visited):
        assert len(np.unique(row)) == per_epoch * batch
        np.testing.assert_array_equal(row, permutation(0, epoch, n)[: per_epoch * batch])


def test_dropped_examples_differ_between_epochs() -> None:
    order = Order(0, 10, 4, True)
    left = {frozenset(range(10)) - {*order.indices(2 * e), *order.indices(2 * e + 1)} for e in range(4)}
    assert all(len(ids) == 2 for ids in left)
    assert len(left) > 1


@pytest.mark.parametrize("drop_remainder", [False, True])
@pytest.mark.parametrize(("n", "batch"), [(10, 3), (7, 7)])
def test_every_batch_is_full_and_int64(n: int, batch: int, drop_remainder: Any) -> None:
    for step in range(20):
        ids = Order(0, n, batch, drop_remainder).indices(step)
        assert ids.shape == (batch,) and ids.dtype == np.int64
        assert ids.min() >= 0 and ids.max() < n


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_batch_does_not_depend_on_earlier_calls(drop_remainder: Any) -> None:
    order, steps = Order(3, 10, 4, drop_remainder), list(range(30))
    forwards = {step: order.indices(step).tolist() for step in steps}
    np.random.default_rng(0).shuffle(steps)
    for step in steps:
        permutation.cache_clear()
        assert Order(3, 10, 4, drop_remainder).indices(step).tolist() == forwards[step]


def test_batch_is_read_only() -> None:
    order = Order(0, 4, 4)
    with pytest.raises(ValueError, match="read-only"):
        order.indices(0)[:] = 0
    assert sorted(order.indices(0).tolist()) == [0, 1, 2, 3]


def test_late_step_costs_one_permutation() -> None:
    assert sorted(Order(0, 5, 5).indices(10**15).tolist()) == [0, 1, 2, 3, 4]


def test_permutations_differ_between_seeds_and_epochs() -> None:
    seen = [permutation(seed, epoch, 20).tobytes() for seed in range(-3, 30) for epoch in range(30)]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("n", [8, 50])
def test_no_two_consecutive_epochs_are_equal(n: int) -> None:
    epochs = [permutation(0, epoch, n).tobytes() for epoch in range(200)]
    assert all(a != b for a, b in itertools.pairwise(epochs))


@pytest.mark.parametrize(
    ("seed", "epoch", "n", "expected"),
    [
        (0, 0, 10, 9477157),
        (0, 1, 1437, 811874625),
        (1, 0, 50_000, 3380463790),
        (-1, 3, 60_000, 1300474708),
        (2**31 - 1, -1, 1000, 310592093),
    ],
)
def test_permutations_never_change(seed: int, epoch: int, n: int, expected: int) -> None:
    """Never update these: a resumed run of an older version would get other batches."""
    assert crc(permutation(seed, epoch, n)) == expected


def test_batches_never_change() -> None:
    """Never update these either: they fix where batches start."""
    assert crc(stream(Order(7, 100, 32), 50)) == 2269748630
    assert crc(stream(Order(7, 100, 32, True), 50)) == 1106100308


def test_every_example_is_equally_likely_at_every_position() -> None:
    n, epochs = 5, 3000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), permutation(0, epoch, n)] += 1
    expected = epochs / n
    assert ((counts - expected) ** 2 / expected).sum() < 40  # chi-squared, 16 degrees: p = 0.001


def test_every_permutation_is_equally_likely_over_seeds_and_epochs() -> None:
    counts: dict[bytes, int] = {}
    for seed, epoch in itertools.product(range(50), range(60)):
        found = permutation(seed, epoch, 4).tobytes()
        counts[found] = counts.get(found, 0) + 1
    expected = 3000 / 24
    assert len(counts) == 24
    assert sum((c - expected) ** 2 / expected for c in counts.values()) < 50  # 23 degrees: p = 0.001


@pytest.mark.parametrize(
    ("n", "batch", "drop_remainder", "epochs", "steps"),
    [
        (10, 1, False, 0.1, 1),
        (10, 1, False, 0.3, 3),  # 3.0000000000000004 in doubles elsewhere
        (1000, 1, False, 1.1, 1100),
        (10, 3, False, 1, 4),
        (10, 3, False, 3, 10),
        (10, 3, True, 1, 3),
        (10, 3, True, 0.5, 2),
        (10, 10, False, 2.0, 2),
        (3, 10, False, 1, 1),
        (50_000, 1024, True, 9.9, 476),
        (50_000, 1024, False, 9.9, 484),
        (50_000, 512, False, 60, 5860),
        (50_000, 512, True, 60, 5820),
        (10, 1, False, 1e-9, 1),
        (10, 10, False, np.float64(0.1), 1),
    ],
)
def test_steps_of_fractional_epochs(
    n: int, batch: int, drop_remainder: Any, epochs: float, steps: int
) -> None:
    assert Order(0, n, batch, drop_remainder).steps(epochs) == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1), "batches of 1 from 0 examples"),
        ((0, 5, 0), "batches of 0 from 5 examples"),
        ((0, 5, -2), "batches of -2"),
        ((0, 3, 10, True), "no batch of 10 in 3 examples"),
    ],
)
def test_orders_without_a_batch_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Order(*arguments)


BATCH = 4


@pytest.mark.parametrize("n", [1, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH])
def test_sequential_visits_each_example_once_and_masks_the_padding(n: int) -> None:
    rows = Sequential(n, BATCH)
    parts = [rows.rows(step) for step in range(len(rows))]
    assert len(parts) == -(-n // BATCH)
    for ids, mask in parts:
        assert ids.shape == mask.shape == (BATCH,) and mask.dtype == bool
        assert ids.min() >= 0 and ids.max() < n, "padding must be gatherable"
        assert mask.any()
    visited = np.concatenate([ids[mask] for ids, mask in parts])
    np.testing.assert_array_equal(visited, np.arange(n))


@pytest.mark.parametrize(("n", "part", "count"), [(10, 0.2, 2), (10, 3, 3), (1437, 0.1, 144), (2, 0.5, 1)])
@pytest.mark.parametrize("seed", [0, 9])
def test_holdout_is_a_sorted_disjoint_complete_split(n: int, part: float, count: int, seed: int) -> None:
    train, valid = holdout(n, part, seed)
    assert len(valid) == count
    np.testing.assert_array_equal(np.sort(np.concatenate([train, valid])), np.arange(n))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(valid) > 0)


def test_holdout_is_fixed_by_its_seed_and_random() -> None:
    first = holdout(1000, 0.1)[1]
    permutation.cache_clear()
    np.testing.assert_array_equal(holdout(1000, 0.1)[1], first)
    assert crc(first) == 2363226796  # never update: resumed runs would validate on training examples
    other = holdout(1000, 0.1, seed=1)[1]
    assert 0 < len(np.intersect1d(first, other)) < 40
    assert 300 < first.mean() < 700


def test_a_larger_holdout_contains_the_smaller() -> None:
    assert set(holdout(100, 10)[1]) < set(holdout(100, 30)[1])


@pytest.mark.parametrize("seed", [0, 1])
def test_holdout_is_independent_of_the_epochs(seed: int) -> None:
    valid = set(holdout(50, 10)[1].tolist())
    assert all(set(permutation(seed, epoch, 50)[:10].tolist()) != valid for epoch in range(100))


def test_holdout_is_the_same_for_all_run_seeds(mesh1: Any) -> None:
    from jaxtrain import data, losses, models, optim
    from jaxtrain.experiment import Experiment
    from jaxtrain.program.splits import open_sources

    def validation_images(seed: int) -> np.ndarray:
        source = data.Synthetic(n=40, shape=(2, 2, 1))
        experiment = Experiment(
            model=models.MLP(),
            train=source,
            test=source,
            loss=losses.CrossEntropy(),
            optimizer=optim.SGD(0.1),
            batch=8,
            epochs=1,
            holdout=0.25,
            seed=seed,
        )
        sources = open_sources(experiment, mesh1)
        assert (len(sources["train"]), len(sources["valid"])) == (30, 10)
        return sources["valid"].gather(np.arange(10))["image"]

    np.testing.assert_array_equal(validation_images(0), validation_images(1))


@pytest.mark.parametrize("part", [0, 1.0e-3, 10, 11, 2.5, -1, -0.2, 0.99])
def test_holdout_of_nothing_or_everything_is_refused(part: float) -> None:
    with pytest.raises(InputError, match="holdout="):
        holdout(10, part)
