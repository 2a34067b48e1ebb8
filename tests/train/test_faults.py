"""A short slice of ``scripts/faults``: kills, damaged files and the way back, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.full("tests/checkpoint/test_checkpoint.py")
def test_nothing_is_lost_and_nothing_is_silently_wrong(tmp_path):
    table = tmp_path / "table.json"
    command = [sys.executable, str(ROOT / "scripts" / "faults.py"), "--quick", "--json", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = {case["name"]: case for case in json.loads(table.read_text())["cases"]}
    assert len(cases) == 7 and all(case["tried"] for case in cases.values())
    for case in (case for case in cases.values() if case["ours"]):
        assert case["survived"] == case["tried"] and not case["lost"] + case["wrong"], case
