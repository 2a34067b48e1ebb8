"""scripts/launch_local.py, slurm.sbatch and jobset.yaml: what they start, and how it exits."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # flax and orbax need it
from conftest import ROOT

from jaxtrain import sharding
from jaxtrain.cli import run

SCRIPTS = ROOT / "scripts"
SBATCH = (SCRIPTS / "slurm.sbatch").read_text()
DOCUMENTS = list(yaml.safe_load_all((SCRIPTS / "jobset.yaml").read_text()))
JOBSET = DOCUMENTS[-1]

COPY = """
import signal, sys, time
number = int(sys.argv[-1])
def wait():
    while True:
        time.sleep(0.02)
print("argv", *sys.argv[1:])
print("to stderr", file=sys.stderr)
"""


@pytest.fixture
def launch(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Start launch_local.py with a small script as the command."""

    def start(code: str, *options: str) -> subprocess.Popen[str]:
        script = tmp_path / "copy.py"
        script.write_text(COPY + code)
        return subprocess.Popen(
            [sys.executable, SCRIPTS / "launch_local.py", *options, "--", "python", script, "own"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Wait for the process; returns its exit code, its sorted output lines and its stderr."""
    with process:
        out, err = process.communicate(timeout=60)
    return process.returncode, sorted(out.splitlines()), err


def test_each_process_gets_its_index_and_the_same_coordinator(launch) -> None:
    code, lines, err = finish(launch("", "-n", "3", "--devices-per-process", "4"))
    assert code == 0
    port = re.search(r"127\.0\.0\.1:(\d+)", lines[0])
    assert port is not None
    assert lines == [
        f"[{i}] argv own --simulate-devices 4 --coordinator {port[0]} --processes 3 --process-id {i}"
        for i in range(3)
    ]
    assert sorted(err.splitlines()) == [f"[{i}] to stderr" for i in range(3)]


def test_python_is_this_interpreter_and_devices_are_simulated_only_on_request(launch) -> None:
    code, lines, _ = finish(launch("print(sys.executable)", "-n", "1"))
    assert code == 0 and not any("--simulate-devices" in line for line in lines)
    assert f"[0] {sys.executable}" in lines and os.access(SCRIPTS / "launch_local.py", os.X_OK)


def test_a_failed_process_terminates_the_others_and_sets_the_exit_code(launch) -> None:
    code, _, err = finish(launch("sys.exit(3) if number == 1 else wait()", "-n", "3"))
    assert code == 3
    assert "process 1 exited with 3: terminating the others" in err and "killed" not in err


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(launch, tmp_path) -> None:
    ignores_sigterm = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
import os, pathlib
if number == 0:
    while not pathlib.Path({str(tmp_path / "child")!r}).exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
child = os.fork()
if child:
    temporary = pathlib.Path({str(tmp_path / "temporary")!r})
    temporary.write_text(str(child))
    temporary.rename({str(tmp_path / "child")!r})
wait()
"""
    code, _, err = finish(launch(ignores_sigterm, "-n", "2", "--grace", "0.3"))
    assert code == 128 + 9 and "1 of 2 processes did not exit within 0.3 s: killed" in err
    child = int((tmp_path / "child").read_text())
    for _ in range(500):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        raise AssertionError("its child is still running")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_forwarded_once_and_processes_can_save(launch, signum) -> None:
    saving = """
caught = []
for one in (signal.SIGINT, signal.SIGTERM):
    signal.signal(one, lambda signum, frame: caught.append(signum))
print("ready")
while not caught:
    time.sleep(0.02)
time.sleep(0.3 * number)
print("saved", *caught)
sys.exit(128 + caught[0])
"""
    process = launch(saving, "-n", "3", "--grace", "0.1")
    before: list[str] = []
    while sum("ready" in line for line in before) < 3:
        before.append(process.stdout.readline())
    process.send_signal(signum)
    code, lines, errors = finish(process)
    assert code == 128 + signum
    assert lines == [f"[{i}] saved {int(signum)}" for i in range(3)]
    assert f"launch_local: stopped by {signal.Signals(signum).name}" in str(errors)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["-n", "2"], "give the command after --"),
        (["-n", "0", "--", "x"], "give at least 1"),
        (["-n", "2", "--", "no-such-command"], "no-such-command cannot be started: No such file"),
    ],
)
def test_bad_input_is_refused(options, text) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "launch_local.py", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr


def parse(words: list[str]) -> argparse.Namespace:
    """Parse the words after ``python -m jaxtrain.run`` as it does."""
    assert words[:3] == ["python", "-m", "jaxtrain.run"]
    return run.make_parser().parse_args(words[3:])


def options(text: str) -> dict[str, str]:
    """Parse the #SBATCH lines, and check the form of each."""
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    found = {}
    for line in lines:
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
        assert match, line
        found[match[1]] = match[2] or ""
    assert len(found) == len(lines)
    return found


def test_the_slurm_script_is_valid_bash_with_the_options_that_jax_needs() -> None:
    subprocess.run(["bash", "-n", SCRIPTS / "slurm.sbatch"], check=True)
    before_commands = SBATCH[: SBATCH.index("set -euo pipefail")]
    assert before_commands.count("#SBATCH --") == SBATCH.count("#SBATCH --")  # sbatch ignores later ones
    given = options(SBATCH)
    assert given["ntasks-per-node"] == given["gpus-per-node"] == "4" and given["nodes"] == "2"
    assert "gpus-per-task" not in given and "gpu-bind" not in given
    assert re.fullmatch(r"TERM@\d+", given["signal"])  # to the processes, not to this script (B:)
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "output"}
    assert given.keys() == known | {"open-mode", "requeue", "signal"}


def test_jaxtrain_accepts_the_commands_of_both_files() -> None:
    [line] = [line for line in SBATCH.splitlines() if line.startswith("srun ")]
    words = shlex.split(line)
    start = words.index("python")
    assert words[1:start] == ["--label", "--kill-on-bad-exit=1"]
    for command in (words[start:], container()["command"]):
        args = parse(command)
        assert (args.experiment, args.distributed, args.mesh) == ("cifar_cnn", "auto", "data=*")
        assert sharding.parse_mesh(args.mesh, 8)["data"] == 8
        assert (args.coordinator, args.processes, args.process_id) == (None, None, None)


def test_jaxtrain_accepts_what_launch_local_adds() -> None:
    added = "--simulate-devices 4 --coordinator 127.0.0.1:1 --processes 2 --process-id 1"
    args = parse(["python", "-m", "jaxtrain.run", "--experiment", "x", *added.split()])
    assert (args.simulate_devices, args.coordinator) == (4, "127.0.0.1:1")
    assert (args.processes, args.process_id) == (2, 1)


def container() -> dict[str, Any]:
    [job] = JOBSET["spec"]["replicatedJobs"]
    [found] = job["template"]["spec"]["template"]["spec"]["containers"]
    return found


def test_the_jobset_has_what_jax_needs_on_kubernetes() -> None:
    kinds = {document["kind"]: document for document in DOCUMENTS}
    assert list(kinds) == ["ServiceAccount", "Role", "RoleBinding", "JobSet"]
    assert JOBSET["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    [replicated] = JOBSET["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1  # JAX counts the processes of one Job
    job, pod = replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] == 2
    assert JOBSET["spec"]["network"]["enableDNSHostnames"] is True
    assert "subdomain" not in JOBSET["spec"]["network"] and "subdomain" not in pod
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", d["metadata"]["name"]) for d in DOCUMENTS)
    # the service account may read pods and jobs
    rules = {name: rule for rule in kinds["Role"]["rules"] for name in rule["resources"]}
    assert rules["pods"]["apiGroups"] == [""] and "list" in rules["pods"]["verbs"]
    assert rules["jobs"]["apiGroups"] == ["batch"] and "get" in rules["jobs"]["verbs"]
    binding = kinds["RoleBinding"]
    assert binding["roleRef"]["name"] == kinds["Role"]["metadata"]["name"]
    account = kinds["ServiceAccount"]["metadata"]["name"]
    assert pod["serviceAccountName"] == binding["subjects"][0]["name"] == account
    mounted = {mount["name"] for mount in container()["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == 4


def test_huge_pages_are_enabled_unless_the_variable_is_set(launch, tmp_path, monkeypatch) -> None:
    name, default = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
    assert {"name": name, "value": default} in container()["env"]
    exports = [
        line
        for file in ("run", "slurm.sbatch")
        for line in (SCRIPTS / file).read_text().splitlines()
        if line.startswith(f"export {name}=")
    ]
    assert len(exports) == 2
    for value, expected in ((None, default), ("", ""), ("glibc.malloc.check=1", "glibc.malloc.check=1")):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
        for line in exports:
            command = ["bash", "-euc", f'{line}\nprintf %s "${name}"']
            assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == expected
        _, lines, _ = finish(launch(f"import os; print('set to', os.environ['{name}'])", "-n", "1"))
        assert f"[0] set to {expected}".rstrip() in lines
