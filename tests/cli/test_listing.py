"""``--help`` and ``--list`` do not wait for JAX, and a list that was made before is the same as a new one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from jaxtrain import run
from jaxtrain.cli import listing

LIGHT = """
import sys
sys.argv[1:] = {words!r}
from jaxtrain.{module} import main
try:
    code = main()
except SystemExit as end:
    code = end.code
heavy = sorted(set(sys.modules) & {{"jax", "numpy", "flax", "optax"}})
print("code", code, "heavy", heavy)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """One experiment, found from the current folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    (tmp_path / "experiments").mkdir()
    path = tmp_path / "experiments" / "mine.py"
    path.write_text('"""A tiny one."""\n' + (ROOT / "tests" / "tiny.py").read_text().partition("\n")[2])
    monkeypatch.chdir(tmp_path)
    return path


def listed(capsys) -> str:
    assert run.main(["--list"]) == 0
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mine"))


def light(module, *words):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(module=module, words=list(words))],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("module", "words"), [("run", ["--help"]), ("__main__", ["--help"])])
def test_help_does_not_wait_for_jax(module, words):
    assert light(module, *words)[-1] == "code 0 heavy []"


def test_the_second_list_does_not_wait_for_jax_and_is_the_same(folder):
    first, second = light("run", "--list"), light("run", "--list")
    assert first[-1].startswith("code 0 heavy ['flax', 'jax'") and second[-1] == "code 0 heavy []"
    assert first[:-1] == second[:-1] and len(first) > 10


def test_a_changed_file_is_loaded_again(folder, capsys, monkeypatch):
    before = listed(capsys)
    assert "A tiny one." in before and before.split()[-1] == "124"
    monkeypatch.setattr(listing, "_described", lambda entry: pytest.fail(f"{entry.name} was loaded"))
    assert listed(capsys) == before
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent.parent / "caches"))
    monkeypatch.chdir(folder.parent.parent)
    folder.write_text(folder.read_text().replace("A tiny one.", "Another."))
    for name in [name for name in sys.modules if name.startswith("jaxtrain_file_mine")]:  # other tests', too
        del sys.modules[name]
    assert "Another." in listed(capsys)


def test_what_cannot_be_loaded_is_tried_again(folder, capsys):
    folder.write_text("1 / 0\n")
    for _ in range(2):
        assert "cannot be loaded" in listed(capsys)


def test_damaged_rows_are_made_again(folder, capsys):
    before = listed(capsys)
    (kept,) = (folder.parent.parent / "caches").rglob(listing.FILE)
    for text in ("", "[]", '{"x": 5}', kept.read_text().replace('"124"', "124, 5")):
        kept.write_text(text)
        assert listed(capsys) == before
