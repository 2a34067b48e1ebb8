"""``python -m jaxtrain export`` and ``predict``: from a run to a file and to predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from jaxtrain import artifact, run
from jaxtrain.cli import export, predict
from jaxtrain.core.errors import InputError

TINY = str(ROOT / "tests" / "tiny.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("export") / "run"
    args = ["--experiment", TINY, "--workdir", str(folder), "--devices", "1", "--set", "eval_every=none"]
    assert run.main(args) == 0
    return folder


@pytest.fixture
def export_run(folder: Path, tmp_path: Path, capsys: Any) -> Any:
    def call(*args: str, out: str = "model.jaxtrain") -> tuple[int, str, str]:
        common = ["--workdir", str(folder), "--experiment", TINY, "--out", str(tmp_path / out)]
        code = export.main([*common, *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_run_becomes_a_file_that_predicts_as_evaluate_measured(export_run, folder, tmp_path, capsys):
    code, out, _ = export_run()
    assert code == 0 and "tiny, step 13," in out and "checked on 16 test examples" in out, out
    model = artifact.load(tmp_path / "model.jaxtrain")
    result = json.loads((folder / "result.json").read_text())
    assert model.manifest.metrics == {"test": result["test"]}
    assert model.manifest.config["optimizer.lr.peak"] == "0.1"
    import tiny

    fields = tiny.EXPERIMENT.test.fields
    np.save(tmp_path / "test.npy", fields["image"])
    capsys.readouterr()
    assert predict.main(["--model", str(tmp_path / "model.jaxtrain"), str(tmp_path / "test.npy")]) == 0
    labels = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    accuracy = float(np.mean(np.array(labels) == fields["label"]))
    assert accuracy == pytest.approx(result["test"]["accuracy"])


def test_bad_input_of_export_is_one_line(export_run, folder, tmp_path, capsys):
    (tmp_path / "there").write_text("mine")
    for args, out, message in [
        ([], "there", "exists: add --force to replace it"),
        ([], "no/model", "does not exist: make it first"),
        ([], "a.onnx", "this name is for --format onnx, and the format is jaxtrain"),
        (["--format", "onnx"], "a", "the name of an ONNX file ends in .onnx"),
        (["--weights", "5"], "model", "--weights 5: give best, latest or a saved step"),
    ]:
        code, printed, err = export_run(*args, out=out)
        assert code == 2 and printed == "" and message in err and err.count("\n") == 1, err
    assert export.main(["--workdir", str(tmp_path), "--out", str(tmp_path / "model")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_metrics_are_those_of_the_checkpoint_and_a_damaged_result_is_one_line(tmp_path):
    assert export.recorded_metrics(tmp_path, 9) == {}
    best = {"step": 5, "test": {"loss": 2.0}}
    (tmp_path / "result.json").write_text(json.dumps({"steps": 9, "test": {"loss": 1.0}, "best": best}))
    found = [export.recorded_metrics(tmp_path, step) for step in (9, 5, 7)]
    assert found == [{"test": {"loss": 1.0}}, {"test": {"loss": 2.0}}, {}]
    for damaged in ('{"steps": 9', "[]", "{}"):
        (tmp_path / "result.json").write_text(damaged)
        with pytest.raises(InputError, match=r"result\.json cannot be read .*: restore it, or delete it"):
            export.recorded_metrics(tmp_path, 9)


@pytest.mark.full("tests/artifact/test_formats.py")
def test_the_other_formats_are_written_and_force_replaces(export_run, tmp_path):
    (tmp_path / "weights").write_text("old")
    code, out, _ = export_run("--format", "safetensors", "--force", out="weights")
    assert code == 0 and "read back" in out and (tmp_path / "weights").stat().st_size > 1000
    code, out, _ = export_run("--format", "stablehlo", out="model.mlirbc")
    assert code == 0 and "checked on 16 test examples" in out
