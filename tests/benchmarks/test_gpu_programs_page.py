"""The page of GPU programs shows the recorded table."""

from __future__ import annotations

import json

from conftest import ROOT

from benchmarks import gpu_programs


def test_the_page_shows_the_recorded_rows():
    """``python -m benchmarks.gpu_programs --markdown`` prints what belongs there."""
    found, before = (
        json.loads((gpu_programs.RESULTS / name).read_text()) for name in ("h100.json", "h100-before.json")
    )
    page = (ROOT / "docs" / "gpu-programs.md").read_text()
    assert gpu_programs.markdown(found, before) in page
    assert {key for key, _ in gpu_programs.cases(gpu_programs.names())} == found["rows"].keys()


def test_a_changed_figure_has_an_arrow_and_an_error_its_reason():
    new = {"launches": 5, "bytes_per_device": {"temporaries": 2e6}, "traffic": 3e7}
    new["overlap"] = [{"count": 2, "bytes": 1e6}]
    rows = {"a": new, "b": {"error": "jaxtrain plan: no"}}
    lines = gpu_programs.markdown({"rows": rows}, {"rows": {"a": new | {"launches": 7}}}).splitlines()
    assert lines[2:] == ["| a | 7 → 5 | 2.0 | 30 | 2 | 1.0 |", "| b | – | | | no | |"]
