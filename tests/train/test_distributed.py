"""Two real processes of four devices each: the same numbers, one writer, runs that move between meshes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import parallel_cases as cases
import pytest
from conftest import ROOT
from test_parallel import one_device

from jaxtrain import checkpoint, sharding
from jaxtrain.data import Order
from jaxtrain.experiment import find
from jaxtrain.experiment.overrides import override
from jaxtrain.program import assemble

TESTS = Path(__file__).parents[1]
EXPERIMENT = TESTS / "distributed_run.py"
CASES = ["mlp/data=2,fsdp=4"]
MORE = ["mlp/data=8", "cnn/fsdp=8", "resnet/data=8", "gpt/data=2,fsdp=2,model=2"]


def launch(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """``python -m jaxtrain.run`` on the test's experiment, as two processes with four devices each."""
    command = [
        sys.executable,
        ROOT / "scripts" / "launch_local.py",
        "-n",
        2,
        "--devices-per-process",
        4,
        "--",
    ]
    command += ["python", "-m", "jaxtrain.run", "--experiment", EXPERIMENT, *words]
    return subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.fixture(scope="module")
def float64(tmp_path_factory, request):
    """Results on two processes, of the cases that this tier runs."""
    name = "test_two_processes_train_as_one_device"
    items = [item for item in request.session.items if getattr(item, "originalname", "") == name]
    wanted = [item.callspec.params["case"] for item in items if not item.get_closest_marker("skip")]
    folder = tmp_path_factory.mktemp("float64")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}"}
    words = list(map(str, [sys.executable, TESTS / "distributed_child.py", port]))
    both = [
        subprocess.Popen(
            [*words, str(i), str(folder), *wanted],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    return folder


@pytest.mark.full("[mlp/data=2,fsdp=4]")
@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_two_processes_train_as_one_device(case, float64):
    want, want_ids = one_device(case.split("/")[0])
    got = dict(np.load(float64 / f"{case.replace('/', '-')}.npz"))
    np.testing.assert_array_equal(got.pop("ids"), want_ids)
    assert cases.distance(got, want) < 1e-9


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A run of one epoch each on 2 × 4 devices, 1 × 8, 1 × 1 and again 2 × 4, resumed in between."""
    folder = tmp_path_factory.mktemp("moved")
    dispatches = ("--set", "steps_per_execution=3")
    first = launch(folder, "--workdir", "run", "--mesh", "data=2,fsdp=4", *dispatches)
    for epochs, words in ((2, ("8", "--mesh", "fsdp=8")), (3, ("1",))):
        command = [sys.executable, "-m", "jaxtrain.run", "--experiment", str(EXPERIMENT), "--workdir", "run"]
        command += [*dispatches, "--set", f"epochs={epochs}", "--simulate-devices", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"resuming at step {10 * (epochs - 1)}/{10 * epochs}" in done.stdout
    again = launch(folder, "--workdir", "run", "--mesh", "data=4,model=2", "--set", "epochs=4", *dispatches)
    return folder, first, again


@pytest.mark.full("tests/train/test_distributed.py::test_two_processes_train_as_one_device")
def test_a_run_moves_between_two_processes_and_one(moved, tmp_path):
    folder, first, again = moved
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert "8 × cpu (data=2,fsdp=4), 2 processes, batch 16 (2 per device)" in first.stdout
    assert "[0] resuming at step 30/40" in again.stdout
    assert json.loads((folder / "run" / "result.json").read_text())["resumed_from"] == 30

    experiment = override(find(str(EXPERIMENT)).load()[0], ["epochs=4"])
    program = assemble(experiment, sharding.make_mesh(jax.devices()[:1]))
    state = program.init()
    for step in range(program.steps):
        state, _ = program.train_step(state, program.train.batch(step), program.key)
    program.close()
    with checkpoint.open(folder / "run") as saved:
        moved_state = saved.restore(saved.latest(), program.abstract_state)
    for ours, theirs in zip(jax.tree.leaves(moved_state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.full("tests/train/test_distributed.py::test_two_processes_train_as_one_device")
def test_only_process_0_prints_and_writes(moved):
    folder, first, _ = moved
    ours = ("step", "loss", "starting", "distributed_run", "note")  # Gloo has lines of its own, in pieces
    own = [line for line in first.stdout.splitlines() if any(word in line for word in ours)]
    assert len(own) > 4 and all(line.startswith("[0] ") for line in own)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train/loss" in r] == list(range(5, 45, 5))
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 4  # one file for each start


@pytest.mark.full("tests/train/test_distributed.py::test_two_processes_train_as_one_device")
def test_each_process_reads_only_its_rows(moved):
    folder, _, _ = moved
    reads = [
        [list(map(int, line.split())) for line in (folder / f"reads-{i}.txt").read_text().splitlines()]
        for i in range(2)
    ]
    experiment = find(str(EXPERIMENT)).load()[0]
    order = Order(experiment.seed, 160, 16)
    halves = [[row.tolist() for row in np.split(order.indices(step), 2)] for step in range(10)]
    for process, done in enumerate(reads):
        # 2 to see what the source returns; process 0 identifies the data by 32 spread over them
        assert {len(ids) for ids in done} <= ({2, 8} if process else {2, 8, 32})
        for step in range(10):
            assert halves[step][process] in done
            assert halves[step][1 - process] not in done


@pytest.mark.full("tests/core/test_stop.py")
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    (tmp_path / "stop").touch()
    stopped = launch(tmp_path, "--workdir", "run", "--set", "epochs=50")
    assert stopped.returncode == 143, stopped.stdout + stopped.stderr
    assert stopped.stderr.count("stopped after step") == 1
    assert "resume with: the same command in each of the 2 processes, with --workdir run" in stopped.stderr
    with checkpoint.open(tmp_path / "run") as saved:
        step = saved.latest().step
    assert f"stopped after step {step} of 500" in stopped.stderr


@pytest.mark.full("tests/sharding/test_processes.py::test_missing_processes_are_named_in_every_process")
def test_each_process_prints_an_error_at_most_once(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    refused = launch(tmp_path, "--workdir", "run")
    assert refused.returncode == 2
    lines = [line for line in refused.stderr.splitlines() if "is not empty and holds no run" in line]
    prefixes = [line[:3] for line in lines]  # launch_local may end a process before it prints its own
    assert set(prefixes) <= {"[0]", "[1]"} and 1 <= len(prefixes) == len(set(prefixes))
    assert "Traceback" not in refused.stderr


@pytest.mark.full("tests/train/test_distributed.py::test_two_processes_train_as_one_device")
@pytest.mark.parametrize(
    ("how", "code", "message"),
    [("bug", 3, "ValueError: a bug of process 1"), ("kill", 137, "")],
)
def test_a_failed_process_ends_the_others(how, code, message, tmp_path):
    """JAX would wait for the others at exit, and they for it; launch_local ends them."""
    (tmp_path / how).touch()
    ended = launch(tmp_path, "--workdir", "run", "--set", "epochs=50")
    assert ended.returncode == code, ended.stderr
    assert message in ended.stderr and f"process 1 exited with {code}" in ended.stderr
