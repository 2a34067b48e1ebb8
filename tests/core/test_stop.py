"""Stopping, in processes that wait for something no signal interrupts: as for a device or a disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from jaxtrain.core.signals import GRACE, heartbeat, on_signals, watchdog

STUCK = """
import ctypes, pathlib, sys, time
from jaxtrain.core import signals

def stuck():
    mutex = ctypes.create_string_buffer(256)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    print("waiting", flush=True)
    lock(mutex)  # for ever, and no signal's handler runs
"""


def start(text: str, cwd: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK + text],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    return process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_process_ends_after_the_grace_period(signum, tmp_path):
    process = start("with signals.on_signals(grace=0.5): stuck()", tmp_path)
    began = time.monotonic()
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and time.monotonic() - began >= 0.5
    assert error == "jaxtrain: not stopped within 0.5 s, so ended; the last complete checkpoint is kept\n"


def test_a_second_signal_ends_a_process_blocked_in_c(tmp_path):
    process = start("with signals.on_signals(grace=1e6): stuck()", tmp_path)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None, "the first one only asks"
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error == "jaxtrain: interrupted at once; the last complete checkpoint is kept\n"


def test_the_first_signal_is_a_request_and_the_second_an_interrupt():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), on_signals() as request:
        assert request.signum is None and GRACE == 30
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signum == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1, "nothing is left behind"
    assert "signals" not in [thread.name for thread in threading.enumerate()]


def test_a_request_handled_in_time_does_not_end_the_process():
    with on_signals(grace=0.2) as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signum == signal.SIGINT
    time.sleep(0.4)  # the deadline has passed outside of the block


def test_without_a_grace_period_the_process_is_never_ended():
    """In a notebook the process is not ours to end: only the second signal's exception is raised."""
    with pytest.raises(KeyboardInterrupt), on_signals(grace=None) as request:
        assert "signals" not in [thread.name for thread in threading.enumerate()]
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_requests_outside_the_main_thread():
    seen = []

    def work() -> None:
        with on_signals() as request:
            seen.append(request.signum)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


def test_watchdog_ends_a_hanging_run_and_writes_its_stacks(tmp_path):
    process = start("with signals.watchdog(0.5, pathlib.Path('hang.txt')): stuck()", tmp_path)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3
    assert re.fullmatch(r"jaxtrain: no progress for 0.5 s, .* are in hang.txt\n", error)
    stacks = (tmp_path / "hang.txt").read_text()
    assert "in stuck" in stacks and "Current thread" in stacks


def test_watchdog_prints_stacks_that_cannot_be_written(tmp_path):
    process = start("with signals.watchdog(0.5, pathlib.Path('no/hang.txt')): stuck()", tmp_path)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3 and "in stuck" in error
    assert "no/hang.txt cannot be written (No such file or directory)" in error


def test_watchdog_does_not_end_a_run_with_heartbeats(tmp_path):
    with watchdog(0.4, tmp_path / "hang.txt"):
        for _ in range(8):
            time.sleep(0.1)
            heartbeat()
    with watchdog(None, tmp_path / "hang.txt"):
        pass
    time.sleep(0.5)
    assert not list(tmp_path.iterdir())


HANGS = """'''Data that stop coming.'''
import threading
import numpy as np
from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

class Hangs(data.Arrays):
    def gather(self, indices):
        if len(indices) == 16 and 40 in indices:
            threading.Event().wait()
        return super().gather(indices)

fields = {"image": np.zeros((64, 4), np.uint8), "label": np.zeros(64, np.int32)}
EXPERIMENT = Experiment(
    model=models.MLP(widths=(), classes=2), train=Hangs(fields), test=data.Arrays(fields),
    loss=losses.CrossEntropy(), optimizer=optim.SGD(lr=0.1), preprocess=(data.Normalise(),),
    batch=16, epochs=2, placement="stream",
)
"""


@pytest.mark.full("tests/core/test_stop.py::test_watchdog_ends_a_hanging_run_and_writes_its_stacks")
def test_watchdog_ends_a_run_whose_data_stop(tmp_path, python):
    (tmp_path / "hangs.py").write_text(HANGS)
    words = ["-m", "jaxtrain.run", "--experiment", "./hangs.py", "--workdir", "r", "--hang-after", "5"]
    done = python(*words, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stderr.endswith("so the run has been ended; the stacks of its threads are in r/hang-0.txt\n")
    assert "in gather" in (tmp_path / "r" / "hang-0.txt").read_text()
