"""Which runs make up a sweep, and the statistics over their seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from tiny import EXPERIMENT

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.experiment import override
from jaxtrain.sweep.members import Cell, expand, parse_grid
from jaxtrain.sweep.statistics import compare, summarize
from jaxtrain.sweep.table import lines, tabulate


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["optimizer.lr"], "write PATH=V1,V2"),
        (["optimizer.lr="], "write PATH=V1,V2"),
        (["optimizer.lr=0.1,,0.2"], "write PATH=V1,V2"),
        (["=1,2"], "write PATH=V1,V2"),
        (["seed=1,2"], "--seeds N"),
        (["select=accuracy,-loss"], "compares one metric"),
        (["batch=1,2", "batch=3"], "given twice"),
        (["batch=16,16"], "a value is given twice"),
    ],
)
def test_a_grid_of_another_form_is_refused(texts, message):
    with pytest.raises(InputError, match=message):
        parse_grid(texts)


@pytest.mark.parametrize(
    ("grid", "seeds", "message"),
    [
        ({"optimizer.rate": ["1"]}, 1, "optimizer.rate is unknown"),
        ({"batch": ["many"]}, 1, "expected int"),
        ({"optimizer.lr": ["0.1", "1e-1"]}, 1, "are the same experiment"),
        ({}, 0, "1 or more"),
        ({"batch": [str(n) for n in range(1, 200)]}, 100, "more than 10,000"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(grid, seeds, message):
    with pytest.raises(InputError, match=message):
        expand(EXPERIMENT, grid, seeds)


def test_every_combination_has_every_seed_and_its_settings():
    cells = expand(EXPERIMENT, {"batch": ["8", "16"], "optimizer.lr": ["0.5", "0.25"]}, 3)
    assert len(cells) == len({cell.folder_name for cell in cells}) == 12
    for cell in cells:
        settings = [f"{path}={text}" for path, text in cell.settings.items()]
        assert cell.experiment == override(EXPERIMENT, [*settings, f"seed={cell.seed}"])
    assert [cell.seed for cell in cells[:3]] == [EXPERIMENT.seed + n for n in range(3)]


def test_statistics_are_those_of_scipy():
    rng = np.random.default_rng(0)
    values, other = rng.normal(size=7), rng.normal(size=7)
    found = summarize(values.tolist())
    low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    np.testing.assert_allclose([found.mean, found.std], [values.mean(), values.std(ddof=1)])
    np.testing.assert_allclose([found.mean - found.ci95, found.mean + found.ci95], [low, high])
    paired = compare(dict(enumerate(values)), dict(enumerate(other)))
    expected = stats.ttest_rel(values, other)
    interval = expected.confidence_interval()
    np.testing.assert_allclose([paired.mean, paired.p], [(values - other).mean(), expected.pvalue])
    np.testing.assert_allclose(paired.ci95, (interval.high - interval.low) / 2)


def test_only_seeds_that_both_have_are_compared():
    assert compare({0: 1.0}, {1: 2.0}) is None
    assert compare({0: 1.0, 1: 3.0}, {1: 2.5, 2: 9.0}) == (1, 0.5, None, None)
    assert compare({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}).p is None  # no spread
    right, other = {0: 341 / 360, 1: 342 / 360, 2: 344 / 360}, {0: 340 / 360, 1: 341 / 360, 2: 343 / 360}
    assert compare(right, other).p is None  # but for rounding


def cells(values):
    return [Cell({"batch": value}, seed, None) for value in values for seed in (0, 1)]


def test_table_of_test_metrics_leaves_failed_runs_out():
    def outcome(accuracy):
        return {"test": {"accuracy": accuracy, "loss": 1.0}}

    outcomes = [outcome(0.5), outcome(0.7), RunError("loss is nan"), outcome(0.9)]
    table = tabulate(cells(("8", "16")), outcomes, "accuracy")
    first, second = table["settings"]
    assert table["split"] == "test"
    assert first["n"] == 2 and math.isclose(first["mean"], 0.6) and not first["failed"]
    assert second["n"] == 1 and second["std"] is None and second["difference"]["n"] == 1
    assert second["failed"] == [{"seed": 0, "why": "loss is nan"}]
    shown = lines(table)
    assert shown["batch=8"].startswith("accuracy 60.00 ± 14.14 % (95 % interval of the mean ± 127.06, n = 2)")
    assert shown["batch=16"] == "accuracy 90.00 % (n = 1); +20.00 % to the baseline; 1 failed"


def test_settings_are_compared_on_the_validation_set_where_there_is_one():
    def outcome(score, test):
        return {"test": {"loss": 9.0}, "best": {"step": 1, "valid": score, "test": {"loss": test}}}

    outcomes = [outcome(-0.5, 0.6), outcome(-0.25, 0.3), outcome(-0.125, 1.0), outcome(-0.125, 2.0)]
    table = tabulate(cells(("8", "16")), outcomes, "-loss")  # a lower loss is a higher score
    first, second = table["settings"]
    assert (table["split"], table["metric"]) == ("valid", "loss")
    assert first["mean"] == 0.375 and second["mean"] == 0.125
    assert math.isclose(first["test"]["mean"], 0.45) and second["test"]["mean"] == 1.5
    assert second["difference"]["mean"] == -0.25
    assert "test 0.4500" in lines(table)["batch=8"]
    assert lines(table)["compared"] == "loss, lower is better (validation set, best checkpoint)"
