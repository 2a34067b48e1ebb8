"""docs/performance.md is what benchmarks.render makes of the results, every one of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def rendering() -> Any:
    spec = importlib.util.spec_from_file_location("render", ROOT / "benchmarks" / "render.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_matches_the_results() -> None:
    render = rendering()
    again = "run `python -m benchmarks.render` after measuring, and commit both"
    assert render.PAGE.read_text() == render.page(), again
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"## {path.stem}\n" in render.page()


def test_section_has_figures_device_and_missed_goals(tmp_path: Path) -> None:
    found = {"name": "a|b", "unit": "×", "median": 0.5, "q1": 0.4, "q3": 0.61234, "n": 7}
    record = {
        "command": "python -m benchmarks.some",
        "date": "2026-01-02",
        "device": "A CPU",
        "cores": 2,
        "load_before": 0.04,
        "versions": {"jax": "0.10.2"},
        "results": [found, found | {"name": "c", "goal": ">= 1", "met": False}],
        "figures": {"step_ms": {"fit": 12345.6, "all": [1, 2]}},
        "skipped": {"torch": "not installed"},
    }
    (tmp_path / "some.json").write_text(json.dumps(record))
    page = rendering().page(tmp_path)
    assert "2026-01-02, A CPU, 2 cores, jax 0.10.2, load 0.0." in page
    assert "| a\\|b | 0.5 × | 0.4 – 0.612 | 7 | – |" in page
    assert "| c | 0.5 × | 0.4 – 0.612 | 7 | >= 1: **missed** |" in page
    assert "- Not measured: torch: not installed." in page
    assert "| step_ms: fit | 12,346 |" in page and "[1, 2]" not in page
