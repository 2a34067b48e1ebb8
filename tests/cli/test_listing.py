"""``run --list`` reads docstrings without importing anything; ``--long`` loads each experiment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT

from jaxtrain import run
from jaxtrain.cli import listing
from jaxtrain.experiment.registry import Entry

PROBE = """
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

BROKEN = {
    "exits": ('"""Exits."""\nimport sys\nsys.exit(5)\n', "SystemExit: 5"),
    "raises": ('"""Raises."""\n1 / 0\nEXPERIMENT = 0\n', "ZeroDivisionError: division by zero"),
    "empty": ("", "must define EXPERIMENT"),
    "syntax": ("def\n", "SyntaxError"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of experiments, found from the current folder: one that works, and broken ones."""
    path = tmp_path / "experiments"
    path.mkdir()
    tiny = (ROOT / "tests" / "tiny.py").read_text().partition("\n")[2]
    (path / "mine.py").write_text(f'"""A tiny one.\n\nMore text."""\n{tiny}')
    for name, (text, _) in BROKEN.items():
        (path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return path


def rows(capsys, *words: str) -> dict[str, str]:
    """The rows of the table, by name."""
    assert run.main(["--list", *words]) == 0
    pairs = (line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    return {pair[0]: pair[-1].rstrip() for pair in pairs}


def imported(module: str, *words: str) -> str:
    """The exit code of a command, and which heavy packages it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module, words=list(words))],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "words"), [("run", ["--help"]), ("__main__", ["--help"]), ("run", ["--list"])]
)
def test_help_and_list_do_not_import_jax(module, words):
    assert imported(module, *words) == "code 0 heavy []"


def test_list_shows_first_docstring_lines_of_files_that_cannot_be_imported(folder, capsys):
    found = rows(capsys)
    assert found["mine"] == "A tiny one." and "parameters" not in found["name"]
    assert found["raises"] == "Raises."
    assert found["exits"].startswith("cannot be loaded: line 3: sys.exit() ends the process: move it under")
    assert found["empty"] == "cannot be loaded: it must define EXPERIMENT = Experiment(...)"
    assert found["syntax"].startswith("cannot be read: SyntaxError: invalid syntax")
    assert "digits_cnn" in found


def test_list_sees_an_edited_file(folder, capsys):
    (folder / "mine.py").write_text('"""Another\x1b[31m\x07."""\nfrom here import EXPERIMENT\n')
    assert rows(capsys)["mine"] == "Another [31m ."


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def make():\n    EXPERIMENTS = 0", listing.NOTHING),
        (
            "import argparse\nargs = argparse.ArgumentParser().parse_args()\nEXPERIMENT = 0",
            "line 2: argparse",
        ),
        ("with open('x'):\n    quit()\nEXPERIMENT = 0", "line 2: quit() ends"),
        ("parser.parse_args([])\nfrom here import *", listing.UNKNOWN),
        (
            "def f():\n    exit()\nif __name__ == '__main__':\n    exit()\nEXPERIMENT: int = 0",
            listing.UNKNOWN,
        ),
        ("try:\n    from here import EXPERIMENT\nexcept ImportError:\n    exit()", listing.UNKNOWN),
        ("globals()['EXPERIMENT'] = 0", listing.UNKNOWN),
    ],
)
def test_list_names_files_that_cannot_be_loaded(text, line, tmp_path):
    (tmp_path / "one.py").write_text(text)
    found = listing.summary(Entry("one", str(tmp_path / "one.py")))
    assert re.match(f"(cannot be loaded: )?{re.escape(line)}", found)


@pytest.mark.full("tests/cli/test_listing.py::test_list_names_files_that_cannot_be_loaded")
def test_long_shows_parameters_and_the_reason_of_each_broken_file(folder, capsys):
    found = rows(capsys, "--long")
    assert re.fullmatch(r"A tiny one\. +arrays +CNN +124", found["mine"])
    assert re.search(r" digits +CNN +65,834$", found["digits_cnn"])
    for name, (_, reason) in BROKEN.items():
        assert found[name].startswith("cannot be loaded:")
        assert reason in listing.describe(Entry(name, str(folder / f"{name}.py")))[0]  # the table wraps it


def test_long_alone_is_refused(capsys):
    assert run.main(["--experiment", "digits_cnn", "--long"]) == 2
    assert capsys.readouterr().err == "jaxtrain.run: --long needs --list\n"


def test_an_entry_point_is_read_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("1 / 0")
    (package / "one.py").write_text('"""Of a package."""\n1 / 0')
    monkeypatch.syspath_prepend(tmp_path)
    for module, expected in [("package_of_mine.one", "Of a package."), ("gone.one", "entry point gone.one")]:
        point = metadata.EntryPoint("one", module, "jaxtrain.experiments")
        assert listing.summary(Entry("one", module, point)) == expected
