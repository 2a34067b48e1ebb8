"""scripts/gpu_check.py without a GPU: time limits, what is cut, what fails, and one program for all seeds."""

import dataclasses
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import EXPERIMENT

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks is no part of the package

from benchmarks import common  # noqa: E402
from benchmarks.gpu import airbench  # noqa: E402
from benchmarks.gpu import session as sessions  # noqa: E402
from benchmarks.gpu.session import Failed, Session, Skipped, TimedOut  # noqa: E402
from jaxtrain import models, sharding  # noqa: E402
from jaxtrain.program import assemble  # noqa: E402

GROWS = """
import sys, time
print('{"results": [1]}', flush=True)
print("a warning", flush=True)
if sys.argv[1:] == ["hangs"]:
    print('{"results": [1, 2]}', flush=True)
    print('{"results": [1, 2, ', end="", flush=True)
    time.sleep(60)
if sys.argv[1:] == ["fails"]:
    sys.exit("out of luck")
"""

ANSWERS = """
import sys
print('{"ready": true}', flush=True)
for line in sys.stdin:
    if line.startswith("die"):
        sys.exit("out of memory")
    print('{"seconds": %d}' % len(line), flush=True)
"""


@pytest.fixture(scope="module")
def check():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def session(tmp_path):
    """Five seconds for a part, and room for a module of a test's own."""
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    now = time.monotonic()
    return Session(tmp_path, None, True, env, deadline=now + 100, limit=5, began=now)


def test_part_that_times_out_returns_its_partial_results(session, tmp_path):
    (tmp_path / "grows.py").write_text(GROWS)
    assert session.child(module="grows") == {"results": [1]}
    session.limit = 2
    found = session.child("hangs", module="grows")
    assert found["results"] == [1, 2] and "not finished in 2 s" in found["cut"]
    session.limit = 100
    with pytest.raises(Failed, match=r"exit code 1 instead of 0: .*out of luck"):
        session.child("fails", module="grows")


def test_what_a_part_has_started_ends_with_it(session, tmp_path, monkeypatch):
    (tmp_path / "grows.py").write_text(GROWS)
    process = session.start("-m", "grows", "hangs")
    wait = process.communicate

    def communicate(timeout=None):
        monkeypatch.setattr(process, "communicate", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "communicate", communicate)
    with pytest.raises(KeyboardInterrupt):
        session.end(process, 0)
    assert process.poll() is not None


def test_sides_answer_in_turn_and_report_their_last_output(session, tmp_path):
    (tmp_path / "answers.py").write_text(ANSWERS)
    with session.side(module="answers") as one, session.side(module="answers") as other:
        assert one.answer() == other.answer() == {"ready": True}
        times = common.interleave(
            {"a": lambda: one.ask("xla", 2)["seconds"], "b": lambda: other.ask("y", 2)["seconds"]}, 3
        )
        assert times == {"a": [6, 6, 6], "b": [4, 4, 4]}
        with pytest.raises(Failed, match=r"exit code 1: .*out of memory") as error:
            one.ask("die")
        assert error.value.output.count("seconds") == 4
    assert other._process.poll() is not None


def test_parts_fail_independently_and_a_missed_goal_is_a_result(check, session, monkeypatch):
    missed = common.result("speed", [0.9, 0.8], "×", ">= 1.1")

    def raises(error):
        def part(session):
            raise error

        return part

    parts = {
        "measured": (lambda session: {"results": [missed]}, 50),
        "skipped": (raises(Skipped("no torch")), 50),
        "failed": (raises(Failed("other bits")), 50),
        "broken": (raises(KeyError("x")), 50),
        "slow": (raises(TimedOut("not finished in 50 s")), 50),
        "cut": (raises(TimedOut("not finished in 99 s")), 1000),
        "later": (lambda session: {}, 50),
    }
    monkeypatch.setattr(check, "PARTS", parts)
    kept = []

    def keep(found):
        kept.append(json.loads(json.dumps(check.make_record({"device": "none"}, None, found))))
        if "cut" in found:
            session.deadline = time.monotonic() + 1

    found = check.run_parts(session, list(parts), keep)
    status = {name: part["status"] for name, part in found.items()}
    assert status == {
        "measured": "ok",
        "skipped": "skipped",
        "failed": "failed",
        "broken": "failed",
        "slow": "failed",
        "cut": "skipped",
        "later": "skipped",
    }
    session.patience = 2.0
    assert check.run_parts(session, ["later"], lambda found: None)["later"]["status"] == "skipped"
    session.deadline = time.monotonic() + 99
    assert (
        check.run_parts(session, ["slow"], lambda found: None)["slow"]["status"] == "skipped"
    )  # cut at 99 s
    assert [len(record["parts"]) for record in kept] == list(range(1, 8))
    assert kept[-1]["results"] == [missed] and not missed["met"]
    assert kept[-1]["skipped"]["later"] == "no time left" and "measured" not in kept[-1]["skipped"]
    assert "goal >= 1.1 MISSED" in check.format_part("measured", found["measured"])


def test_missing_requirements_are_reported_by_every_part(check, session, monkeypatch):
    monkeypatch.setattr(check, "REQUIRED", ("jax", "no_such_package"))
    found = check.run_parts(session, ["doctor"], lambda found: None)
    assert found["doctor"]["why"] == "no_such_package is not installed"
    assert sessions.missing("jax", "flax") is None


@pytest.mark.full("tests/benchmarks/test_gpu_check.py")
def test_airbench_changes_seed_without_compiling(caplog):
    """The state, the key and the batches of ``Experiment(seed=3)``, with the functions of seed 0."""
    exp = dataclasses.replace(EXPERIMENT, model=models.MLP(widths=(8,), classes=4), augment=(), epochs=0.16)
    recipe = airbench.Recipe(exp)
    program, init = recipe.with_seed(3)
    there = assemble(dataclasses.replace(exp, seed=3), sharding.make_mesh(jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (init(), there.init())))
    assert jax.random.key_data(program.key).tolist() == jax.random.key_data(there.key).tolist()
    np.testing.assert_array_equal(program.train.batch(1)["rows"], there.train.batch(1)["rows"])
    with jax.log_compiles():
        first = recipe.run(0, 1)
        assert "Compiling" in caplog.text
        caplog.clear()
        again = [recipe.run(seed, 1) for seed in (0, 3)]
        assert "Compiling" not in caplog.text
    assert again[0]["accuracy"] == first["accuracy"]
    parts = sum(first[f"{name}_seconds"] for name in ("whiten", "train", "evaluate"))
    assert first["seconds"] == pytest.approx(parts)
