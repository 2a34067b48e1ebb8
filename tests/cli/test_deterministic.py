"""``--deterministic``: which flags are set and refused, identical bits, and the benchmark of its cost."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_scaling as scaling_cases
from conftest import ROOT

from jaxtrain import __main__ as commands
from jaxtrain import checkpoint
from jaxtrain.cli import devices, flags
from jaxtrain.core import process
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


@pytest.mark.full("tests/train/test_loop.py::test_stop_and_resume_is_bitwise_the_straight_run")
def test_two_processes_compute_the_same_bits(python, small):
    """Each compiles for itself, with another hash seed. On a CPU no flag is set."""
    records, cores = [], process.cores()
    for folder in ("one", "other"):
        env = {"JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONHASHSEED": str(len(folder))}
        words = ["-m", "jaxtrain.run", "--experiment", small, "--workdir", folder, "--deterministic"]
        done = python(*words, "--set", "log_every=1", **env)
        assert done.returncode == 0, done.stderr
        assert f"deterministic: nothing to set on a CPU, {cores} cores" in done.stdout
        bits = json.loads(Path(folder, "config.json").read_text())["bits"]
        assert bits["deterministic"] is True and bits["cores"] == cores
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        metrics = ("train/", "test/")
        records.append([{k: v for k, v in x.items() if k == "step" or k.startswith(metrics)} for x in lines])
    one, other = (checkpoint.arrays(folder) for folder in ("one", "other"))
    assert len(one) > 5 and one.keys() == other.keys()
    assert [path for path in one if one[path].tobytes() != other[path].tobytes()] == []
    assert records[0] == records[1] and len(records[0]) >= 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--xla_gpu_deterministic_ops=false", "has --xla_gpu_deterministic_ops=false, which conflicts"),
        (
            "--xla_gpu_deterministic_ops --xla_gpu_deterministic_ops=0",
            "conflicts with --deterministic: leave one out",
        ),
        ("--xla_gpu_exclude_nondeterministic_ops=False", "which conflicts with --deterministic"),
        ("--xla_gpu_autotune_level=4", "has --xla_gpu_autotune_level=4, which conflicts"),
        ("flags.txt", "XLA_FLAGS names the file flags.txt"),
    ],
)
def test_conflicting_flags_are_refused(flags, message, small, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert commands.main(["run", "--deterministic", "--experiment", small]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in Path().iterdir() if path.name != "__pycache__"] == [small]


@pytest.mark.parametrize("flags", ["--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops=1"])
def test_equal_flags_are_not_changed(flags, monkeypatch):
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


@pytest.mark.full("tests/cli/test_deterministic.py::test_the_record_has_the_flag_only_where_it_has_an_effect")
def test_the_flag_is_appended_and_xla_accepts_it(python):
    """XLA aborts on an unknown flag, so this jaxlib knows the flag and reads it in time."""
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
    with pytest.raises(InputError, match="supports CPUs and NVIDIA GPUs, not tpu"):
        devices.make_mesh(args)


@pytest.mark.full("tests/cli/test_cli.py::test_resuming_warns_of_changed_versions")
def test_resuming_with_other_cores_or_flags_prints_a_warning(small, capsys, monkeypatch):
    words = ["run", "--experiment", small, "--workdir", "r", "--devices", "1"]
    assert commands.main(words) == 0
    out = capsys.readouterr().out
    assert "deterministic" not in out and "the bits" not in out
    assert commands.main([*words, "--set", "epochs=3"]) == 0
    assert "the bits" not in capsys.readouterr().out
    assert commands.main([*words, "--set", "epochs=4", "--deterministic"]) == 0
    out = capsys.readouterr().out  # the flag itself changes nothing on a CPU
    assert "deterministic: nothing to set on a CPU" in out and "the bits are" not in out
    monkeypatch.setattr(environment, "cores", lambda: 77)
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")  # this process has already started
    assert commands.main([*words, "--set", "epochs=5"]) == 0
    out = capsys.readouterr().out
    assert "and is '--xla_other=1', cores was " in out and " and is 77: from here on the bits are not" in out
    assert json.loads(Path("r/config.json").read_text())["resumed"][-1]["bits"]["cores"] == 77
    assert commands.main([*words, "--set", "epochs=5"]) == 0
    assert "from here on" not in capsys.readouterr().out


def test_the_record_has_the_flag_only_where_it_has_an_effect(monkeypatch, mesh1):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 {environment.DETERMINISTIC_FLAG}")
    found = environment.bitwise_settings(mesh1, True)
    assert found == {"deterministic": True, "xla_flags": "--xla_a=1", "cores": process.cores()}
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    assert environment.bitwise_settings(gpu, True) == {
        "deterministic": True,
        "xla_flags": f"--xla_a=1 {environment.DETERMINISTIC_FLAG}",
    }


def test_the_resume_command_repeats_the_flag():
    parser = argparse.ArgumentParser()
    flags.add(parser, many_processes=True)
    assert flags.typed_flags(parser.parse_args(["--deterministic"])) == ["--deterministic"]
    assert flags.typed_flags(parser.parse_args([])) == []


@pytest.fixture
def benchmark(small, monkeypatch):
    """``python -m benchmarks.deterministic`` in this process; its two sides are processes."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    from benchmarks import deterministic

    def run(*words: str) -> int:
        return deterministic.main(["--experiment", small, "--steps", "2", "--rounds", "3", *words])

    return run


@pytest.mark.full("tests/cli/test_deterministic.py::test_the_record_has_the_flag_only_where_it_has_an_effect")
def test_the_benchmark_measures_both_sides(benchmark, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")  # else no flag would be set, for a CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    assert benchmark("--out", "d.json") == 0
    record = json.loads(Path("d.json").read_text())
    assert json.loads(capsys.readouterr().out) == record
    figures = record["figures"]
    off, on = (np.array(figures["round_seconds"][side]) for side in ("off", "on"))
    assert len(off) == len(on) == 3 and off.min() > 0
    assert figures["cost"]["median"] == pytest.approx(np.median(on / off - 1))
    assert figures["step_ms"]["on"]["median"] == pytest.approx(1e3 * np.median(on) / 2)
    assert figures["xla_flags"]["off"] == "--xla_backend_optimization_level=1"
    assert figures["xla_flags"]["on"] == f"{figures['xla_flags']['off']} {environment.DETERMINISTIC_FLAG}"
    [result] = record["results"]
    assert result["median"] == pytest.approx(np.median(on / off)) and result["n"] == 3


@pytest.mark.full("tests/cli/test_deterministic.py::test_the_record_has_the_flag_only_where_it_has_an_effect")
def test_the_benchmark_reports_what_a_process_refuses(benchmark, capfd):
    assert benchmark("--mesh", "model=3", "--simulate-devices", "2") == 2
    error = capfd.readouterr().err
    assert "--mesh model=3 needs 3 devices" in error and "Traceback" not in error


def test_the_benchmark_needs_a_side_without_the_flag(benchmark, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", environment.DETERMINISTIC_FLAG)
    assert benchmark() == 2
    assert "unset it, to have a side without it" in capsys.readouterr().err
