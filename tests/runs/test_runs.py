"""``python -m jaxtrain runs``: what is listed, compared and removed; hostile folders do no harm."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from interrupt import interrupted
from jax.sharding import Mesh
from tiny import EXPERIMENT

import jaxtrain
from jaxtrain.checkpoint import manifest
from jaxtrain.cli import runs as command
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.train import run_folder
from jaxtrain.train.run_folder import RunFolder


def make_run(
    folder: Path,
    name: str = "cnn",
    lr: str = "0.1",
    accuracy: float | None = None,
    best: float | None = None,
    time: int = 1000,
    **record: Any,
) -> Path:
    """Write the files of a run: one with ``accuracy`` is finished, others stopped at step 5 of 10."""
    folder.mkdir(parents=True)
    config = {"optimizer.lr": lr, "select": "'accuracy'", "model": "CNN"}
    (folder / "config.json").write_text(
        json.dumps({"name": name, "hash": "ab", "config": config, "steps": 10, **record})
    )
    (folder / ".lock").write_text("pid 1 on here")
    rows: list[dict[str, Any]] = [{"step": 5, "train/loss": 1.0}, {"step": 5, "test/accuracy": 0.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if accuracy is not None:
        result: dict[str, Any] = {"steps": 10, "test": {"loss": 2.0, "accuracy": accuracy}, "seconds": 3.5}
        if best is not None:
            result["best"] = {"step": 5, "valid": 0.5, "test": {"accuracy": best}}
        (folder / "result.json").write_text(json.dumps(result))
    for path in folder.iterdir():
        os.utime(path, (time, time))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four runs of two experiments."""
    make_run(tmp_path / "runs/cnn/a", accuracy=0.8, best=0.95, time=3000)
    make_run(tmp_path / "runs/cnn/b", lr="0.2", accuracy=0.91, time=2000)
    make_run(tmp_path / "runs/mlp/deeper/c", name="mlp", lr="1e-1", time=4000)
    make_run(tmp_path / "runs/mlp/d", name="mlp", lr="'none'", time=1000)
    return tmp_path / "runs"


def listed(root: Path, capsys: Any, *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert command.main([*words, "--root", str(root), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys: Any, *words: str) -> str:
    """Return the one line of a command that ends with exit code 2."""
    try:
        code = command.main(words)
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    output = capsys.readouterr()
    assert code == 2 and not output.out and output.err.count("\n") == 1, output
    return output.err


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_the_list_shows_every_run_newest_last(root: Path, capsys: Any) -> None:
    (root / "mlp/d/bad_batch.json").write_text("{}")
    (root / "cnn/a/other").mkdir()
    (root / "empty").mkdir()
    with locked(root / "mlp/deeper/c"):
        assert command.main(["--root", str(root)]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["experiment", "folder", "state", "step", "metric", "when", "tags"]
    assert [line[:6] for line in lines[1:]] == [
        ["mlp", "mlp/d", "failed", "5/10", "accuracy", "0.2500"],
        ["cnn", "cnn/b", "finished", "10", "accuracy", "0.9100"],
        ["cnn", "cnn/a", "finished", "10", "accuracy", "0.9500"],
        ["mlp", "mlp/deeper/c", "running", "5/10", "accuracy", "0.2500"],
    ]
    assert [run["folder"] for run in listed(root, capsys, "--sort", "metric")] == [
        "mlp/d", "mlp/deeper/c", "cnn/b", "cnn/a",
    ]  # fmt: skip
    assert [run["state"] for run in listed(root, capsys, "state!=finished")] == ["failed", "stopped"]


def test_a_finished_run_that_goes_on_is_running(root: Path, capsys: Any) -> None:
    """Its lock was written after its result."""
    os.utime(root / "cnn/a/.lock", (5000, 5000))
    with locked(root / "cnn/a"):
        assert [run["folder"] for run in listed(root, capsys, "state=running")] == ["cnn/a"]


FILTERS = {
    "experiment=c*": "ab",
    "experiment!=cnn": "cd",
    "best.accuracy>0.9": "ab",
    "best.accuracy>=0.95": "a",
    "test.accuracy<0.9": "acd",
    "optimizer.lr=0.1": "ac",
    "optimizer.lr<=0.1": "ac",
    "optimizer.lr=none": "d",
    "step<10": "cd",
    "seconds=3.5": "ab",
    "state=stopped": "cd",
    "tag=good": "b",
    "tag!=good": "acd",
    "folder=mlp/*": "cd",
    "train.loss=1": "cd",
    "when<2000": "abcd",
    "when>2000": "",
}


@pytest.mark.parametrize("text", FILTERS)
def test_filters(text: str, root: Path, capsys: Any) -> None:
    (root / "cnn/b/notes.json").write_text('{"tags": ["good"]}')
    if text.startswith("when"):
        text = text.replace("2000", "1970-01-02T12:00")
    found = listed(root, capsys, text)
    assert (
        "".join(sorted(run["folder"][-1] for run in found))
        == FILTERS[text.replace("1970-01-02T12:00", "2000")]
    )


def test_bad_input_is_one_line(root: Path, capsys: Any) -> None:
    at = ("--root", str(root))
    a, b = str(root / "cnn/a"), str(root / "cnn/b")
    cases = {
        ("accuracy", *at): "'accuracy' is not a filter: write FIELD=VALUE",
        ("best.accuracy>", *at): "is not a filter",
        ("best.acuracy>1", *at): "no run has the field 'best.acuracy': did you mean best.accuracy?",
        ("--sort", "lr", *at): "no run has the field 'lr'",
        ("best.accuracy>high", *at): "'high' is not a number, and > compares numbers",
        ("when>yesterday", *at): "'yesterday' is not a time",
        ("tag>1", *at): "a tag is compared with = or !=",
        ("--root", str(root / "no")): "there is no folder",
        ("diff", a): "compares two runs",
        ("diff", a, str(root)): "holds no run (no config.json)",
        ("tag", a): "runs tag RUN TAG",
        ("tag", a, "x y"): "cannot be a tag",
        ("tag", a, "old", "--remove"): "has no tag old: it has none",
        ("note", a, "two\nlines"): "has line breaks or control characters",
        ("note", a, "x" * 10_001): "at most 10,000",
        ("clean", "--keep", "0", *at): "at least the latest checkpoint stays",
        ("clean", "--json", *at): "--json is not a flag of runs clean",
        ("--yes", *at): "--yes is not a flag of runs list",
        ("diff", a, b, "c"): "compares two runs",
    }
    for words, message in cases.items():
        assert message in refused(capsys, *words), words


def test_tags_and_notes_are_beside_the_record(root: Path, capsys: Any) -> None:
    before = (root / "cnn/a/config.json").read_bytes()
    for words in (
        ["tag", "cnn/a", "good", "paper"],
        ["tag", "cnn/a", "paper", "--remove"],
        ["note", "cnn/a", "ein Versuch – 1"],
        ["tag", str(root / "cnn/a"), "best"],
    ):
        assert command.main([*words, "--root", str(root)]) == 0
    assert len(listed(root, capsys, "tag=be*")) == 1 and not listed(root, capsys, "tag=paper")
    (run,) = listed(root, capsys, "note=*Versuch*")
    assert run["tags"] == ["best", "good"] and run["note"] == "ein Versuch – 1"
    assert (root / "cnn/a/config.json").read_bytes() == before
    (root / "cnn/a/notes.json").write_text("{")
    assert "repair or delete it" in refused(capsys, "tag", str(root / "cnn/a"), "x")
    assert (root / "cnn/a/notes.json").read_text() == "{"


def test_hostile_folders_are_shown_or_left_out(root: Path, tmp_path: Path, capsys: Any) -> None:
    """Control characters do not reach the terminal; links, pipes, wrong types and damage stop nothing."""
    red = "\x1b[31m\u202ered"
    make_run(root / "x" / f"run{red}", name=f"exp{red}\n", accuracy=0.5)
    (root / "x" / f"run{red}" / "notes.json").write_text(json.dumps({"tags": [red], "note": red}))
    outside = make_run(tmp_path / "outside/run", name="outside", accuracy=1.0)
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(root)
    for number, text in enumerate(["{", "[" * 100_000, "\xff", '{"name": 1, "config": [], "steps": "x"}']):
        make_run(root / f"damaged{number}", accuracy=0.1)
        (root / f"damaged{number}" / "config.json").write_bytes(text.encode("latin-1"))
    wrong = make_run(root / "wrong")
    (wrong / "result.json").write_text('{"steps": 10, "test": [1], "best": 3}')
    (wrong / "notes.json").write_text('{"tags": {"a": 1}, "note": 5}')
    (wrong / "metrics.jsonl").write_text('[1]\n{"step": [], "test/accuracy": "x"}\nnull\n')
    for name in ("pipe", "other"):
        (root / name).mkdir()
    os.mkfifo(root / "pipe/config.json")
    (root / "other/config.json").write_text('{"something": "else"}')
    linked = make_run(root / "linked", accuracy=0.3)
    (linked / "result.json").unlink()
    (linked / "result.json").symlink_to(outside / "result.json")

    assert command.main(["--root", str(root)]) == 0
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable() and "outside" not in text and "other" not in text
    assert len(text.splitlines()) == 1 + 4 + 1 + 4 + 1 + 1 + 1, text
    assert "exp [31m red" in text
    runs = {run["folder"]: run for run in listed(root, capsys)}
    assert [runs[f"damaged{number}"]["state"] for number in range(4)] == ["damaged"] * 4
    assert runs["wrong"]["metric"] is None and runs["linked"]["metric"]["value"] == 0.25
    for words in (["diff", "wrong", "cnn/a"], ["diff", f"x/run{red}", "cnn/a"]):
        assert command.main([*words, "--root", str(root)]) == 0
        assert capsys.readouterr().out.replace("\n", "").isprintable()
    (root / "wrong/result.json").write_text('{"steps": 10, "test": {"a": 1' + "0" * 400 + ', "b": NaN}}')
    assert command.main(["--root", str(root), "--sort", "test.b"]) == 0
    capsys.readouterr()
    deep = '{"name": "deep", "config": {}, "data": ' + '{"a":' * 900 + "1" + "}" * 901
    (root / "wrong/config.json").write_text(deep)
    assert "nested too deeply" in refused(capsys, "diff", str(root / "wrong"), str(root / "cnn/a"))
    assert "config.json cannot be read" in refused(
        capsys, "diff", str(root / "damaged0"), str(root / "cnn/a")
    )


def test_diff_names_the_first_metric_that_parts(root: Path, capsys: Any) -> None:
    """Of an update that a resumed run has repeated the last record counts; speeds are not compared."""
    common = {"code": {"net.py": "1"}, "data": {"train": {"length": "5"}}, "git": "x"}
    a = make_run(root / "p/a", accuracy=0.5, **common)
    b = make_run(
        root / "p/b",
        lr="0.3",
        accuracy=0.6,
        **{**common, "code": {"net.py": "2"}, "data": {"train": {"length": "6"}}},
    )
    rows = {
        a: [(1, 3.0, 7), (2, 2.0, 7), (3, 1.0, 7)],
        b: [(1, 9.0, 1), (2, 5.0, 1), (1, 3.0, 2), (2, 2.5, 2), (4, 0.0, 2)],
    }
    for folder, lines in rows.items():
        (folder / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"step": step, "examples_per_second": speed, "train/loss": loss, "train/x": None})
                + "\n"
                for step, loss, speed in lines
            )
        )
    assert command.main(["diff", "p/a", "p/b", "--root", str(root)]) == 0
    text = capsys.readouterr().out
    for line in (
        "metrics: the first that differs is train/loss at step 2: 2.0 and 2.5; equal up to step 1",
        "  optimizer.lr  0.1  0.3",
        "  net.py  1  2",
        "  train.length  5  6",
        "conditions: the same",
        "  accuracy  0.5  0.6",
    ):
        assert line in text.splitlines(), text
    assert command.main(["diff", "p/a", "p/b", "--root", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 2 and found["metrics"] == {"train/loss": [2.0, 2.5]}
    assert command.main(["diff", "p/a", "p/a", "--root", str(root)]) == 0
    assert "metrics: the same up to step 3" in capsys.readouterr().out


def save(run: Path, step: int, score: float | None) -> Path:
    """Write a checkpoint as ``checkpoint.save`` lays it out: 1000 bytes and a manifest."""
    folder = run / "checkpoints" / f"{step:06d}"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "array").write_bytes(b"x" * 1000)
    manifest.write(folder, {"format": manifest.FORMAT, "step": step, "score": score, "tree": {}})
    return folder


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_clean_keeps_best_and_latest(root: Path, tmp_path: Path, capsys: Any) -> None:
    """It shows what it would remove, removes with --yes, skips runs in use, and follows no links."""
    run, used, linked = root / "cnn/a", root / "cnn/b", root / "mlp/d"
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.9), (4, 0.2), (5, 0.3)):
        save(run, step, score)
        save(used, step, None)
        save(tmp_path / "outside", step, None)
    with (run / "checkpoints/000003/manifest.json").open("a") as file:
        file.write(" {")  # damaged: it stays
    (run / "checkpoints/.trash-000000-1/state").mkdir(parents=True)
    (run / "checkpoints/000006").mkdir()
    (run / "checkpoints/000006/.saving").touch()
    (run / "checkpoints/mine").mkdir()
    (run / "checkpoints/000001/state/link").symlink_to(tmp_path / "outside")
    (linked / "checkpoints").symlink_to(tmp_path / "outside/checkpoints")
    before = steps(run)

    def call(*words: str) -> tuple[str, str]:
        with locked(used):
            assert command.main(["clean", "--root", str(root), *words]) == 0
        output = capsys.readouterr()
        return output.out, output.err

    out, err = call()
    shown = "stays: 000002 (best), 000003 (damaged), 000005 (latest)"
    assert "cnn/a: 000001, 000004, .trash-000000-1, 000006 (" in out and shown in out
    assert "would remove" in out and "of 1 runs: add --yes" in out
    assert "cnn/b: skipped, it is in use by a run" in err
    assert "mlp/d: skipped, its checkpoints are behind a link" in err
    assert steps(run) == before and len(steps(used)) == 5
    assert "000001, .trash-000000-1, 000006 (" in call("--keep", "2", "experiment=cnn")[0]
    assert "nothing to remove in 0 runs" in call("--yes", "tag=none")[0] and steps(run) == before

    (shown,) = [line for line in call("--keep", "4")[0].splitlines() if line.startswith("cnn/a")]
    assert "stays: 000001 (latest), 000002 (best, latest), 000003 (damaged)" in shown
    out, err = call("--yes")
    assert "removed " in out and "cnn/b: skipped" in err and "mlp/d: skipped" in err
    assert steps(run) == ["000002", "000003", "000005", "mine"]
    assert len(steps(used)) == 5 and len(steps(tmp_path / "outside")) == 5
    assert "nothing to remove in 4 runs" in call("--yes")[0]


def test_a_run_starts_while_its_lock_is_tried(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``runs`` holds the lock for an instant; a lock that stays refuses as before."""
    with (root / "cnn/a/.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(InputError, match="is in use by another run"), RunFolder(root / "cnn/a").locked():
            pass
        monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: fcntl.flock(file, fcntl.LOCK_UN))
        with RunFolder(root / "cnn/a").locked():
            pass


def test_listing_imports_no_jax(root: Path) -> None:
    code = f"""
import sys
from jaxtrain.__main__ import main
for words in (["best.accuracy>0"], ["diff", "cnn/a", "cnn/b"], ["tag", "cnn/a", "x"], ["--sort", "lr"]):
    main(["runs", "--root", {str(root)!r}, *words])
print("heavy", sorted({{"jax", "numpy", "flax", "rich"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy []"


@pytest.mark.full("tests/runs/test_runs.py::test_the_list_shows_every_run_newest_last")
def test_states_of_real_runs(mesh1: Mesh, tmp_path: Path, capsys: Any) -> None:
    small = dataclasses.replace(EXPERIMENT, augment=(), post_update=())
    jaxtrain.fit(small, folder=tmp_path / "a", mesh=mesh1)
    interrupted(small, tmp_path / "b", mesh1, 5)
    hot = dataclasses.replace(small, optimizer=dataclasses.replace(small.optimizer, lr=1e30))
    with pytest.raises(RunError):
        jaxtrain.fit(hot, folder=tmp_path / "c", mesh=mesh1)
    found = {run["folder"]: run for run in listed(tmp_path, capsys)}
    assert [found[name]["state"] for name in "abc"] == ["finished", "stopped", "failed"]
    assert found["a"]["step"] == 13 and 0 < found["a"]["metric"]["value"] <= 1
    assert command.main(["diff", "a", "c", "--root", str(tmp_path)]) == 0
    assert "optimizer.lr" in capsys.readouterr().out
