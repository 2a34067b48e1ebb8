"""Faults of processes: kills, signals, a second writer, the loss of one of two processes."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from faults_bench import EXPERIMENT, OFTEN, ROOT, SOME, STEPS, Bench, Case, wait_for


def kills(bench: Bench) -> Iterator[Case]:
    """SIGKILL at any moment of training, half of them where every step saves and deletes."""
    chance = random.Random(0)
    for name, settings in (("SIGKILL while training", SOME), ("SIGKILL while saving and deleting", OFTEN)):
        case = Case(name)
        for _ in range(1 if bench.quick else 10):
            run, last = bench.fresh(), chance.randrange(2, STEPS - 5)
            process = bench.start(run, settings)
            if wait_for(process, f"step {last}/"):
                time.sleep(chance.random() * 0.05)
                process.kill()
            process.communicate()
            bench.judge(case, run, settings, *bench.finish(run, settings))
        yield case


def signals(bench: Bench) -> Iterator[Case]:
    """SIGTERM while compiling, stepping, evaluating and saving: exit 143, and the run resumes exactly."""
    case = Case("SIGTERM while compiling, stepping, evaluating, saving")
    looks = ("epochs=8", "eval_every=0.08", "log_every=1", "save_every=2")
    for settings, text in (
        (SOME, "starting"),
        (SOME, "step 40/"),
        (looks, "step 30/"),
        (OFTEN, "step 50/"),
    ):
        run = bench.fresh()
        process = bench.start(run, settings)
        wait_for(process, text)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
        if process.returncode != 143:
            case.add("lost", f"exit code {process.returncode} after {text}: {error.strip()[-200:]}")
            continue
        bench.judge(case, run, settings, *bench.finish(run, settings))
    yield case


def writers(bench: Bench) -> Iterator[Case]:
    """A second run in the same folder: rejected, and the first is not disturbed."""
    case, run = Case("two runs in one folder"), bench.fresh()
    first = bench.start(run, SOME)
    wait_for(first, "step 5/")
    first.send_signal(signal.SIGSTOP)  # or it has ended before the second one is there
    code, said = bench.finish(run, SOME)
    first.send_signal(signal.SIGCONT)
    out, error = first.communicate()
    if code != 2 or "in use" not in said:
        case.add("wrong", f"the second run ended with {code}: {said[-200:]}")
    else:
        bench.judge(case, run, SOME, first.returncode, out + error)
    yield case


def one_of_two(bench: Bench) -> Iterator[Case]:
    """One of two processes killed: the other ends too, and the run resumes as one process."""
    case, run = Case("one of two processes killed"), bench.fresh()
    command = [
        sys.executable,
        str(ROOT / "scripts" / "launch_local.py"),
        "-n",
        "2",
        "--devices-per-process",
        "1",
    ]
    command += ["--", "python", "-m", "jaxtrain.run", "--experiment", str(EXPERIMENT), "--workdir", str(run)]
    for setting in SOME:
        command += ["--set", setting]
    launcher = subprocess.Popen(
        command, env=bench.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(launcher, "[0] step 60/")
    for line in subprocess.check_output(["ps", "-eo", "pid,args"], text=True).splitlines():
        if str(run) in line and "--process-id 1" in line and "launch_local" not in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    launcher.communicate()
    code, said = bench.finish(run, SOME, "--simulate-devices", "2")
    if code or not re.search(r"resuming at step \d+/100", said):
        case.add("lost", f"exit code {code}: {said.strip()[-200:]}")
    else:  # other processes sum in another order: equal but for rounding
        case.add("survived")
    yield case
