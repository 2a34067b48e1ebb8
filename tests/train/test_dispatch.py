"""Several updates at once: the same numbers, where the loop may put them, and how their number is chosen."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading

import jax
import numpy as np
import parallel_cases
import pytest
from test_guard import Spoil
from test_loop import final, stopping
from tiny import EXPERIMENT

from jaxtrain import __main__ as commands
from jaxtrain import models, monitor, run, sharding
from jaxtrain.cli import verify
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.signals import Stopped
from jaxtrain.core.types import leaf_paths
from jaxtrain.metrics import Mean
from jaxtrain.monitor.console import Plain
from jaxtrain.program import assemble
from jaxtrain.program.throughput import throughput
from jaxtrain.train import autotune, dispatch, run_record
from jaxtrain.train.autotune import Choice, choose, decide
from jaxtrain.train.loop import fit

TINY = "tests/tiny.py"
MLP = dataclasses.replace(EXPERIMENT, model=models.MLP(widths=(16,), classes=4, dropout=0.1), epochs=4)


def change(experiment=MLP, **fields):
    return dataclasses.replace(experiment, **fields)


def records(folder):
    """Without what is measured of the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    columns = ("step", "epoch", "learning_rate")
    return [{k: v for k, v in line.items() if k in columns or "/" in k} for line in lines]


def spans(program, start=0):
    found, step = [], start
    while step < program.steps:
        step += program.cadence.updates_per_call(step)
        found.append(step)
    return found


def test_evaluations_and_checkpoints_stay_where_they_are(mesh1):
    alone, several = (assemble(change(steps_per_execution=k, save_every=0.5), mesh1) for k in (1, 4))
    assert spans(alone) == [*range(1, 51)]
    ends = spans(several)
    assert ends[:7] == [4, 5, 6, 7, 11, 12, 13]  # saved after 7, evaluated after 13
    for step in range(1, 51):
        if alone.cadence.saves_after(step) or alone.cadence.evaluates_after(step):
            assert step in ends
    assert any(b - a == 4 for a, b in itertools.pairwise(ends))
    for start in ends:  # a run resumed from one of these has the same dispatches
        assert spans(several, start) == [end for end in ends if end > start]


@pytest.mark.full("[device-1]")
@pytest.mark.parametrize("way", ["device-1", "device-8", "stream-1", "stream-8"])
def test_an_mlp_is_bitwise_the_same_and_so_are_its_records(way, tmp_path, mesh1, mesh8):
    placement, _, devices = way.partition("-")
    mesh = {"1": mesh1, "8": mesh8}[devices]
    programs = {k: assemble(change(placement=placement, steps_per_execution=k), mesh) for k in (1, 5)}
    for k, program in programs.items():
        fit(program, tmp_path / str(k), Plain())
    assert records(tmp_path / "1") == records(tmp_path / "5")
    assert len(records(tmp_path / "1")) == 16  # every five updates, and before and of each evaluation
    a, b = (final(tmp_path / str(k), program) for k, program in programs.items())
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.full("tests/train/test_dispatch.py::test_an_mlp_is_bitwise_the_same_and_so_are_its_records")
def test_a_network_with_statistics_is_the_same_in_float64(mesh1):
    with jax.enable_x64(True):
        program = assemble(change(parallel_cases.experiments()["cnn"], steps_per_execution=4), mesh1)
        state, alone = program.init(), program.init()
        for step in range(4):
            alone, _ = program.train_step(alone, program.train.batch(step), program.key)
        batches, shared = program.train.batches(0, 4)
        state, _ = program.train_steps(state, batches, program.key, shared)
        assert int(state.step) == int(alone.step) == 4 and "batch_stats" in state.extra
        ours, theirs = (jax.device_get(leaf_paths(each)) for each in (state, alone))
        assert parallel_cases.distance(ours, theirs) < 1e-9


@pytest.mark.full("tests/train/test_loop.py::test_stop_and_resume_is_bitwise_the_straight_run")
def test_stop_and_resume_is_bitwise_the_straight_run(tmp_path, monkeypatch, mesh1):
    program = assemble(change(steps_per_execution=5), mesh1)
    fit(program, tmp_path / "straight", Plain())
    with monkeypatch.context() as patch:
        stopping(20, patch)  # a dispatch ends with it: 5, 10, 11, 12, 13, 18, 23, ...
        stopping(18, patch)
        with pytest.raises(Stopped):
            fit(program, tmp_path / "cut", Plain())
    assert fit(program, tmp_path / "cut", Plain())["resumed_from"] == 18
    jax.tree.map(
        np.testing.assert_array_equal, final(tmp_path / "straight", program), final(tmp_path / "cut", program)
    )


@pytest.mark.full("tests/step/test_guard.py")
def test_a_bad_update_among_several_is_the_one_that_is_named(tmp_path, mesh1):
    exp = change(steps_per_execution=6, eval_every=None, epochs=1)
    bad = int(assemble(exp, mesh1).example_ids(9)[3])  # the third update of the second dispatch
    exp = change(exp, augment=(Spoil(bad),))
    with pytest.raises(RunError, match="at step 9"):
        fit(assemble(exp, mesh1), tmp_path / "stop", Plain())
    assert json.loads((tmp_path / "stop" / "bad_batch.json").read_text())["step"] == 9
    assert not any((tmp_path / "stop").glob("checkpoints/*/manifest.json"))
    fit(assemble(change(exp, guard="skip", log_every=1), mesh1), tmp_path / "skip", Plain())
    assert [r["step"] for r in records(tmp_path / "skip") if r.get("train/skipped")] == [9]


def losses(*values):
    return [{"loss": Mean(np.float64(value), np.float64(1))} for value in values]


def test_records_are_of_the_same_updates_however_many_are_dispatched(tmp_path):
    with monitor.open(tmp_path, Plain(), start=0, log_every=3, examples=8) as record:
        record.step(4, losses(1, 2, 3, 4))  # writes what is of 1..3 and keeps 4
        assert [(r["step"], r["train/loss"]) for r in records(tmp_path)] == [(3, 2.0)]
        record.step(8, losses(5, 6, 7, 8))
        record.step(9, losses(9))
    assert [(r["step"], r["train/loss"]) for r in records(tmp_path)] == [(3, 2.0), (6, 5.0), (9, 8.0)]


class Times:
    """Stands in for the clock of ``_Trial``: seconds of an update, alone and with others."""

    def __init__(self, alone, several):
        self.alone, self.several, self.asked, self.updates = alone, several, [], 0

    def seconds(self, count, updates=None):
        self.asked.append(count)
        self.updates += max(count, updates or autotune.MAX_COUNT)
        return self.alone if count == 1 else self.several


@pytest.mark.parametrize(
    ("alone", "several", "count", "asked"),
    [
        (1e-4, 2e-5, 31, {1, 31}),  # 12.5 updates from one checkpoint to the next would leave 12
        (1e-4, 0.99e-4, 1, {1, 31}),  # too little to be sure of
        (1e-3, 5e-3, 1, {1, 31}),  # convolutions on a CPU
        (6e-3, 1e-9, 1, {1}),  # the other program is not even compiled
    ],
)
def test_the_faster_way_is_chosen(alone, several, count, asked, monkeypatch, mesh1):
    times = Times(alone, several)
    monkeypatch.setattr(autotune._Trial, "seconds", lambda _, *given: times.seconds(*given))
    program = assemble(change(epochs=500, eval_every=10, save_every=10), mesh1)  # 125 updates in ten epochs
    choice = choose(program)
    assert choice.count == count and set(times.asked) == asked
    assert alone < autotune.MAX_STEP_SECONDS or times.updates <= 4  # a step may take seconds
    assert (several * 2 < alone) or times.asked.count(31) <= 7
    assert str(round(1e6 * alone)) in choice.why or "ms an update" in choice.why


@pytest.mark.full("tests/train/test_dispatch.py::test_an_mlp_is_bitwise_the_same_and_so_are_its_records")
def test_what_is_measured_leaves_no_trace_in_the_run(monkeypatch, tmp_path, mesh1):
    monkeypatch.setattr(autotune, "MIN_UPDATES", 1)
    program = assemble(change(steps_per_execution="auto"), mesh1)
    choice = choose(program)
    assert choice.count in (1, 12) and set(choice.seconds) >= {1}
    fit(program.with_cadence(steps_per_execution=1), tmp_path / "after", Plain())
    fit(assemble(MLP, mesh1), tmp_path / "fresh", Plain())
    assert records(tmp_path / "after") == records(tmp_path / "fresh")


def test_the_setting_and_deterministic_are_not_measured(monkeypatch, mesh1):
    monkeypatch.setattr(autotune, "choose", lambda program: pytest.fail("measured"))
    assert decide(assemble(change(steps_per_execution=7), mesh1), None, False).count == 7
    auto = assemble(MLP, mesh1)
    assert decide(auto, None, True).count == 1
    assert decide(auto, {"steps_per_execution": 12}, True).count == 12  # the record decides
    assert decide(auto, {}, False).count == 1  # no record of the choice
    monkeypatch.undo()
    assert decide(auto, None, False) == Choice(1, "a run of fewer than 5,000 updates")


@pytest.mark.full("tests/train/test_dispatch.py::test_an_mlp_is_bitwise_the_same_and_so_are_its_records")
def test_the_choice_is_part_of_the_run(monkeypatch, tmp_path, capsys):
    folder, choices = str(tmp_path / "run"), [Choice(4, "for a test", {1: 2e-4, 4: 1e-4})]
    monkeypatch.setattr(autotune, "choose", lambda program: choices.pop())
    seen = []
    real = monitor.Recorder.step

    def step(self, number, rows):
        seen.append(len(rows))
        return real(self, number, rows)

    monkeypatch.setattr(monitor.Recorder, "step", step)
    words = ["--experiment", TINY, "--workdir", folder]
    with monkeypatch.context() as patch:
        stopping(4, patch)
        assert run.main(words) == 130
    assert "4 updates per compiled call: for a test" in capsys.readouterr().out
    record = run_record.load(tmp_path / "run")
    assert record["steps_per_execution"] == 4 and record["execution_seconds"] == {"1": 2e-4, "4": 1e-4}
    assert run.main([*words, "--set", "log_every=2"]) == 0  # changes what is recorded of the run
    assert run_record.load(tmp_path / "run")["steps_per_execution"] == 4 and 4 in seen[1:]
    assert run.main([*words, "--set", "steps_per_execution=2"]) == 2
    assert "steps_per_execution is 'auto' there and 2 here" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "x", "1.5", "true"])
def test_bad_numbers_are_refused(value, capsys):
    assert run.main(["--experiment", TINY, "--set", f"steps_per_execution={value}"]) == 2
    error = capsys.readouterr().err
    assert "steps_per_execution" in error and error.count("\n") == 1
    with pytest.raises(InputError, match="steps_per_execution is True"):
        change(steps_per_execution=True)


@pytest.mark.full("tests/train/test_dispatch.py::test_the_setting_and_deterministic_are_not_measured")
def test_verify_uses_the_same_steps_per_execution(capfd):
    words = ["verify", "--experiment", TINY, "--set", "steps_per_execution=3", "--steps", "8"]
    assert commands.main(words) == 0
    assert "verified: bit-for-bit identical" in capfd.readouterr().out
    assert commands.main([*words[:-1], "2"]) == 0
    assert "too few steps to test an execution of 3 updates: use --steps 12" in capfd.readouterr().out


def test_verify_measures_once_for_all_its_phases(monkeypatch):
    started = []

    def start(args, folder, phase, count=1):
        started.append((phase, list(args.set), args.steps))
        folder.mkdir(exist_ok=True)
        (folder / verify.CHOICE).write_text("28")

    monkeypatch.setattr(verify, "_start", start)
    monkeypatch.setattr(verify, "compare", lambda *args: {"all": "the same"})
    long = ["--experiment", TINY, "--set", "epochs=500"]
    assert commands.main(["verify", *long]) == 0
    assert [phase for phase, *_ in started] == ["choose", "straight", "killed", "resumed"]
    assert started[0][1:] == (["epochs=500"], None)
    assert all(rest == [["epochs=500", "steps_per_execution=28"], 112] for _, *rest in started[1:])
    started.clear()
    assert commands.main(["verify", *long, "--deterministic"]) == 0
    assert started[0] == ("straight", ["epochs=500", "steps_per_execution=1"], 20)


def test_sharded_programs_stack_along_a_new_axis(mesh8):
    split = sharding.batch_split(mesh8)
    assert sharding.stacked(split).shard_shape((3, 16, 5)) == (3, 2, 5)


def test_the_step_is_compiled_in_background_and_not_again(tmp_path, mesh1):
    program, compiled = assemble(MLP, mesh1), []

    def hear(name, *_, **__):
        if name.endswith("backend_compile_duration"):
            compiled.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        with dispatch.compile_in_background(program):
            state = program.init()
        assert compiled.count("compile") == 1
        compiled.clear()
        program.train_step(state, program.train.batch(0), program.key)
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def test_the_first_step_is_traced_once(mesh1):
    traced = []

    def stage(batch, key):
        traced.append(key)
        return batch

    program = assemble(change(augment=(stage,)), mesh1)
    before = len(traced)
    throughput(program)
    program.train_step(program.init(), program.train.batch(0), program.key)
    assert len(traced) == before + 1  # of the shapes that throughput asks for
