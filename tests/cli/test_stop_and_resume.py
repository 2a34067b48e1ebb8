"""How a run stops and resumes: signals, SIGKILL, and a second run in the same folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import TINY, leaves, same

from jaxtrain import checkpoint
from jaxtrain.core.errors import InputError
from jaxtrain.train.run_folder import RunFolder


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(*args, devices=1):
    """Start ``python -m jaxtrain.run`` in another process."""
    command = [sys.executable, "-m", "jaxtrain.run", "--experiment", TINY, *args]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


LONG = ("--set", "epochs=300", "--set", "eval_every=none", "--set", "log_every=1")


def wait_for_step(process, step: int) -> None:
    """Read the output until ``step`` is logged."""
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.full(
    "tests/core/test_stop.py", "tests/train/test_loop.py::test_stop_and_resume_is_bitwise_the_straight_run"
)
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_prints_how_to_resume(signum, code):
    process = start(*LONG, "--workdir", "my run")
    wait_for_step(process, 30)
    process.send_signal(signum)
    _, error = process.communicate()
    assert process.returncode == code, error
    stopped = int(re.search(r"stopped after step (\d+) of 3750", error).group(1))
    with checkpoint.open(Path("my run")) as saved:
        assert saved.latest().step == stopped >= 30
    command = error.partition("resume with: ")[2]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "jaxtrain.run"] and words[-1] == "my run"
    resumed = start(*words[5:])
    line = next(line for line in resumed.stdout if "resuming at" in line)
    resumed.kill()
    resumed.communicate()
    assert f"resuming at step {stopped}/3750" in line


@pytest.mark.full("tests/train/test_loop.py::test_stop_and_resume_is_bitwise_the_straight_run")
@pytest.mark.parametrize("devices", [1, 8])
def test_a_killed_run_resumes_bit_for_bit(devices):
    """After SIGKILL only the last checkpoint is left; the order of the data is a function of the step."""
    few = ("--set", "epochs=8", "--set", "eval_every=none", "--set", "log_every=1", "--set", "save_every=2")
    straight = start(*few, "--workdir", "a", devices=devices)
    killed = start(*few, "--workdir", "b", devices=devices)
    wait_for_step(killed, 60)
    while not list(Path("b/checkpoints").glob("*/manifest.json")):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert straight.communicate() and straight.returncode == 0
    resumed = start(*few, "--workdir", "b", devices=devices)
    out, error = resumed.communicate()
    assert resumed.returncode == 0, error
    assert re.search(r"resuming at step (25|50)/100", out)
    same(leaves("a"), leaves("b"))
    a, b = (json.loads(Path(f, "result.json").read_text())["test"] for f in "ab")
    assert a == b


@pytest.mark.full("tests/core/test_stop.py")
def test_a_second_interrupt_while_saving_does_not_hang(python):
    """An interrupted save leaves threads behind that wait forever."""
    code = f"""
import os, signal, sys, threading, time
from orbax.checkpoint import v1
from jaxtrain import run
from jaxtrain.cli import command_line

def never_ends(*args, **kwargs):
    threading.Thread(target=threading.Event().wait).start()
    while True:  # in the thread that writes; two signals at once would be one
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)

v1.save_async = never_ends
command_line.exit_process(run.main(["--experiment", {TINY!r}, "--workdir", "r"]))
"""
    done = python("-c", code)
    assert done.returncode == 130 and "interrupted at once" in done.stderr


@pytest.mark.full("tests/core/test_stop.py")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(signum, code):
    """A step of this batch takes so long that the second signal arrives before the loop checks the first."""
    process = start(*LONG, "--workdir", "r", "--set", "batch=20000", "--set", "epochs=30000")
    wait_for_step(process, 2)
    process.send_signal(signum)
    time.sleep(0.05)
    process.send_signal(signum)
    _, error = process.communicate()
    assert process.returncode == code and "interrupted at once" in error
    assert error.count("\n") == 1


@pytest.mark.full("tests/train/test_loop.py")
def test_a_second_run_in_one_folder_is_refused(capsys):
    process = start(*LONG, "--workdir", "r")
    wait_for_step(process, 2)
    in_use = rf"r is in use by another run \(pid {process.pid} on"
    with pytest.raises(InputError, match=in_use), RunFolder("r").locked():
        pass
    process.kill()
    process.communicate()
    with RunFolder("r").locked():  # a killed run leaves no lock
        pass
