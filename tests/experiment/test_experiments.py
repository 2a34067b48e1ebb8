"""Every shipped experiment: its config is the golden one, its file says what it is, and it trains."""

from __future__ import annotations

import os
import re

import pytest
from conftest import ROOT

from jaxtrain import run
from jaxtrain.experiment import config_text, find

NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("[!_]*.py"))
GOLDEN = ROOT / "tests" / "golden" / "configs"


@pytest.mark.parametrize("name", NAMES)
def test_config_equals_the_golden_text(name):
    """The resolved config of this experiment has changed, so its measured results no longer hold.

    If that is intended, run ``JAXTRAIN_UPDATE_GOLDEN=1 scripts/test tests/experiment`` and measure again what
    its docstring claims. If it is not, a default somewhere has changed.
    """
    experiment, _ = find(str(ROOT / "experiments" / f"{name}.py")).load()
    text = "".join(f"{path} = {value}\n" for path, value in config_text(experiment).items())
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("JAXTRAIN_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, test_config_equals_the_golden_text.__doc__


def test_every_golden_text_has_its_experiment():
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_docstring_gives_command_and_measurement(name):
    _, first = find(str(ROOT / "experiments" / f"{name}.py")).load()
    text = (ROOT / "experiments" / f"{name}.py").read_text()
    assert first and f"python -m jaxtrain.run --experiment {name}" in text
    assert re.search(r"^Measured: ", text, re.M)


@pytest.mark.full("tests/cli/test_cli.py::test_run_twice_then_new_then_evaluate")
def test_digits_cnn_passes_its_smoke_test(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run.main(["--experiment", str(ROOT / "experiments" / "digits_cnn.py"), "--smoke"]) == 0
    assert "smoke test of digits_cnn passed" in capsys.readouterr().out
