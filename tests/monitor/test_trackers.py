"""Trackers get all records and cannot disturb a run; observers see it and cannot change it."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from interrupted_run import expected, info, interrupted, same_but_speed, values

import jaxtrain
from jaxtrain import data, losses, models, optim, run
from jaxtrain.core.errors import InputError
from jaxtrain.monitor import observers as observing
from jaxtrain.monitor import trackers
from jaxtrain.monitor.files import Files
from jaxtrain.monitor.trackers import Trackers, make_tracker


class Memory:
    """Keeps what it gets; the second ``start`` begins again, as a file opened with "w"."""

    def start(self, run):
        self.run, self.records, self.status = run, [], None

    def write(self, records):
        self.records += [(step, dict(values)) for step, values in records]

    def finish(self, status):
        self.status = status


class Hangs(Memory):
    """Answers when ``go`` is set."""

    def __init__(self):
        self.go = threading.Event()

    def write(self, records):
        self.go.wait()
        super().write(records)


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(trackers, "_abandoned", threading.Event())


def test_every_tracker_gets_the_records_of_metrics_jsonl_also_after_a_resume(tmp_path):
    made = []
    notes = interrupted(tmp_path, *[lambda: made.append(Memory()) or made[-1]] * 2)
    assert notes == [] and len(made) == 4
    for tracker in made[2:]:
        got = sorted((n, step, v) for step, numbers in tracker.records for n, v in numbers.items())
        same_but_speed(got, expected(tmp_path))
        assert tracker.status == "finished" and tracker.run.start == 4
    assert [step for step, _ in made[0].records] == [1, 2, 3, 4, 5, 6] and made[0].status is None
    assert made[2].records == made[3].records


def test_a_line_that_is_half_written_is_read_when_it_is_complete(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2.0}\n{"step": 2, ')
    tracker = Memory()
    sending = Trackers([tracker], info(tmp_path), print)
    sending.begin(0)
    while not getattr(tracker, "records", []):
        time.sleep(0.01)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('"a": null}\n')
    assert sending.end("stopped", 60.0) == []
    assert tracker.records[0] == (1, {"a": 2.0}) and math.isnan(tracker.records[1][1]["a"])
    assert tracker.status == "stopped"


def test_a_tracker_that_hangs_delays_no_record_and_is_named_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "HANG", 0.0)
    notes, hanging, other = [], Hangs(), Memory()
    sending = Trackers([hanging, other], info(tmp_path), notes.append)
    with contextlib.closing(Files(tmp_path, 0)) as files:
        sending.begin(0)
        for step in range(1, 100):
            files.write(step, values(step))
    while len(getattr(other, "records", [])) < 99:
        time.sleep(0.01)
    sending.check()
    sending.check()
    assert notes == ["WARNING: tracker Hangs has not answered for 0 s; training continues"]
    (line,) = sending.end("finished", 0.1)
    assert line == notes[1] and line == (
        "WARNING: tracker Hangs is incomplete, 0 of 99 records sent (it did not answer in time); "
        f"{tmp_path}/metrics.jsonl has all"
    )
    assert other.status == "finished" and trackers.abandoned()
    hanging.go.set()


def test_a_tracker_that_fails_is_one_line_and_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "RETRY", 0.01)
    failures = iter([OSError("server https://me:hunter22@host is down"), ValueError("\n still\ndown"), None])

    class Flaky(Memory):
        def write(self, records):
            error = next(failures, None)
            if error:
                raise error
            super().write(records)

    notes, tracker = [], Flaky()
    with contextlib.closing(Files(tmp_path, 0)) as files:
        files.write(1, values(1))
    sending = Trackers([tracker], info(tmp_path), notes.append)
    sending.begin(0)
    while len(notes) < 2:
        time.sleep(0.01)
    assert sending.end("finished", 60.0) == []
    assert notes[0] == (
        "WARNING: tracker Flaky failed (OSError: server https://<redacted>@host is down); training "
        "continues, and it is tried again every 0.01 s"
    )
    assert notes[1:] == ["tracker Flaky works again"] and [s for s, _ in tracker.records] == [1]


def small(**settings):
    return jaxtrain.Experiment(
        **{
            "model": models.MLP(widths=(8,), classes=10),
            "train": data.Digits("train"),
            "test": data.Digits("test"),
            "loss": losses.CrossEntropy(),
            "optimizer": optim.Adam(lr=1e-3),
            "batch": 256,
            "epochs": 2,
            "holdout": 64,
            "eval_every": 1,
            "save_every": 1,
            "log_every": 2,
            **settings,
        }
    )


def records(folder: Path) -> list[dict[str, float]]:
    """Return the lines of ``metrics.jsonl`` without times, speeds and memory."""
    keep = ("epoch", "lr", "train/", "valid/", "test/")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: v for name, v in line.items() if name == "step" or name.startswith(keep)} for line in lines
    ]


def test_observers_and_broken_trackers_cannot_change_a_run(tmp_path, mesh1, capsys, monkeypatch):
    monkeypatch.setattr(observing, "FINISH", 0.2)
    seen = []

    def on_evaluation(evaluation):
        seen.append(evaluation)
        np.random.seed(7)
        with pytest.raises(TypeError):
            evaluation.values["loss"] = 0.0
        if evaluation.split == "test":
            sys.exit("not you")
        return "ignored"

    def on_save(save):
        seen.append(save)
        assert (save.path / "manifest.json").exists()
        raise KeyError("mine")

    class Breaks(Memory):
        def write(self, records):
            records[0][1].clear()  # its own copy
            raise OSError("down")

    memory, hanging = Memory(), Hangs()
    plain = jaxtrain.fit(small(), folder=tmp_path / "a", mesh=mesh1)
    capsys.readouterr()
    watched = jaxtrain.fit(
        small(),
        folder=tmp_path / "b",
        mesh=mesh1,
        trackers=[Breaks(), hanging, memory],
        on_evaluation=on_evaluation,
        on_save=on_save,
    )
    hanging.go.set()
    out = capsys.readouterr().out
    assert watched["test"] == plain["test"] and records(tmp_path / "a") == records(tmp_path / "b")
    weights = [
        {
            path: print
            for one in [json.loads(found.read_text())]
            for path, print in one["fingerprints"].items()
        }
        for name in "ab"
        for found in [max((tmp_path / name / "checkpoints").glob("*/manifest.json"))]
    ]
    assert weights[0] == weights[1]
    evaluations = [(one.step, one.split) for one in seen if isinstance(one, jaxtrain.monitor.Evaluation)]
    steps = plain["steps"]
    assert evaluations[-1] == (steps, "test") and evaluations[0][1] == "valid" and len(evaluations) == 3
    saved = [one.step for one in seen if isinstance(one, jaxtrain.monitor.Save)]
    assert saved == sorted(saved) and saved[-1] == steps
    assert out.count("on_save failed (KeyError: 'mine'); training continues") == len(saved)
    assert "on_evaluation failed (SystemExit: not you); training continues" in out
    assert out.count("tracker Breaks failed (OSError: down)") == 1 and "tracker Hangs is incomplete" in out
    assert [{"step": step, **numbers} for step, numbers in memory.records] == [
        json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    ]
    assert memory.status == "finished" and memory.run.config["batch"] == 256
    assert '"track' not in (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("wandd", "--track wandd: no such tracker; did you mean wandb?"),
        ("nowhere.py:X", "nowhere.py is not a Python file"),
        ("mine.py:Y", "--track mine.py:Y: mine.py defines no 'Y'"),
        ("mine.py:Half", "--track mine.py:Half is without write, finish; a tracker has"),
        ("mine.py:Raises", "--track mine.py:Raises: Raises() raises ZeroDivisionError: division by zero"),
        ("wandb:of", "--track wandb:of: give online or offline"),
        ("wandb", "--track wandb: there is no API key: set WANDB_API_KEY, run wandb login"),
    ],
)
def test_a_wrong_tracker_is_one_line(spec, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/dev/null")
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, find=trackers.importlib.util.find_spec: name in ("wandb", "mlflow") or find(name),
    )
    Path("mine.py").write_text(
        "class Half:\n    def start(self, run): pass\nclass Raises:\n    def __init__(self): 1 / 0\n"
    )
    assert run.main(["--experiment", "digits_cnn", "--workdir", "r", "--track", spec]) == 2
    assert line in capsys.readouterr().err and not Path("r").exists()


def test_a_missing_library_is_one_line_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(InputError, match=rf"{name} is not installed: pip install 'jaxtrain\[{name}\]'"):
            make_tracker(name)
