"""What benchmarks.loop and benchmarks.peers compare: the same training, and refused where it is not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

from benchmarks import common, sides
from benchmarks.peers import compare, flax_stock
from jaxtrain import data, models

BATCH = 8


@pytest.fixture(scope="module")
def case() -> sides.Case:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((32, 4, 4, 1), np.float32)
    source = data.Arrays({"image": image, "label": rng.integers(0, 10, 32, np.int32)})
    return sides.Case(sides.experiment(models.MLP(widths=(8,)), source, BATCH, log_every=2), chunk=4)


@pytest.fixture(scope="module")
def program(case: sides.Case) -> Any:
    return sides.assemble_without_saves(case.experiment)


@pytest.mark.full(
    "tests/benchmarks/test_benchmark_sides.py::test_fastest_variant_of_a_peer_counts_and_goals_are_stated"
)
def test_equal_losses_pass_and_a_different_training_is_rejected(case: sides.Case, program: Any) -> None:
    with contextlib.ExitStack() as stack:
        each = {
            "jaxtrain": sides.Fit(program, stack),
            "hand": sides.Hand(case, program),
            "stock flax": flax_stock.Loop(
                flax_stock.StockMLP((8,)), case.experiment, case.tx, program.init()
            ),
        }
        losses = compare.check("mlp", compare.Sides(each, {}, 1))
        assert len(losses) == 3 and losses["hand"][0] > losses["hand"][2]
        other = dataclasses.replace(case, tx=optax.sgd(0.1, momentum=0.9))
        each["jaxtrain"] = sides.Hand(other, program)
        with pytest.raises(SystemExit, match="mlp: these are not the same training"):
            compare.check("mlp", compare.Sides(each, {}, 1))


@pytest.mark.full("tests/benchmarks/test_performance_page.py")
def test_peer_that_cannot_compile_is_skipped_and_other_errors_raise(case: sides.Case, program: Any) -> None:
    class Broken:
        def losses(self, count: int) -> list[float]:
            raise RuntimeError("no compiler\nfar too much text")

    hand = sides.Hand(case, program)
    found = compare.Sides({"hand": hand, "torch.compile, contiguous": Broken()}, {}, 1)
    compare.check("mlp", found)
    assert list(found.each) == ["hand"]
    assert found.skipped == {"mlp: torch.compile, contiguous": "RuntimeError: no compiler"}
    with pytest.raises(RuntimeError):
        compare.check("mlp", compare.Sides({"hand": hand, "torch eager": Broken()}, {}, 1))


@pytest.mark.full("tests/benchmarks/test_benchmark_sides.py")
@pytest.mark.parametrize("together", [1, 2])
def test_chunk_continues_after_the_last_one(
    program: Any, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(str(tmp_path)))
    with contextlib.ExitStack() as stack:
        fit = sides.Fit(program, stack, together)
        for _ in range(2):
            fit.steps(4)
        assert int(fit._state.step) == 8
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]


def test_fastest_variant_of_a_peer_counts_and_goals_are_stated() -> None:
    times = {"jaxtrain": [1.0], "hand": [2.0], "torch eager, contiguous": [3.0]}
    times |= {"torch eager, channels_last": [0.5]}
    found = {line["name"]: line for line in compare.ratios("lenet_128", times)}
    assert found["lenet_128: steps/s, jaxtrain over hand"]["median"] == 2
    torch = found["lenet_128: steps/s, jaxtrain over torch eager, channels_last"]
    assert torch["median"] == 0.5 and torch["goal"] == ">= 1" and not torch["met"] and len(found) == 2
    assert "goal" not in common.speedup("any", [1.0], [1.0])
