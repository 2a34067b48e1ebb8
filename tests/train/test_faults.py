"""A short slice of ``scripts/faults``: kills, damaged files and the way back, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.full("tests/checkpoint/test_checkpoint.py")
def test_nothing_is_lost_and_nothing_is_silently_wrong_in_a_few_trials(tmp_path):
    cases = run_faults(tmp_path / "table.json", "--quick")
    assert len(cases) == 7


@pytest.mark.nightly("tests/checkpoint/test_checkpoint.py")
def test_nothing_is_lost_and_nothing_is_silently_wrong(tmp_path):
    """The 392 faults of docs/reliability.md: a quarter of an hour on two cores."""
    assert run_faults(tmp_path / "table.json")


def run_faults(table, *arguments):
    """Run the fault suite; returns its cases by name, of which none of ours may lose or misread anything."""
    command = [sys.executable, str(ROOT / "scripts" / "faults.py"), *arguments, "--json", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = {case["name"]: case for case in json.loads(table.read_text())["cases"]}
    assert all(case["tried"] for case in cases.values())
    for case in (case for case in cases.values() if case["ours"]):
        assert case["survived"] == case["tried"] and not case["lost"] + case["wrong"], case
    return cases
