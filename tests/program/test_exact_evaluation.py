"""Evaluation is of exactly the N examples, each once: N about the batch, one device, eight, two processes."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluation_cases as cases
import numpy as np
import pytest
from conftest import ROOT

from jaxtrain import __main__ as commands
from jaxtrain import checkpoint
from jaxtrain.core.types import leaf_paths
from jaxtrain.monitor.console import Plain
from jaxtrain.train.loop import evaluate

TESTS = Path(__file__).parents[1]
N = cases.BATCH + 1


@pytest.fixture(params=[1, 8], ids=["one device", "eight"])
def mesh(request, mesh1, mesh8):
    return {1: mesh1, 8: mesh8}[request.param]


@pytest.mark.full("[eight-1-device]")
@pytest.mark.parametrize("placement", ["device", "stream"])
@pytest.mark.parametrize("n", cases.SIZES)
def test_images(n, placement, mesh):
    values, params = cases.run_evaluation(cases.make("images", n, mesh, placement))
    cases.check("images", n, values, params)
    assert values["counts"].sum() == n


@pytest.mark.full("[eight-regression]")
@pytest.mark.parametrize("kind", cases.KINDS[1:])
def test_tokens_and_numbers(kind, mesh):
    """Figures that are a mean over more than examples: over tokens, and over the elements of a target."""
    values, params = cases.run_evaluation(cases.make(kind, N, mesh, "stream"))
    cases.check(kind, N, values, params)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes of four devices each have found, all cases in one go."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}"}
    words = [sys.executable, str(TESTS / "evaluation_cases.py"), str(port)]
    both = [
        subprocess.Popen([*words, str(i), str(folder)], env=env, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    return folder


@pytest.mark.full("tests/program/test_exact_evaluation.py::test_images")
@pytest.mark.parametrize(("kind", "n", "placement"), cases.TOGETHER)
def test_two_processes(kind, n, placement, together):
    parts: dict[str, dict[str, Any]] = {"values": {}, "params": {}}
    for path, array in np.load(together / f"{kind}-{n}-{placement}.npz").items():
        part, _, name = path.partition("/")
        parts[part][name] = array
    cases.check(kind, n, parts["values"], parts["params"])


@dataclasses.dataclass
class Poisoned:
    """A loader whose padding rows hold invalid values instead of copies of an example."""

    loader: Any

    def batch(self, step: int) -> dict[str, np.ndarray]:
        found = {name: np.array(array) for name, array in self.loader.batch(step).items()}
        for name, array in found.items():
            if name != "mask":
                array[~found["mask"]] = np.nan if array.dtype == np.float32 else 10**6
        return found


@pytest.mark.full("[eight-sequences]")
@pytest.mark.parametrize("kind", cases.KINDS)
def test_padding_values_are_ignored(kind, mesh):
    """NaN in inputs and targets, labels and tokens that there are none of."""
    program = cases.make(kind, N, mesh, "stream")
    split = program.evals["test"]
    poisoned = dataclasses.replace(split, loader=Poisoned(split.loader))
    assert np.isnan(poisoned.loader.batch(1).get("image", np.nan)).sum() > 0
    _, params = cases.run_evaluation(program)
    values = evaluate(dataclasses.replace(program, evals={"test": poisoned}), program.init(), "test", Plain())
    program.close()
    cases.check(kind, N, values, params)


FILE = """
import evaluation_cases as cases
EXPERIMENT = cases.experiment("images", cases.BATCH + 1, "auto")
"""


@pytest.mark.full("tests/program/test_exact_evaluation.py::test_images")
def test_evaluate_command_counts_each_example_once(tmp_path, capsys, mesh1, monkeypatch):
    """``python -m jaxtrain evaluate`` on a run of one step, by one device and by eight."""
    monkeypatch.chdir(tmp_path)
    Path("seventeen.py").write_text(FILE)
    assert commands.main(["run", "--experiment", "seventeen.py", "--workdir", "r", "--devices", "1"]) == 0
    capsys.readouterr()
    program = cases.make("images", N, mesh1, "auto")
    with checkpoint.open("r") as saved:
        params = leaf_paths(saved.restore(saved.latest(), program.abstract_state).params)
    fields = cases.fields("images", N)
    expected = cases.expected("images", fields, params)
    counts = expected.pop("counts")
    for words in (["--devices", "1"], ["--devices", "8"]):
        assert (
            commands.main(["evaluate", "--workdir", "r", "--experiment", "seventeen.py", "--json", *words])
            == 0
        )
        found = json.loads(capsys.readouterr().out)
        assert found["examples"] == N and found["step"] == 1
        assert (found["accuracy"], found["top2"]) == (expected["accuracy"], expected["top2"])
        assert found["loss"] == pytest.approx(expected["loss"], rel=cases.RELATIVE)
        hits, true, guessed = np.diag(counts), counts.sum(1), counts.sum(0)
        assert found["recall"] == [h / t if t else 0 for h, t in zip(hits, true, strict=True)]
        assert found["precision"] == [h / g if g else 0 for h, g in zip(hits, guessed, strict=True)]


@pytest.mark.full("[images]")
@pytest.mark.parametrize("kind", cases.KINDS)
def test_cases_detect_a_wrong_mask(kind, mesh1):
    """One example counted twice, or left out, moves the mean by much more than ``check`` allows."""
    for n in cases.SIZES[1:]:
        program, fields = cases.make(kind, n, mesh1, "stream"), cases.fields(kind, n)
        params = leaf_paths(program.init().params)
        program.close()
        exact = cases.expected(kind, fields, params)["loss"]
        for rows in ([*range(n), 0], [*range(n), n - 1], [*range(n - 1)], [*range(n), *range(n)][1:]):
            wrong = cases.expected(kind, {name: field[rows] for name, field in fields.items()}, params)[
                "loss"
            ]
            assert abs(wrong / exact - 1) > 100 * cases.RELATIVE
