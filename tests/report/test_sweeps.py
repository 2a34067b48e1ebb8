"""Sweeps: order, axes and importance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from report_cases import curve, result_of, write_run, write_sweep

from jaxtrain.report.runs import Reader
from jaxtrain.report.sweeps import coordinates, importance, outcome

RATES = ("0.001", "0.003", "0.01", "0.03", "0.1", "0.3")
GRID = [(lr, model) for lr in RATES for model in ("'a'", "'b'")]


def found(folder):
    runs = Reader([folder]).read()
    return outcome(runs.sweeps[0], runs.runs)


def test_settings_are_ordered_and_seeds_are_averaged(tmp_path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {("0.1", "'a'"): 0.5, ("0.2", "'a'"): 0.75})
    write_run(tmp_path / "again", curve(20), result_of(0.25), optimizer__lr="0.1", seed="1")
    body = json.loads((sweep / "sweep.json").read_text())
    settings = {"optimizer.lr": "0.1", "model": "'a'"}
    body["members"].append({"folder": str(tmp_path / "again"), "settings": settings, "seed": 1})
    body["members"].append({"folder": "not-started", "settings": settings, "seed": 2})
    (sweep / "sweep.json").write_text(json.dumps(body))
    one = found(sweep)
    assert [(s.values["optimizer.lr"], s.mean) for s in one.settings] == [("0.2", 0.75), ("0.1", 0.375)]
    assert (
        one.names == ["optimizer.lr"] and one.repeats and one.waiting == 1 and one.metric == "test accuracy"
    )
    body["metric"] = "-loss"
    (sweep / "sweep.json").write_text(json.dumps(body))
    lowest = found(sweep)
    assert not lowest.higher and [s.mean for s in lowest.settings] == [0.25, 0.625]
    del body["metric"]  # as long as the sweep is running
    (sweep / "sweep.json").write_text(json.dumps(body))
    assert found(sweep).metric == "test accuracy"


def test_lower_is_better_where_the_runs_select_by_the_lowest(tmp_path) -> None:
    """What ``sweep`` writes: the metric without the sign of ``select``, and folders relative to its own."""
    members = []
    for number, lr in enumerate(("0.1", "0.2")):
        config = {"optimizer__lr": lr, "select": "'-loss'"}
        write_run(tmp_path / f"m{number}", curve(10), result_of(0.5 + number / 4), **config)
        members.append({"folder": f"../m{number}", "settings": {"optimizer.lr": lr}, "seed": 0})
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"metric": "loss", "members": members}))
    runs = Reader([tmp_path / "sweep", tmp_path / "m1"]).read()
    assert [run.folder for run in runs.runs] == [tmp_path / "m0", tmp_path / "m1"]
    one = found(tmp_path / "sweep")
    assert one.metric == "test loss" and not one.higher and [s.mean for s in one.settings] == [0.25, 0.5]


def test_a_validation_set_decides_where_there_is_one(tmp_path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {("0.1", "'a'"): 0.5, ("0.2", "'a'"): 0.75})
    for number, value in enumerate((0.9, 0.8)):
        best = {"step": 10, "valid": value, "test": {"accuracy": 0.1}}
        (sweep / f"m{number}" / "metrics.jsonl").write_text('{"step": 1, "valid/accuracy": 0.7}\n')
        (sweep / f"m{number}" / "result.json").write_text(json.dumps(result_of(0.5, best=best)))
    one = found(sweep)
    assert one.metric == "valid accuracy" and [s.mean for s in one.settings] == [0.9, 0.8]


def test_axes_are_logarithmic_where_values_span_orders_of_magnitude(tmp_path) -> None:
    scores = {("0.01", "'a'"): 0.5, ("0.1", "'b'"): 0.75, ("1.0", "'a'"): 1.0}
    axes = {axis["name"]: axis for axis in coordinates(found(write_sweep(tmp_path / "s", scores)))["axes"]}
    assert axes["optimizer.lr"]["log"] and axes["optimizer.lr"]["at"] == [1, 0.5, 0]  # the best first
    assert axes["optimizer.lr"]["ticks"] == [[0, "0.01"], [0.5, "0.1"], [1, "1"]]
    assert axes["model"]["ticks"] == [[0, "'a'"], [1, "'b'"]] and axes["model"]["at"] == [0, 1, 0]
    assert axes["test accuracy"]["at"] == [1, 0.5, 0]


@pytest.mark.full("tests/report/test_sweeps.py::test_importance_is_not_claimed_where_there_is_none")
def test_the_parameter_that_decides_is_the_most_important(tmp_path) -> None:
    by_rate = {(lr, model): 0.1 * RATES.index(lr) for lr, model in GRID}
    matters = importance(found(write_sweep(tmp_path / "a", by_rate)))
    assert matters.why is None and matters.r2 is not None and matters.r2 > 0.5
    assert matters.loss["optimizer.lr"] > 0.5 and abs(matters.loss["model"]) < 0.1
    by_model = {(lr, model): float(model == "'a'") for lr, model in GRID}
    matters = importance(found(write_sweep(tmp_path / "b", by_model)))
    assert matters.loss["model"] > 0.5 and abs(matters.loss["optimizer.lr"]) < 0.1


def test_importance_is_not_claimed_where_there_is_none(tmp_path) -> None:
    few = importance(found(write_sweep(tmp_path / "few", dict.fromkeys(GRID[:7], 0.5))))
    assert few.why == "it needs at least 8 settings with a result, and there are 7" and not few.loss
    same = importance(found(write_sweep(tmp_path / "same", dict.fromkeys(GRID, 0.5))))
    assert same.why == "all settings have the same result"
    rng = np.random.default_rng(0)
    noise = importance(found(write_sweep(tmp_path / "noise", {one: float(rng.random()) for one in GRID})))
    assert noise.why is not None and "no better than their mean" in noise.why and not noise.loss


def test_the_share_of_explained_variance_is_that_of_scikit_learn(tmp_path) -> None:
    from sklearn.metrics import r2_score

    from jaxtrain.report import sweeps

    scores = {(lr, model): 0.1 * RATES.index(lr) + 0.05 * (model == "'a'") for lr, model in GRID}
    one = found(write_sweep(tmp_path / "s", scores))
    inputs = np.array([sweeps.column([s.values[name] for s in one.settings])[0] for name in one.names]).T
    truth = np.array([s.mean for s in one.settings])
    held, shuffled = sweeps._held_out(inputs, truth)
    matters = importance(one)
    assert matters.r2 == pytest.approx(r2_score(truth, held))
    falls = [matters.r2 - np.mean([r2_score(truth, each) for each in of]) for of in shuffled]
    np.testing.assert_allclose(list(matters.loss.values()), falls)
