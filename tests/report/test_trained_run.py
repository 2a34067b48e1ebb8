"""A run that was trained and evaluated, as it is in a report."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from conftest import ROOT
from sklearn.metrics import confusion_matrix
from test_page import Parsed

from jaxtrain import run
from jaxtrain.cli import evaluate, report


@pytest.mark.full("tests/report/test_page.py")
def test_curves_the_matrix_and_mistakes_of_a_trained_run(tmp_path, capsys) -> None:
    folder, experiment = str(tmp_path / "run"), str(ROOT / "experiments" / "digits_cnn.py")
    sets = ["--set", "epochs=2", "--set", "eval_every=1", "--set", "log_every=5", "--set", "holdout=100"]
    assert run.main(["--experiment", experiment, *sets, "--workdir", folder, "--devices", "1"]) == 0
    assert evaluate.main(["--workdir", folder, "--devices", "1", "--mistakes", "--csv"]) == 0
    assert report.main([folder]) == 0
    parsed = Parsed((tmp_path / "run" / "report.html").read_text())
    (path,) = (tmp_path / "run" / "evaluation").glob("*/examples.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    counts = confusion_matrix([row["label"] for row in rows], [row["prediction"] for row in rows])
    np.testing.assert_array_equal(parsed.data["matrices"][0]["matrix"], counts)
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    worst = max(wrong, key=lambda row: float(row["probability"]))
    percent = f"{100 * float(worst['probability']):.1f} %"
    assert parsed.row(worst["id"]) == [worst["id"], worst["label"], worst["prediction"], percent]
    assert [tag for tag, _ in parsed.tags].count("img") == 1
    names = {name for chart in parsed.data["charts"] for name in chart["series"]}
    assert {"train/loss", "valid/accuracy", "test/accuracy", "examples_per_second", "learning_rate"} <= names
    header = next(row for row in parsed.cells if row[0] == "run")
    assert "valid accuracy, best" in header and "test accuracy, best step" in header
    assert "--set epochs=2 --set eval_every=1 --set log_every=5 --set holdout=100" in parsed.text
