"""Groups of seeds, means, differences, commands, and curves with their bands."""

from __future__ import annotations

import shlex
import statistics

import numpy as np
import pytest
from report_cases import curve, result_of, write_run, write_seeds

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.report import compare
from jaxtrain.report.curves import make_curves, training_seconds
from jaxtrain.report.runs import Reader


def read(*folders):
    return Reader(folders).read().runs


def test_runs_that_differ_in_the_seed_only_are_a_group(tmp_path) -> None:
    seeds = write_seeds(tmp_path)
    other = write_run(tmp_path / "lr", optimizer__lr="0.2", seed="0")
    overfit = write_run(tmp_path / "overfit", record={"overfit": 8})
    groups = compare.group_runs(read(*seeds, other, overfit))
    assert [group.runs for group in groups] == [[0, 1, 2], [3], [4]]
    assert groups[0].label == "lr=0.1" and groups[1].label == "lr"


def test_groups_are_called_by_the_overrides_that_not_all_have(tmp_path) -> None:
    folders = []
    for lr, more in (("0.1", []), ("0.2", ["optimizer.lr=0.2"])):
        for seed in "01":
            record = {"overrides": ["epochs=3", f"seed={seed}", *more]}
            folders.append(write_run(tmp_path / f"{lr}-{seed}", record=record, seed=seed, optimizer__lr=lr))
    labels = [group.label for group in compare.group_runs(read(*folders))]
    assert labels == ["digits", "optimizer.lr=0.2"]


def test_means_and_deviations_are_those_of_the_statistics_module() -> None:
    values = [0.9741, 0.9805, 0.9778, 0.99]
    mean, std = compare.mean_and_std(values)
    assert mean == pytest.approx(statistics.mean(values)) and std == pytest.approx(statistics.stdev(values))
    assert compare.with_deviation([1234.5, 1240.5], 2) == "1,237.5 ± 4.2"
    assert compare.with_deviation([float("nan"), 1.0]) == "not finite (n = 2)"
    assert compare.with_deviation([0.5, 0.5]) == "0.5 ± 0 (n = 2)"


def test_bands_are_the_mean_and_the_deviation_at_each_step(tmp_path) -> None:
    runs = read(*write_seeds(tmp_path))
    band = make_curves(runs, compare.group_runs(runs)).body["groups"][0]["train/loss"]
    losses = np.stack([run.metrics.series("train/loss")[1] for run in runs])
    np.testing.assert_allclose(band["x"], np.arange(1, 41))
    np.testing.assert_allclose(band["mean"], losses.mean(0), rtol=1e-6)
    np.testing.assert_allclose(band["std"], [statistics.stdev(one) for one in losses.T], rtol=1e-6)
    assert band["n"] == 3


def test_a_band_ends_where_the_first_of_its_runs_ends(tmp_path) -> None:
    folders = [write_run(tmp_path / str(n), curve(steps), seed=str(n)) for n, steps in enumerate((40, 25))]
    runs = read(*folders)
    band = make_curves(runs, compare.group_runs(runs)).body["groups"][0]["train/loss"]
    assert band["x"][-1] == 25 and band["std"] == [0] * 25


def test_many_points_are_thinned_and_the_page_says_so(tmp_path) -> None:
    rows = [{"step": n, "train/loss": 1.0 / (n + 1)} for n in range(5000)]
    runs = read(write_run(tmp_path / "run", rows))
    curves = make_curves(runs, compare.group_runs(runs))
    series = curves.body["runs"][0]["series"]["train/loss"]
    assert len(series["x"]) <= 2002 and len(series["mean"]["x"]) == 1000
    assert series["y"][0] == 1 and series["x"][-1] == 4999
    assert "thinned" in curves.notes[0] and "5,000" in curves.notes[0]


def test_training_seconds_follow_from_the_logged_speed(tmp_path) -> None:
    (run,) = read(write_run(tmp_path / "run", curve(10)))
    step, seconds = training_seconds(run)
    np.testing.assert_allclose(seconds, step * 32 / 640)
    (without,) = read(write_run(tmp_path / "without", [{"step": 1, "train/loss": 1.0}]))
    assert len(training_seconds(without)[0]) == 0


def test_figures_of_a_result_with_a_best_checkpoint_come_first(tmp_path) -> None:
    best = {"step": 20, "valid": -0.25, "test": {"loss": 0.3}}
    folder = write_run(tmp_path / "run", result=result_of(0.9, best=best), select="'-loss'")
    (run,) = read(folder)
    figures = compare.figures(run)
    assert list(figures)[:2] == ["valid loss, best", "test loss, best step"]
    assert figures["valid loss, best"] == 0.25 and figures["test accuracy"] == 0.9


def test_the_command_repeats_overrides_mesh_and_flags(tmp_path) -> None:
    record = {
        "overrides": ["optimizer.lr=0.2", "model.widths=(4, 8)"],
        "mesh": {"data": 4, "fsdp": 1, "model": 2},
        "overfit": 8,
        "bits": {"deterministic": True},
        "origin": "/somewhere/my own.py",
        "init_from": ["/runs/a", ["head:tail"]],
    }
    (run,) = read(write_run(tmp_path / "run", record=record))
    assert shlex.split(compare.command(run)) == [
        *("python", "-m", "jaxtrain.run", "--experiment", "/somewhere/my own.py"),
        *("--set", "optimizer.lr=0.2", "--set", "model.widths=(4, 8)", "--overfit", "8"),
        *("--init-from", "/runs/a", "--init-map", "head:tail", "--mesh", "data=4,model=2", "--deterministic"),
    ]


def test_folders_that_are_no_runs_and_damaged_files_are_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for folder, line in (("absent", "does not exist"), ("file", "is a file")):
        with pytest.raises(InputError, match=line):
            Reader([tmp_path / folder])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no run"):
        Reader([tmp_path / "empty"]).read()
    run = write_run(tmp_path / "run")
    for name, text in (("result.json", "{"), ("result.json", "[]"), ("sweep.json", '{"metric": 5}')):
        (run / name).write_text(text)
        with pytest.raises(RunError, match=name):
            Reader([run]).read()
    (run / "sweep.json").write_text('{"metric": "accuracy", "members": []}')
    with pytest.raises(InputError, match="no member of this sweep has started"):
        Reader([run]).read()
