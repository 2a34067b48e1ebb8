"""--profile, its trace and table of shares; step times, memory, power and energy."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import stopping
from tiny import EXPERIMENT

from jaxtrain import models, monitor, run
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.signals import Stopped
from jaxtrain.monitor import nvml, step_times, telemetry, xplane
from jaxtrain.monitor import trace as tracing
from jaxtrain.monitor.time_shares import BETWEEN, COPY, HOST, OPERATION, Span, Timeline, shares
from jaxtrain.program import assemble
from jaxtrain.sharding import multihost
from jaxtrain.train.loop import fit

PLAIN = {"augment": (), "post_update": (), "eval_every": None}
MLP = dataclasses.replace(EXPERIMENT, model=models.MLP(widths=(16,), classes=4), epochs=2, **PLAIN)


@pytest.fixture
def console():
    return monitor.make_console()


@pytest.fixture(scope="module")
def program(mesh1):
    return assemble(MLP, mesh1)


def where(folder: Path) -> dict:
    (path,) = folder.rglob("where.json")
    return json.loads(path.read_text())


# Shares


def test_time_belongs_to_operations_first_then_to_the_loop():
    lanes = [[Span(0, 6, OPERATION, "dot"), Span(2, 4, OPERATION, "inner")], [Span(5, 8, OPERATION, "copy")]]
    host = [Span(-5, 20, HOST, "other"), Span(7, 9, HOST, "data")]
    found = shares(Timeline((0, 10), [lanes], host))
    rows = {(place, what): share for place, what, share in found.rows}
    assert rows == pytest.approx(
        {
            ("device", "dot"): 0.35,  # 3 alone, and half of the 1 shared with the copy
            ("device", "inner"): 0.2,
            ("device", "copy"): 0.25,
            ("host", "data"): 0.1,
            ("host", "other"): 0.1,
        }
    )
    assert found.idle == pytest.approx(0.2) and sum(rows.values()) == pytest.approx(1)
    assert found.host == pytest.approx({"other": 0.8, "data": 0.2})


def test_copy_from_the_host_is_idle_time_and_a_running_program_is_not():
    lane = [Span(0, 4, BETWEEN, "between"), Span(1, 2, OPERATION, "dot"), Span(4, 7, COPY, "MemcpyH2D")]
    found = shares(Timeline((0, 10), [[lane]], []))
    assert found.idle == pytest.approx(0.6)
    assert {row[:2] for row in found.rows} == {
        ("device", "between"),
        ("device", "dot"),
        ("copy", "MemcpyH2D"),
        ("host", "outside the loop"),
    }


def test_shares_are_means_over_devices():
    found = shares(Timeline((0, 10), [[[Span(0, 10, OPERATION, "dot")]], []], [Span(0, 10, HOST, "data")]))
    assert found.idle == 0.5 and found.rows == [("device", "dot", 0.5), ("host", "data", 0.5)]


# Traces


def event(name, start, duration, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=list(stats.items()))


def plane(name, **lines):
    return SimpleNamespace(
        name=name, lines=[SimpleNamespace(name=line, events=events) for line, events in lines.items()]
    )


def test_gpu_streams_are_read_and_graph_kernels_named(monkeypatch):
    planes = [
        plane("/host:CPU", python=[event(xplane.WINDOW, 0, 100)]),
        plane(
            "/device:GPU:0",
            **{
                "Stream #13(Compute)": [
                    event("gemm_7", 0, 40, hlo_op="dot.7", hlo_module="jit_step"),
                    event("loop_add_fusion_3", 40, 10),  # by a CUDA graph, which names no operation
                    event("ncclAllReduce", 50, 10),
                ],
                "Stream #14(MemcpyH2D)": [event("MemcpyH2D", 60, 20)],
                "XLA Ops": [event("dot.7", 0, 100)],  # a summary of the streams
            },
        ),
    ]
    data = SimpleNamespace(planes=planes)
    names = {
        ("jit_step", "dot.7"): "jit(step)/dot_general",
        ("jit_step", "loop_add_fusion.3"): "jit(step)/add",
    }
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda path: data, raising=False)
    found = shares(xplane.read(Path("x.xplane.pb"), devices=1, op_names=names))
    assert {row[1]: round(row[2], 3) for row in found.rows} == {
        "dot_general": 0.4,
        "other work of the loop": 0.2,
        "MemcpyH2D": 0.2,
        "add": 0.1,
        "ncclAllReduce": 0.1,
    }
    assert found.idle == pytest.approx(0.4)


def test_cpu_operation_may_end_on_another_thread():
    dot = event("dot.1", 10, 5, hlo_op="dot.1", hlo_module="jit_step", device_ordinal=1, _p=77)
    lines = [
        [event("ThunkExecutor::Execute", 5, 60), dot],
        [event("end: dot.1", 50, 1, _c=77)],
        [event("ThunkExecutor::Execute", 0, 9)],  # of an unknown device
        [event("ThunkExecutor::Execute", 0, 9), event("b", 70, 5, hlo_op="b", device_ordinal=0)],  # nor this
    ]
    assert xplane._cpu_lanes(lines, {}) == {
        "1": [[Span(10, 50, OPERATION, "dot"), Span(5, 65, BETWEEN, "between operations")]],
        "0": [[Span(70, 75, OPERATION, "b")]],
    }


def test_missing_empty_and_foreign_traces_are_refused(tmp_path):
    with pytest.raises(RunError, match="no trace"):
        monitor.idle(tmp_path)
    with jax.profiler.trace(tmp_path):
        jnp.ones(3).block_until_ready()
    with pytest.raises(RunError, match="no mark of the training loop: take the trace with --profile"):
        monitor.idle(tmp_path)
    file = tmp_path / "a.xplane.pb"
    file.write_bytes(b"\x0a\xff")
    os.utime(file, (2**32, 2**32))
    with pytest.raises(RunError, match=r"cannot be read as a trace|no mark"):
        monitor.idle(tmp_path)
    file.write_bytes(b"")
    os.utime(file, (2**32, 2**32))
    with pytest.raises(RunError, match="is empty: a trace cannot exceed 2 GiB"):
        monitor.idle(tmp_path)


# The loop


class Slow:
    """A loader that takes ``seconds`` for every batch."""

    def __init__(self, loader, seconds):
        self._loader, self._seconds = loader, seconds

        self.abstract_batch = loader.abstract_batch

    def batch(self, step):
        time.sleep(self._seconds)
        return self._loader.batch(step)

    def batches(self, step, count):
        time.sleep(self._seconds)
        return self._loader.batches(step, count)


@pytest.mark.full("tests/monitor/test_profile.py")
def test_profile_shows_a_slow_source_and_shares_add_up(program, tmp_path, console, capsys):
    plain = fit(program, tmp_path / "plain", console)
    slow = dataclasses.replace(program, train=Slow(program.train, 0.03))
    capsys.readouterr()
    result = fit(slow, tmp_path / "slow", console, profile_window=(7, 12))
    found, out = where(tmp_path / "slow"), capsys.readouterr().out
    assert found["updates"] == [7, 12] and found["complete"]
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    assert found["rows"][0]["what"] == "waiting for data" and found["rows"][0]["share"] > 0.5
    assert found["host"]["waiting for data"] * found["seconds"] >= 6 * 0.03
    assert 0.5 < found["idle"] < 1 and monitor.idle(tmp_path / "slow") == found["idle"]
    device = {row["what"]: row["share"] for row in found["rows"] if row["place"] == "device"}
    assert sum(device.values()) == pytest.approx(1 - found["idle"])
    assert any(what.startswith("MLP/") and "dot_general" in what for what in device), device
    assert "where the time went, updates 7 to 12" in out and "host: waiting for data " in out
    assert result["test"] == plain["test"]  # it trains the same
    assert len(list((tmp_path / "slow/profile").rglob("*.trace.json.gz"))) == 1
    records = [json.loads(line) for line in (tmp_path / "slow/metrics.jsonl").read_text().splitlines()]
    assert {r["step"] for r in records if "profiled" in r} == {5, 10, 12}  # traced from 4 on
    assert [r["step"] for r in records if "train/loss" in r] == [3, 5, 10, 12, 13, 15, 20, 25]


@pytest.mark.full("tests/monitor/test_profile.py::test_time_belongs_to_operations_first_then_to_the_loop")
def test_busy_device_is_not_idle(tmp_path, console):
    @jax.jit
    def work(x):
        return jax.lax.fori_loop(0, 20, lambda _, y: y @ x / 400, x)

    x = work(jnp.ones((400, 400)))
    record = SimpleNamespace(paused=contextlib.nullcontext)
    trace = monitor.Trace((5, 8), tmp_path, console, 1)
    trace.begin(0, 9)
    for step in range(1, 10):
        trace.step(step, 1, x, record, lambda: None)
        x = trace.mark("waiting for the device", lambda x: jax.block_until_ready(work(x)))(x)
    busy = monitor.idle(tmp_path)
    assert busy < 0.5  # the machine may be busy with something else
    assert monitor.idle(tmp_path, devices=2) == pytest.approx((1 + busy) / 2)


@pytest.mark.parametrize(
    ("updates", "each", "start", "begins", "covers", "note"),
    [
        ((5, 6), 1, 0, 2, (5, 6), ""),
        ((3, 4), 1, 0, 1, (3, 4), ""),  # fewer than three before
        (
            (1, 20),
            1,
            7,
            8,
            (8, 10),
            "update 8 is the first call of the step",
        ),  # resumes within the range and ends in it
        ((6, 7), 2, 0, 3, (5, 8), ""),  # two updates a call
        ((2, 3), 2, 0, 1, (1, 4), "updates 1 to 2 are the first call of the step"),
    ],
)
def test_traced_updates(updates, each, start, begins, covers, note, tmp_path, console, monkeypatch, capsys):
    began, state, order = [], jnp.ones(2), []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: began.append(step))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    seen = {}

    @contextlib.contextmanager
    def paused():
        order.append("record")
        yield

    monkeypatch.setattr(
        tracing.Trace, "_finish", lambda self, complete=True: seen.update(vars(self), complete=complete)
    )
    record = SimpleNamespace(paused=paused)
    with monitor.trace_updates(updates, tmp_path, console, 1) as trace:
        trace.begin(start, 10)
        for step in range(start + 1, 11, each):
            trace.step(step, each, state, record, lambda: order.append("guard"))
            if seen:
                break
        else:
            trace.end(state, record, lambda: order.append("guard"))
        # The guard checks updates before their record; nothing is queued where the window begins.
        assert order == ["guard", "record", "guard", "guard", "record"]
        out = capsys.readouterr().out
        assert note in out and ("first call" in out) == bool(note)
        assert (seen["_first"], seen["_last"]) == covers and began[0] == begins and seen["complete"]
        trace._trace_from = None


@pytest.mark.full("tests/monitor/test_profile.py")
def test_profile_of_a_run_that_stops_and_resumes_within_the_range(
    program, tmp_path, console, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        stopping(9, patch)
        with pytest.raises(Stopped):
            fit(program, tmp_path, console, profile_window=(7, 14))
    out = capsys.readouterr().out
    assert "--profile: the run ended within the range" in out and "trace: " in out
    assert where(tmp_path)["updates"] == [7, 9] and not where(tmp_path)["complete"]
    fit(program, tmp_path, console, profile_window=(7, 14))
    out = capsys.readouterr().out
    assert "--profile 7:14: this run computes updates 10 to 25, so it profiles 10 to 14" in out
    assert "update 10 is the first call of the step, so the profile includes compilation" in out
    assert where(tmp_path / "profile/updates-10-14")["updates"] == [10, 14]
    fit(program, tmp_path, console, profile_window=(7, 14))
    out = capsys.readouterr().out
    assert "--profile 7:14: nothing to profile, the run resumes after update 25 of 25" in out


@pytest.mark.full("tests/monitor/test_profile.py")
def test_failing_profiler_does_not_end_the_run(program, tmp_path, console, capsys, monkeypatch):
    with jax.profiler.trace(tmp_path / "other"):
        result = fit(program, tmp_path / "run", console, profile_window=(2, 3))
    assert result["steps"] == 25 and "--profile: no trace can be taken (" in capsys.readouterr().out


def test_each_process_writes_its_own_trace(tmp_path, console, monkeypatch):
    folders = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: folders.append(folder))
    monkeypatch.setattr(multihost, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "process_index", lambda: 1)
    trace = monitor.Trace((1, 2), tmp_path, console, 1)
    trace.begin(0, 9)
    trace.step(1, 1, jnp.ones(2), SimpleNamespace(paused=contextlib.nullcontext), lambda: None)
    trace._leave(2)
    assert folders == [tmp_path / "profile/updates-1-2/process-1"]


def test_without_a_trace_functions_are_not_wrapped():
    def function():
        pass

    assert monitor.OFF.mark("dispatch", function) is function and monitor.OFF.flag(3) == {}


@pytest.mark.parametrize("text", ["5", "0:3", "4:3", "a:b", "-1:2", "1:2:3", "", "1:"])
def test_bad_range_is_refused_before_anything_is_read(text, capsys):
    assert run.main(["--experiment", "there is none", f"--profile={text}"]) == 2
    error = capsys.readouterr().err
    assert "give the first and the last update to profile as START:STOP" in error and error.count("\n") == 1


def test_range_after_the_end_is_refused():
    with pytest.raises(InputError, match="--profile 26:30: the run has only 25 updates"):
        monitor.parse_window("26:30", 25)
    assert monitor.parse_window("25:30", 25) == (25, 30) and monitor.parse_window(None, 25) is None


@pytest.mark.full("tests/monitor/test_profile.py::test_bad_range_is_refused_before_anything_is_read")
def test_finished_run_has_nothing_to_profile(tmp_path, capsys):
    file = tmp_path / "small.py"
    file.write_text(
        "import dataclasses\nfrom tiny import EXPERIMENT as E\nfrom jaxtrain import models\n"
        "EXPERIMENT = dataclasses.replace(E, model=models.MLP(widths=(16,), classes=4), epochs=1, "
        "augment=(), post_update=())\n"
    )
    command = ["--experiment", str(file), "--workdir", str(tmp_path / "run"), "--devices", "1"]
    assert run.main([*command, "--profile", "14:15"]) == 2
    assert "the run has only 13 updates" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert run.main([*command, "--profile", "12:15"]) == 0
    assert where(tmp_path / "run")["updates"] == [12, 13] and where(tmp_path / "run")["complete"]
    assert "this run computes updates 1 to 13, so it profiles 12 to 13" in capsys.readouterr().out
    assert run.main([*command, "--profile", "8:9"]) == 0
    assert "--profile 8:9: nothing to profile, no update is left" in capsys.readouterr().out


# Step times


def test_step_times_are_between_completions_per_update(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    found = step_times.StepTimes()

    def turns(*seconds, updates=1):
        for length in seconds:
            clock.now += length
            found.tick(updates)

    turns(7.0)  # compiled
    turns(0.010, 0.010)
    turns(0.080, updates=4)
    assert found.window() == pytest.approx({"step_ms_p50": 20, "step_ms_p99": 20})
    turns(0.010)
    assert found.window() == {}  # within a second
    found.pause()
    turns(5.0, 0.010, 0.010)
    assert found.window() == pytest.approx({"step_ms_p50": 10, "step_ms_p99": 10})
    turns(0.010, 0.010)
    assert found.overall() == pytest.approx({"step_ms_p50": 10, "step_ms_p99": 20}, rel=0.01)


def test_percentiles_of_a_run_cover_all_steps(monkeypatch):
    monkeypatch.setattr(step_times, "EVERY", 0.0)
    rng, found = np.random.default_rng(0), step_times.StepTimes()
    everything = rng.lognormal(-5, 0.5, 3000)
    for part in np.split(everything, 10):
        found._times, found._counts = list(part), [1] * len(part)
        assert found.window()["step_ms_p50"] == pytest.approx(1e3 * np.percentile(part, 50), rel=0.02)
    expected = {f"step_ms_p{p}": 1e3 * np.percentile(everything, p) for p in (50, 99)}
    assert found.overall() == pytest.approx(expected, rel=0.02)


@pytest.mark.full("tests/monitor/test_profile.py")
def test_records_and_result_have_step_times_and_memory(program, tmp_path, console):
    result = fit(program, tmp_path, console)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    for found in (result, first, json.loads((tmp_path / "result.json").read_text())):
        assert 0 < found["step_ms_p50"] <= found["step_ms_p99"]
        assert 2**26 < found["process_rss_bytes"] < 2**40 and "power_watts" not in found


# Memory, power, energy


class NVMLError(Exception):
    pass


class Board:
    """A fake pynvml: boards in the order of their slots; 100 W, and a simulated clock."""

    NVMLError = NVMLError
    boards = ("NVIDIA A", "NVIDIA A", "NVIDIA B")

    def __init__(self, counts=True):
        self.counts, self.seconds, self.open, self.lost = counts, 1000.0, 0, False

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, name):
        return {"GPU-two": 2}[name]

    def nvmlDeviceGetName(self, handle):
        return self.boards[handle].encode()  # as older versions give it

    def nvmlDeviceGetPowerUsage(self, handle):
        if self.lost:
            raise NVMLError("GPU is lost")
        return 100_000 * (handle + 1)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.counts:
            raise NVMLError("Not Supported")
        return int(1e5 * (handle + 1) * self.seconds)


def gpu(number, kind="NVIDIA A", **stats):
    return SimpleNamespace(
        platform="gpu", local_hardware_id=number, device_kind=kind, memory_stats=lambda: stats or None
    )


@pytest.fixture
def fake(monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "pynvml", board)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return board


def test_energy_since_the_start_and_per_examples(fake, monkeypatch):
    monkeypatch.setattr(telemetry, "EVERY", 0.0)
    with monitor.measure_devices([gpu(0), gpu(1)], share=0.5) as meter:
        fake.seconds += 10
        found = meter.record(examples=1000)
        assert found["power_watts"] == 300 and found["energy_joules"] == pytest.approx(3000)
        assert found["joules_per_million_examples"] == pytest.approx(3000 / 500 * 1e6)  # half are another's
        fake.seconds += 10
        assert meter.result(examples=2000)["energy_joules"] == pytest.approx(6000)
        fake.lost = True
        assert "power_watts" not in meter.record(examples=1000)
    assert fake.open == 0


def test_telemetry_is_read_once_a_second(fake):
    with monitor.measure_devices([gpu(0)]) as meter:
        assert meter.record(10)["energy_joules"] == 0
        fake.seconds += 100
        assert meter.record(20) == {}
        assert meter.result(20)["energy_joules"] == pytest.approx(1e4)


def test_power_is_integrated_without_an_energy_counter(fake, monkeypatch):
    monkeypatch.setattr(nvml, "EVERY", 0.01)
    fake.counts = False
    began = time.perf_counter()
    with monitor.measure_devices([gpu(0)]) as meter:
        thread = meter._boards._thread
        time.sleep(0.2)
        joules, most = meter._boards.joules(), 100 * (time.perf_counter() - began)
        assert 0.2 * most < joules <= most
    assert not thread.is_alive() and fake.open == 0


@pytest.mark.parametrize(
    ("visible", "device", "watts"),
    [
        (None, gpu(1), 200),
        ("1", gpu(0), 200),
        ("GPU-two", gpu(0, "NVIDIA B"), 300),
        (None, gpu(2), None),  # JAX and NVML call it by different names
        ("MIG-one", gpu(0), None),
        (None, SimpleNamespace(platform="cpu", memory_stats=lambda: None), None),
    ],
)
def test_board_matches_the_jax_device(visible, device, watts, fake, monkeypatch):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with monitor.measure_devices([device]) as meter:
        assert meter.record(1).get("power_watts") == watts
    assert fake.open == 0


def test_without_nvml_there_are_no_figures(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert nvml.open([gpu(0)]) is None and "pip install nvidia-ml-py" in nvml.describe_boards([gpu(0)])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert nvml.describe_boards([gpu(0), gpu(1)]) == "300 W now" and fake.open == 0
    fake.nvmlInit = lambda: (_ for _ in ()).throw(NVMLError("Driver Not Loaded"))
    assert nvml.open([gpu(0)]) is None


def test_memory_is_the_maximum_over_devices():
    devices = [gpu(0, bytes_in_use=10, peak_bytes_in_use=30), gpu(1, bytes_in_use=20, peak_bytes_in_use=25)]
    assert monitor.memory(devices) == {"device_bytes": 20, "device_peak_bytes": 30}
    assert sorted(monitor.memory([gpu(0)])) == ["process_rss_bytes", "process_rss_peak_bytes"]
