"""The part ``programs`` of scripts/gpu_check.py: what it compares and calls wrong, and a run on a CPU."""

import copy
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks is no part of the package

from benchmarks.gpu import card_file, compare, program_side, programs, workloads  # noqa: E402
from benchmarks.gpu.session import Failed, Session, Skipped, TimedOut  # noqa: E402
from jaxtrain import sharding  # noqa: E402
from jaxtrain.monitor.peak_flops import datasheet_peak  # noqa: E402
from jaxtrain.program import assemble  # noqa: E402
from jaxtrain.sharding import cards  # noqa: E402

PLAN = {
    "mesh": {"data": 2, "fsdp": 1, "model": 1},
    "batch": 64,
    "precision": "bfloat16",
    "parameters": 1000,
    "resident": ["train"],
    "bytes_per_device": {"temporaries": 2_000_000, "total": 10_000_000},
    "collectives": [{"kind": "all-reduce", "axes": ["data"], "count": 2, "bytes": 4_000_000}],
    "gpu": {
        "launches": 50,
        "traffic": 30_000_000,
        "kernels": [
            {"kind": "matrix product", "name": "__triton_gemm", "count": 3, "bytes": 1},
            {"kind": "matrix product", "name": "__cublas$gemm", "count": 4, "bytes": 1},
        ],
        "attention": [{"kernel": "cudnn"}, {"kernel": "cudnn"}],
        "cuda_graphs": {"host_launches": 9},
        "lower_bound": {"seconds": 0.002, "limit": "memory", "flops": 4e9, "peak": 1e13},
    },
}


def changed(**gpu):
    """The same plan with other figures of its GPU program."""
    other = copy.deepcopy(PLAN)
    other["gpu"] |= gpu
    return other


@pytest.fixture(scope="module")
def check():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def session(tmp_path):
    """A GPU's session whose processes are not started."""
    now = time.monotonic()
    return Session(tmp_path, None, False, dict(os.environ), now + 300, limit=200, began=now)


def test_equal_programs_differ_in_nothing():
    found = compare.compare(PLAN, copy.deepcopy(PLAN))
    assert found["differences"] == []
    assert set(found["ratios"].values()) == {1.0} and len(found["ratios"]) == 5
    assert found["here"]["kernels"] == {"matrix product": 7}


def test_each_difference_is_a_line():
    here = changed(
        launches=48,
        cuda_graphs=None,
        kernels=[{"kind": "fusion", "name": "reduce", "count": 1, "bytes": 1}],
        attention=[{"kernel": "cudnn"}, {"kernel": "xla"}],
    )
    here["bytes_per_device"] = {"temporaries": 4_000_000, "total": 10_400_000}  # the total by less than 5 %
    here["collectives"] = [{"kind": "all-gather", "axes": ["data"], "count": 1, "bytes": 500}]
    found = compare.compare(PLAN, here)
    assert found["differences"] == [
        "temporaries: 2.00 MB described, 4.00 MB here",
        "launches: 50 described, 48 here",
        "host_launches: 9 described, unknown here",
        "kernels, fusion: 0 described, 1 here",
        "kernels, matrix product: 7 described, 0 here",
        "attention, cudnn: 2 described, 1 here",
        "attention, xla: 0 described, 1 here",
        "all-gather over data: none described, 1 of 0.001 MB together here",
        "all-reduce over data: 2 of 4.000 MB together described, none here",
    ]
    assert found["ratios"]["temporaries"] == 0.5 and "host_launches" not in found["ratios"]


def test_plans_of_different_runs_are_not_compared():
    with pytest.raises(ValueError, match="not the same run: batch is 64 described, 32 here"):
        compare.compare(PLAN, {**PLAN, "batch": 32})


def test_a_step_faster_than_its_bound_shows():
    slow = compare.check_bound(PLAN["gpu"]["lower_bound"], [0.004, 0.008, 0.005])
    assert slow["holds"] and slow["step_ms"] == 5.0 and slow["bound_ms"] == 2.0
    assert slow["mfu"][0] == pytest.approx(4e9 / 0.004 / 1e13)
    fast = compare.check_bound(PLAN["gpu"]["lower_bound"], [0.004, 0.0019, 0.005])  # one round is enough
    assert not fast["holds"]
    assert "holds" not in compare.check_bound(None, [0.004])


class FakeSide:
    """Replaces the process of ``program_side``: a plan, then the seconds of an update."""

    def __init__(self, plan, seconds):
        self.plan, self.seconds = plan, seconds

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def answer(self, reserve=0.0):
        if isinstance(self.plan, Exception):
            raise self.plan
        return self.plan

    def ask(self, *words):
        return {"seconds": self.seconds}


def run(monkeypatch, session, described, here, seconds=0.01, cases=1):
    """The part, with processes that answer these plans (or raise them)."""

    def describe(*args):
        if isinstance(described, Exception):
            raise described
        return described

    monkeypatch.setattr(programs, "CASES", programs.CASES[:cases])
    monkeypatch.setattr(programs, "describe", describe)
    monkeypatch.setattr(Session, "child", lambda self, *args: {"device": "NVIDIA H100", "for": "h100"})
    monkeypatch.setattr(Session, "side", lambda self, *args, **env: FakeSide(here, seconds))
    found = programs.programs(session)
    json.dumps(found)
    return found


def test_results_are_ratios_and_a_bound_that_no_step_beats(monkeypatch, session):
    found = run(monkeypatch, session, PLAN, changed(launches=100))
    assert "status" not in found  # which is ok
    lines = {line["name"]: line for line in found["results"]}
    assert lines["digits_cnn: launches, described over compiled here"]["median"] == 0.5
    bound = lines["digits_cnn: lower bound (described, memory) over the step"]
    assert bound["met"] and bound["median"] == pytest.approx(0.2)
    assert found["notes"] == ["digits_cnn: launches: 50 described, 100 here"]
    assert found["figures"]["cases"]["digits_cnn"]["here"]["gpu"]["launches"] == 100


def test_a_wrong_bound_fails_the_part_and_keeps_its_figures(monkeypatch, session):
    found = run(monkeypatch, session, PLAN, PLAN, seconds=0.001, cases=2)
    assert found["status"] == "failed"
    assert "digits_cnn: described lower bound: wrong: 2 ms (memory), and a step took 1 ms" in found["why"]
    assert list(found["figures"]["cases"]) == ["digits_cnn", "shakespeare_gpt"]
    assert any(line["name"] == "digits_cnn: a step" and line["median"] == 1.0 for line in found["results"])


@pytest.mark.parametrize(
    ("described", "here", "kept", "says"),
    [
        (Failed("XLA knows no such card"), PLAN, "here", "described: XLA knows no such card"),
        (PLAN, Failed("exit code 1: out of memory"), "described", "here: exit code 1: out of memory"),
        (PLAN, {**PLAN, "batch": 1}, "here", "comparison: ValueError('not the same run: batch is 64"),
        (TimedOut("not finished in 75 s"), PLAN, "here", "described: not finished in 75 s"),
    ],
)
def test_a_side_fails_alone(described, here, kept, says, monkeypatch, session):
    found = run(monkeypatch, session, described, here, cases=2)
    assert found["status"] == "failed" and f"digits_cnn: {says}" in found["why"]
    assert found["figures"]["cases"]["shakespeare_gpt"][kept] is not None
    assert ("step" in found["figures"]["cases"]["digits_cnn"]) == (kept == "here")


def test_a_machine_without_the_compiler_still_times_its_steps(monkeypatch, session):
    found = run(monkeypatch, session, Skipped("needs XLA's GPU compiler"), PLAN)
    assert "status" not in found and found["skipped"] == {"digits_cnn: described": "needs XLA's GPU compiler"}
    assert "bound_ms" in found["figures"]["cases"]["digits_cnn"]["step"]["here"]


def test_cases_without_time_are_reported_and_those_of_an_earlier_record_left_out(monkeypatch, session):
    session.facts |= {"compared": ["digits_cnn"], "gpus": 4}
    found = run(monkeypatch, session, PLAN, PLAN, cases=3)
    assert list(found["figures"]["cases"]) == ["shakespeare_gpt", "digits_cnn, data=4"]
    assert found["skipped"] == {"digits_cnn": "compared in the earlier record"}
    session.limit = 1
    with pytest.raises(Skipped, match="no time left"):
        run(monkeypatch, session, PLAN, PLAN)


def driver_figures(card):
    """What the CUDA driver says of a card, by its published figures."""
    return {
        "clock": round(card.clock * 1e6),
        "cores": card.cores,
        "memory_clock": card.bandwidth * 8 // 2 // 1000 // 5120,
        "bus_width": 5120,
        "l2_cache": card.l2_cache,
        "major": card.capability[0],
        "minor": card.capability[1],
        "shared_memory_per_core": card.shared_memory_per_core,
        "shared_memory_per_block": card.shared_memory_per_block,
        "memory": card.memory,
    }


@pytest.mark.parametrize("name", cards.card_names())
def test_a_file_made_from_the_driver_describes_the_card(name, tmp_path):
    card = cards.load_card(name)
    fields, lacks = card_file.card_fields(card.device_kind, driver_figures(card), {})
    assert lacks == []
    path = tmp_path / "card.toml"
    path.write_text(card_file.as_toml(fields))
    made = cards.load_card(str(path))
    for field in ("device_kind", "memory", "capability", "cores", "fpus_per_core", "l2_cache"):
        assert getattr(made, field) == getattr(card, field), field
    assert made.bandwidth == pytest.approx(card.bandwidth, rel=1e-3) and made.clock == card.clock
    for precision, flops in card.peak.items():  # derived peaks are at least the datasheet's
        assert 0.97 * flops <= made.peak[precision] <= 2.2 * flops, precision
    assert made.link >= card.link and made.network >= card.network


def test_a_card_without_figures_says_which():
    figures = driver_figures(cards.load_card("h100")) | {"memory_clock": 0, "major": 13}
    del figures["memory"]
    _, lacks = card_file.card_fields("NVIDIA X1", figures, {})
    assert lacks == ["memory_clock", "memory", "the peak of compute capability 13.0"]


def test_datasheet_peaks_win_over_derived_ones():
    kind = "NVIDIA A10"
    peaks = {name: datasheet_peak(kind, name).flops for name in ("bfloat16", "float16", "float32")}
    figures = driver_figures(cards.load_card("l40s")) | {"major": 8, "minor": 6}
    fields, _ = card_file.card_fields(kind, figures, peaks)
    assert fields["peak"]["bfloat16"] == 125e12 and fields["peak"]["tf32"] == 62.5e12


def check_plan(program, batch):
    """The readers of GPU programs read a program of this device, here a CPU; nothing is timed."""
    found = json.loads(json.dumps(program_side.compile_here(program, cards.load_card("h100"))))
    program.close()
    gpu = found["gpu"]
    assert found["batch"] == batch and found["compiled_for"] == jax.default_backend()
    assert gpu["launches"] == sum(one["count"] for one in gpu["kernels"]) > 0
    assert gpu["lower_bound"]["flops"] == found["flops"]["step"] > 0
    assert compare.compare(found, found)["differences"] == []
    return found


@pytest.mark.full("tests/plan/test_gpu_goldens.py")
def test_a_program_is_read_on_this_device():
    program = assemble(workloads.mlp(tiny=True), sharding.make_mesh(jax.devices()[:1]))
    found = check_plan(program, 128)
    assert (
        found["flops"]["step"] == 3 * 2 * 128 * (784 * 32 + 32 * 10) - 2 * 128 * 784 * 32
    )  # no input gradient


@pytest.mark.full("tests/plan/test_gpu_goldens.py")
def test_a_shipped_experiment_is_described_and_compiled_here(tmp_path):
    """Both sides as the script starts them, on the CPU: ``plan --for`` and the process that is timed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    now = time.monotonic()
    session = Session(tmp_path, None, True, env, now + 3000, limit=3000, began=now)
    card = session.child("card", tmp_path)
    case = programs.Case("digits_cnn", tiny=("batch=32", "model.widths=(4,)"))
    found = programs.run_case(session, case, card, 1)
    assert found["errors"] == {} and card["for"] == "h100"
    assert found["step"]["here"]["step_ms"] > 0 and found["step"]["label"] == programs.CPU_LABEL
    if "no_compiler" not in card:
        described = found["comparison"]["described"]
        assert found["described"]["compiled_for"] == "gpu" and described["kernels"]["convolution"] > 0
        assert found["skipped"] == {}


def test_a_record_says_what_is_left(check):
    late, cut = {"status": "skipped", "why": "no time left"}, "not finished in 20 s"
    parts = {
        "doctor": {"status": "ok", "took_seconds": 1},
        "peak": {"status": "ok", "took_seconds": 30},
        "gpt": late,
        "scan": {"status": "ok", "cut": cut, "took_seconds": 20},  # of 75: the run was over
        "saving": {"status": "ok", "cut": cut, "took_seconds": 60},  # it had all its time
        "programs": {"status": "ok", "skipped": {"imagenet_vit_s16": "no time left: 3 s of 20 s"}},
        "prepare": {"status": "ok", "took_seconds": 9},
        "exact": {"status": "failed", "why": "other bits"},
    }
    names = [*(name for name in check.PARTS if name in parts), "resume_cifar"]
    left = check.unfinished({"parts": parts}, names)
    assert left == ["peak", "programs", "gpt", "scan", "prepare", "resume_cifar"]  # and what these need


def test_records_of_one_day_do_not_overwrite_each_other(check, tmp_path):
    for name in ("x.json", "x-2.json", "x-3.json"):
        path = check.free_path(tmp_path, "x")
        assert path.name == name
        path.touch()


@pytest.mark.parametrize(
    ("kind", "given", "card", "expected"),
    [
        ("NVIDIA L4", None, {"count": 4}, {"gpus": 4, "visible": "0,1,2,3"}),
        ("NVIDIA L4", "1", {"count": 4}, {"gpus": 1}),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, {"count": 4}, {"gpus": 1}),
        ("NVIDIA L4", None, None, {"gpus": 1}),
    ],
)
def test_several_gpus_are_used_where_one_process_can(kind, given, card, expected, check, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert check.usable_gpus({"device": kind, "count": 1}, card) == expected
