"""``--deterministic``: what is set and refused, that the bits are the same, and what it costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_scaling as scaling_cases

from jaxtrain import __main__ as verbs
from jaxtrain import checkpoint
from jaxtrain.cli import devices, flags
from jaxtrain.core.errors import InputError
from jaxtrain.train import environment

SMALL = scaling_cases.SMALL.replace("optim.SGD(lr=0.1, momentum=0.9)", "optim.Adam(lr=1e-2)")
SMALL = SMALL.replace("epochs=4", "epochs=2")


@pytest.fixture
def small(tmp_path, monkeypatch) -> str:
    """An experiment that compiles quickly, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("small.py").write_text(SMALL)
    return "small.py"


def test_two_fresh_processes_end_with_the_same_bits(python, small):
    """Each compiles for itself, with other hash seeds. On a CPU nothing is set for it."""
    records, cores = [], environment.cores()
    for folder in ("one", "other"):
        env = {"JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONHASHSEED": str(len(folder))}
        words = ["-m", "jaxtrain.run", "--experiment", small, "--workdir", folder, "--deterministic"]
        done = python(*words, "--set", "log_every=1", **env)
        assert done.returncode == 0, done.stderr
        assert f"deterministic: nothing to set on a CPU, {cores} cores" in done.stdout
        bits = json.loads(Path(folder, "config.json").read_text())["bits"]
        assert bits["deterministic"] is True and bits["cores"] == cores
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        kept = ("train/", "test/")
        records.append([{k: v for k, v in x.items() if k == "step" or k.startswith(kept)} for x in lines])
    one, other = (checkpoint.arrays(folder) for folder in ("one", "other"))
    assert len(one) > 5 and one.keys() == other.keys()
    assert [path for path in one if one[path].tobytes() != other[path].tobytes()] == []
    assert records[0] == records[1] and len(records[0]) >= 6


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--xla_gpu_deterministic_ops=false", "has --xla_gpu_deterministic_ops=false, the contrary"),
        ("--xla_gpu_deterministic_ops --xla_gpu_deterministic_ops=0", "leave out one of the two"),
        ("--xla_gpu_exclude_nondeterministic_ops=False", "the contrary of --deterministic"),
        ("--xla_gpu_autotune_level=4", "has --xla_gpu_autotune_level=4, the contrary"),
        ("flags.txt", "XLA_FLAGS names the file flags.txt"),
    ],
)
@pytest.mark.parametrize("words", [["run"], ["bench", "--deterministic"]])
def test_what_contradicts_it_is_refused(words, flags, told, small, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    words = words if "--deterministic" in words else [*words, "--deterministic"]
    assert verbs.main([*words, "--experiment", small]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert [path.name for path in Path().iterdir() if path.name != "__pycache__"] == [small]


@pytest.mark.parametrize("flags", ["--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops=1"])
def test_flags_that_agree_are_left_as_they_are(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_gpu_autotune_level=0")
    assert devices.deterministic_requested()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to='a folder' --xla_gpu_exclude_nondeterministic_ops=true")
    assert not devices.deterministic_requested()


SETS = """
import os, jax
from jaxtrain.cli import devices
assert jax.config.jax_platforms != "cpu"
devices.set_deterministic()
print(os.environ["XLA_FLAGS"])
print(jax.devices())
os.environ["XLA_FLAGS"] = ""
devices.set_deterministic()  # too late, but a CPU needs nothing
assert os.environ["XLA_FLAGS"] == ""
jax.default_backend = lambda: "gpu"
devices.set_deterministic()
"""


def test_the_flag_is_set_behind_the_users_and_xla_takes_it(python):
    """What XLA does not know it ends the process for: so this jaxlib knows the flag, and reads it in time."""
    env = {"JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true"}
    done = python("-c", SETS, **env)
    first, second = done.stdout.splitlines()
    assert first == "--xla_cpu_multi_thread_eigen=true --xla_gpu_deterministic_ops=true"
    assert "CpuDevice" in second
    assert "InputError: --deterministic comes too late" in done.stderr.splitlines()[-1]
    unknown = python(
        "-c",
        SETS.replace("devices.set_det", "devices.DETERMINISTIC_FLAG = '--xla_no=1'; devices.set_det", 1),
        **env,
    )
    assert unknown.returncode != 0 and "Unknown flag in XLA_FLAGS: --xla_no=1" in unknown.stderr


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "first_devices", lambda count: [SimpleNamespace(platform="tpu")])
    args = argparse.Namespace(simulate_devices=None, deterministic=True, devices=None, mesh=None)
    with pytest.raises(InputError, match="what CPUs and NVIDIA GPUs need, not tpu"):
        devices.make_mesh(args)


def test_going_on_in_other_circumstances_is_told(small, capsys, monkeypatch):
    words = ["run", "--experiment", small, "--workdir", "r", "--devices", "1"]
    assert verbs.main(words) == 0
    out = capsys.readouterr().out
    assert "deterministic" not in out and "the bits" not in out
    assert verbs.main([*words, "--set", "epochs=3"]) == 0
    assert "the bits" not in capsys.readouterr().out
    assert verbs.main([*words, "--set", "epochs=4", "--deterministic"]) == 0
    out = capsys.readouterr().out  # the flag itself changes nothing on a CPU
    assert "deterministic: nothing to set on a CPU" in out and "the bits are" not in out
    monkeypatch.setattr(environment, "cores", lambda: 77)
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")  # this process has started long ago
    assert verbs.main([*words, "--set", "epochs=5"]) == 0
    out = capsys.readouterr().out
    assert "and is '--xla_other=1', cores was " in out and " and is 77: from here on the bits are not" in out
    assert json.loads(Path("r/config.json").read_text())["bits"]["cores"] == 77
    assert verbs.main([*words, "--set", "epochs=5"]) == 0
    assert "from here on" not in capsys.readouterr().out


def test_the_record_names_the_flag_where_it_does_something(monkeypatch, mesh1):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 {environment.DETERMINISTIC_FLAG}")
    found = environment.bitwise_settings(mesh1, True)
    assert found == {"deterministic": True, "xla_flags": "--xla_a=1", "cores": environment.cores()}
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    assert environment.bitwise_settings(gpu, True) == {
        "deterministic": True,
        "xla_flags": f"--xla_a=1 {environment.DETERMINISTIC_FLAG}",
    }


def test_the_flag_is_repeated_in_the_command_that_goes_on():
    parser = argparse.ArgumentParser()
    flags.add(parser, many_processes=True)
    assert flags.typed_flags(parser.parse_args(["--deterministic"])) == ["--deterministic"]
    assert flags.typed_flags(parser.parse_args([])) == []


def test_bench_measures_what_it_costs(small, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")  # else nothing would be set, for a CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    words = ["bench", "--deterministic", "--experiment", small, "--steps", "2", "--rounds", "3"]
    assert verbs.main([*words, "--json", "d.json"]) == 0
    out, found = capsys.readouterr().out, json.loads(Path("d.json").read_text())
    off, on = (np.array(found["round_seconds"][way]) for way in ("off", "on"))
    assert len(off) == len(on) == 3 and off.min() > 0
    assert found["cost"]["median"] == pytest.approx(np.median(on / off - 1))
    assert found["step_ms"]["on"]["median"] == pytest.approx(1e3 * np.median(on) / 2)
    assert found["xla_flags"]["off"] == "--xla_backend_optimization_level=1"
    assert found["xla_flags"]["on"] == f"{found['xla_flags']['off']} {environment.DETERMINISTIC_FLAG}"
    assert f"deterministic costs {100 * found['cost']['median']:+.1f} % a step" in out
    assert "n = 3 rounds of 2 steps, 1 × cpu, " in out and "a CPU needs nothing set for it" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--scaling", "1"], "not allowed with argument"),
        (["--weak"], "belong to --scaling"),
        (["--plot", "x.png"], "belong to --scaling"),
        (["--json", "none/d.json"], "there is no folder none"),
        (["--rounds", "0"], "--rounds 0: give at least 1"),
        (["--set", "batch=x"], "expected int"),
    ],
)
def test_bad_input_of_bench_is_one_line(words, told, small, capsys):
    try:
        code = verbs.main(["bench", "--experiment", small, "--deterministic", *words])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and told in error and error.count("\n") == 1


def test_what_a_process_of_bench_refuses_is_told(small, capsys):
    words = [
        "bench",
        "--experiment",
        small,
        "--deterministic",
        "--mesh",
        "model=3",
        "--simulate-devices",
        "2",
    ]
    assert verbs.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxtrain bench: --mesh model=3 needs 3 devices") and error.count("\n") == 1


def test_flags_of_ones_own_leave_nothing_to_compare(small, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", environment.DETERMINISTIC_FLAG)
    assert verbs.main(["bench", "--experiment", small, "--deterministic"]) == 2
    assert "unset it, so that there is something to compare" in capsys.readouterr().err
