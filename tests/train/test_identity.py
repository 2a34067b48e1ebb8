"""A run is what it was computed from: changed data are refused, changed code is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxtrain
from jaxtrain import data, losses, models, optim, run
from jaxtrain.cli import evaluate
from jaxtrain.core import user_modules
from jaxtrain.core.errors import InputError
from jaxtrain.data.identity import UNREADABLE, UNSTABLE
from jaxtrain.experiment import code as experiment_code
from jaxtrain.train import identity as run_identity
from jaxtrain.train.run_folder import RunFolder
from jaxtrain.train.run_record import changed_conditions, merge

FILE = """
import numpy as np
from flax import linen as nn
from jaxtrain import Experiment, data, losses, optim
from helpers import scaled

class Linear(nn.Module):
    @nn.compact
    def __call__(self, series):
        return nn.Dense(4)(series.reshape(series.shape[0], -1)).reshape(-1, 2, 2)

class Loss(losses.Forecast):
    def __call__(self, outputs, batch):
        loss, metrics = super().__call__(outputs, batch)
        return scaled(loss), metrics

def series(split):
    return data.Series(window=3, horizon=2, file="table.csv", split=split)

EXPERIMENT = Experiment(
    model=Linear(), train=series("train"), test=series("test"), loss=Loss(), optimizer=optim.SGD(lr=1e-3),
    batch=16, epochs=1, eval_every=None, steps_per_execution=1,
)
"""


def table(rows: int = 60) -> str:
    values = np.random.default_rng(0).integers(100, 999, (rows, 2))
    return "a,b\n" + "".join(f"{x},{y}\n" for x, y in values)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an experiment, its helpers (two modules and a package) and its data."""
    folder = tmp_path / "project"
    (folder / "nets").mkdir(parents=True)
    (folder / "exp.py").write_text(FILE)
    (folder / "helpers.py").write_text(
        "from constants import FACTOR\ndef scaled(x):\n    return FACTOR * x\n"
    )
    (folder / "constants.py").write_text("import nets.blocks\nFACTOR = 1.0\n")
    (folder / "nets" / "__init__.py").write_text("")
    (folder / "nets" / "blocks.py").write_text("WIDTH = 8\n")
    (folder / "table.csv").write_text(table())
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    forget_modules()


def forget_modules() -> None:
    """Import the user's files again, as a new process does."""
    for name in list(sys.modules):
        if name.startswith(user_modules.PREFIX) or name.partition(".")[0] in ("helpers", "constants", "nets"):
            del sys.modules[name]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command as a new process would; returns its exit code and all that it printed."""

    def call(main: Callable[[list[str]], int], *words: Any) -> tuple[int, str]:
        forget_modules()
        capsys.readouterr()
        code = main([*map(str, words), "--devices", "1"])
        return code, "".join(capsys.readouterr())

    return call


@pytest.fixture
def train(command: Any) -> Callable[..., tuple[int, str]]:
    return lambda *words: command(run.main, "--experiment", "exp.py", "--workdir", "w", *words)


def config(folder: Path | str = "w") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "config.json").read_text())
    return found


MORE = ("--set", "epochs=2")  # of a finished run: it resumes where it ended


@pytest.mark.full("tests/train/test_identity.py::test_a_run_that_saved_nothing_may_begin_with_other_data")
def test_a_longer_table_is_refused_and_can_be_accepted(train: Any, project: Path) -> None:
    assert train()[0] == 0
    before = config()
    with (project / "table.csv").open("a") as file:
        file.write("500,500\n" * 5)
    code, text = train(*MORE)
    assert (
        code == 2 and "train: length was 32 and is 35, train: file table.csv was 484 bytes and is 524" in text
    )
    assert "--accept-changed-data" in text.splitlines()[-1] and config() == before
    code, text = train(*MORE, "--accept-changed-data")
    assert code == 0 and "changed data are accepted: train: length was 32" in text and "resuming at" in text
    found = config()
    (entry,) = found["accepted_data"]
    assert (
        entry["command"] == "run"
        and entry["step"] == 2
        and "train: length was 32 and is 35" in entry["changed"]
    )
    assert found["data"]["train"]["length"] == "35" and found["run"] == before["run"]
    code, text = train(*MORE)
    assert code == 0 and "accepted" not in text and "changed" not in text


@pytest.mark.full("tests/train/test_identity.py::test_a_run_that_saved_nothing_may_begin_with_other_data")
def test_one_cell_of_the_test_split_is_noticed_in_a_finished_run(
    train: Any, command: Any, project: Path
) -> None:
    assert train()[0] == 0
    text = (project / "table.csv").read_text()
    (project / "table.csv").write_text(text[:-2] + ("1\n" if text[-2:] != "1\n" else "2\n"))
    code, text = train()
    assert code == 2 and "since this run finished" in text and "test: file table.csv (" in text
    code, text = train("--accept-changed-data")
    assert code == 0 and "the result below is of the data before" in text
    assert train()[0] == 2  # the record is still of the data that were used
    words = ("--workdir", "w", "--experiment", "exp.py")
    code, text = command(evaluate.main, *words)
    assert code == 2 and "evaluate them with --accept-changed-data" in text
    assert command(evaluate.main, *words, "--accept-changed-data")[0] == 0
    assert [entry["command"] for entry in config()["accepted_data"]] == ["run", "evaluate"]
    shutil.rmtree("w/checkpoints")
    assert train()[0] == 2  # a result alone is compared, too


def test_a_run_that_saved_nothing_may_begin_with_other_data(train: Any, project: Path) -> None:
    code, text = train("--set", "optimizer.lr=1e30", "--set", "epochs=9")
    assert code == 3 and not list(Path("w").glob("checkpoints/*/manifest.json"))
    (project / "table.csv").write_text(table(70))
    code, text = train("--set", "optimizer.lr=1e30", "--set", "epochs=9")
    assert code == 3 and "changed" not in text and "bytes" in config()["data"]["train"]["file table.csv"]
    assert config()["data"]["train"]["length"] == "38"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.full("tests/train/test_identity.py::test_changed_code_of_a_resumed_run_is_named")
def test_changed_code_of_a_finished_run_is_named(train: Any, project: Path) -> None:
    assert train()[0] == 0
    files = ["constants.py", "exp.py", "helpers.py", "nets/__init__.py", "nets/blocks.py"]
    assert list(config()["code"]) == files
    changed: list[str] = []
    for file, old, new in (
        ("nets/blocks.py", "8", "9"),
        ("constants.py", "1.0", "2.0"),
        ("exp.py", "return scaled(loss), metrics", "return 2 * scaled(loss), metrics"),
    ):
        edit(project / file, old, new)
        changed = sorted([*changed, file])
        code, text = train()
        line = (
            f"code has changed since this run started: {', '.join(changed)}: its result is of the code before"
        )
        assert code == 0 and line in text.splitlines()


def test_changed_code_of_a_resumed_run_is_named(train: Any, command: Any, project: Path) -> None:
    assert train()[0] == 0
    edit(project / "helpers.py", "FACTOR * x", "2 * FACTOR * x")
    line = "code has changed since this run started: helpers.py"
    code, text = train(*MORE, "--strict")
    assert code == 2 and f"{line}; restore it" in text and "resumed" not in config()
    code, text = train(*MORE)
    assert code == 0 and f"{line}: it may behave differently from here on" in text.splitlines()
    (entry,) = config()["resumed"]
    assert entry["step"] == 2 and entry["code"]["helpers.py"] != config()["code"]["helpers.py"]
    words = ("--workdir", "w", "--experiment", "exp.py")
    code, text = command(evaluate.main, *words)
    assert code == 0 and f"{line}: its results may differ" in text.splitlines()
    assert command(evaluate.main, *words, "--strict")[0] == 2


def test_a_copy_of_everything_is_no_change(train: Any, command: Any, project: Path, tmp_path: Path) -> None:
    assert train()[0] == 0
    copy = shutil.copytree(project, tmp_path / "elsewhere" / "copy")
    shutil.move(project, tmp_path / "gone")
    sys.path[sys.path.index(str(project))] = str(copy)
    words = ("--experiment", copy / "exp.py", "--workdir", copy / "w")
    code, text = command(run.main, *words, *MORE)
    assert code == 0 and "changed" not in text and "resuming at" in text
    code, text = command(evaluate.main, *words)
    assert code == 0 and "changed" not in text


@pytest.mark.full("tests/train/test_identity.py::test_a_copy_of_everything_is_no_change")
def test_relative_paths_mean_the_same_from_every_folder(
    train: Any, command: Any, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "start").mkdir()
    shutil.move("table.csv", tmp_path / "start")  # beside where the run is started, not beside the file
    monkeypatch.chdir(tmp_path / "start")
    words = ("--experiment", project / "exp.py", "--workdir", tmp_path / "w")
    assert command(run.main, *words)[0] == 0
    assert config(tmp_path / "w")["files"] == [str(tmp_path / "start" / "table.csv")]
    assert "'table.csv'" in config(tmp_path / "w")["config"]["train.file"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "table.csv").write_text(table(99))
    monkeypatch.chdir(tmp_path / "other")
    code, text = command(evaluate.main, *words)
    assert (
        code == 0 and f"table.csv is {tmp_path}/start/table.csv, and not {tmp_path}/other/table.csv" in text
    )
    code, text = command(run.main, *words, *MORE)
    assert code == 0 and "resuming at" in text
    (tmp_path / "other" / "table.csv").unlink()
    (tmp_path / "start" / "table.csv").unlink()
    code, text = command(evaluate.main, *words)
    assert code == 2 and f"{tmp_path}/start/table.csv cannot be read" in text.splitlines()[-1]


@pytest.mark.full("tests/train/test_identity.py::test_changed_code_of_a_resumed_run_is_named")
def test_a_record_without_identities_is_one_line(train: Any, project: Path) -> None:
    assert train()[0] == 0
    old = {name: value for name, value in config().items() if name not in ("code", "data", "files")}
    Path("w/config.json").write_text(json.dumps(old))
    code, text = train(*MORE)
    assert code == 0 and text.count("recorded neither its code nor its data") == 1
    assert train(*MORE)[1].count("recorded neither") == 0 and config()["code"]


def test_sources_that_cannot_be_compared_are_a_line_each() -> None:
    parts = {"length": "3", "field x": UNSTABLE, "field y": "int32[3] 00000000"}
    notes = run_identity._notes({"train": parts, "test": {"length": "3", "examples": UNREADABLE}})
    assert [note.partition(":")[0] for note in notes] == ["train", "test"]
    assert "x differs when the same rows are gathered again" in notes[0] and "y" not in notes[0].split()[1]
    assert "cannot be read" in notes[1]


class Rows:
    """A source of a user's own; ``noise`` is no setting that a run could compare."""

    def __init__(self, noise: float) -> None:
        rng = np.random.default_rng(0)
        self.label = rng.integers(0, 3, 60).astype(np.int32)
        self.image = np.eye(3, dtype=np.float32)[self.label] + np.float32(noise)

    def __len__(self) -> int:
        return len(self.label)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.image[indices], "label": self.label[indices]}


@pytest.mark.full("tests/train/test_identity.py::test_a_run_that_saved_nothing_may_begin_with_other_data")
def test_fit_compares_sources_of_the_users_own(tmp_path: Path, mesh1: Any, capsys: Any) -> None:
    first = jaxtrain.Experiment(
        model=models.MLP(widths=(), classes=3),
        train=Rows(0.0),
        test=Rows(0.0),
        loss=losses.CrossEntropy(),
        optimizer=optim.SGD(lr=0.1),
        batch=30,
        epochs=1,
        eval_every=None,
    )
    options = {"folder": tmp_path / "r", "mesh": mesh1}
    jaxtrain.fit(first, **options)
    assert any(path.endswith("test_identity.py") for path in config(tmp_path / "r")["code"])
    other = dataclasses.replace(first, test=Rows(0.1))
    with pytest.raises(
        jaxtrain.InputError, match=r"test: field image \(float32\[60, 3\]\) has other contents"
    ):
        jaxtrain.fit(other, **options)
    result = jaxtrain.fit(dataclasses.replace(other, epochs=2), **options, accept_changed_data=True)
    assert result["resumed_from"] == 2
    assert jaxtrain.fit(dataclasses.replace(other, epochs=2), **options) == result


def test_conditions_of_the_first_start_stay() -> None:
    now = {"run": "2", "hash": "b", "mesh": {"data": 2}, "git": "y", "steps": 9}
    known = {"run": "1", "hash": "a", "mesh": {"data": 1}, "git": "y", "steps": 5, "own": 0}
    assert merge(known, now) == {**known, "hash": "b", "steps": 9}
    assert changed_conditions(known, now) == {"mesh": {"data": 2}}
    again = {**known, "resumed": [{"step": 5, "mesh": {"data": 2}}]}
    assert changed_conditions(again, now) == {}  # as at the last start
    assert changed_conditions(again, {**now, "mesh": {"data": 1}}) == {"mesh": {"data": 1}}


def test_init_from_is_meant_from_the_first_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"name": "x", "config": {}, "init_from": ["runs/a:5", []], "started_in": str(tmp_path / "start")}
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(record))
    assert RunFolder(folder).init_from(None, ()) == [str(tmp_path / "start" / "runs" / "a:5"), []]
    (folder / "checkpoints" / "000005").mkdir(parents=True)
    (folder / "checkpoints" / "000005" / "manifest.json").touch()
    for source in ("runs/a:5", f"{tmp_path}/start/runs/a:5", None):
        assert RunFolder(folder).init_from(source, ()) == ["runs/a:5", []]
    with pytest.raises(jaxtrain.InputError, match="started with --init-from runs/a:5"):
        RunFolder(folder).init_from("runs/b", ())


def small_experiment() -> jaxtrain.Experiment:
    rng = np.random.default_rng(0)
    rows = data.Arrays({"image": rng.random((32, 2, 2, 1), np.float32), "label": np.arange(32) % 4})
    return jaxtrain.Experiment(
        model=models.MLP(widths=(), classes=4), train=rows, test=rows, loss=losses.CrossEntropy(),
        optimizer=optim.SGD(lr=0.1), batch=16, epochs=1, steps_per_execution=1,
    )  # fmt: skip


@pytest.mark.full("tests/train/test_identity.py::test_changed_code_of_a_resumed_run_is_named")
def test_fit_refuses_changed_code_where_it_is_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, strict in (("before", True), ("after", False)):
        monkeypatch.setattr(experiment_code, "digests", lambda *_, text=text: {"own.py": text})
        jaxtrain.fit(small_experiment(), folder=tmp_path / "run", strict=strict)
    with pytest.raises(InputError, match="code has changed since this run started"):
        jaxtrain.fit(small_experiment(), folder=tmp_path / "run", strict=True)


@pytest.mark.full("tests/train/test_identity.py::test_changed_code_of_a_resumed_run_is_named")
def test_another_checkpoint_under_the_name_of_the_first_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that started from a checkpoint says so where the name means another one now."""
    exp = small_experiment()
    first, second = tmp_path / "first", tmp_path / "second"
    jaxtrain.fit(exp, folder=first)
    jaxtrain.fit(exp, folder=second, init_from=first)
    step = json.loads((second / "config.json").read_text())["init_checkpoint"]
    assert step.startswith("step 2, sha256 ")
    capsys.readouterr()
    jaxtrain.fit(exp, folder=second, init_from=first)
    assert "has changed" not in capsys.readouterr().out
    shutil.rmtree(first)
    jaxtrain.fit(exp, folder=second, init_from=first)
    assert "has changed" not in capsys.readouterr().out  # gone: nothing to compare
    jaxtrain.fit(dataclasses.replace(exp, seed=1), folder=first)
    jaxtrain.fit(exp, folder=second, init_from=first)
    assert f"{first} has changed since this run started from it ({step}; now" in capsys.readouterr().out
