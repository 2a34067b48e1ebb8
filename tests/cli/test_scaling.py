"""``bench --scaling``: the measurement on 1, 2 and 4 of eight devices, the output, and bad input."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shlex

import jax
import numpy as np
import pytest
from PIL import Image

from jaxtrain import __main__ as commands
from jaxtrain.cli import bench as bench_command
from jaxtrain.core import files
from jaxtrain.core.errors import InputError
from jaxtrain.experiment import Experiment, find
from jaxtrain.monitor import Console, make_console
from jaxtrain.program import Program
from jaxtrain.step.packing import PackedMetrics
from jaxtrain.train import scaling
from jaxtrain.train.scaling import Lane, Measured, efficiency, interleaved, layouts, measure, record, speedup

SMALL = """
import numpy as np
from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

rng = np.random.default_rng(0)
image, label = rng.integers(0, 9, (40, 4), np.uint8), rng.integers(0, 3, 40, np.int32)
source = data.Arrays({"image": image, "label": label})
EXPERIMENT = Experiment(
    model=models.MLP(widths=(8,), classes=3, dropout=0.1),
    train=source,
    test=source,
    loss=losses.CrossEntropy(),
    optimizer=optim.SGD(lr=0.1, momentum=0.9),
    preprocess=(data.Normalise(mean=(4.0,), std=(3.0,)),),
    batch=16,
    epochs=4,
)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    """An experiment that compiles quickly, as a file."""
    path = tmp_path_factory.mktemp("experiments") / "small.py"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture(scope="module")
def experiment(file) -> Experiment:
    return find(file).load()[0]


@pytest.fixture
def few(file) -> list[str]:
    """Arguments for a short measurement."""
    return ["--experiment", file, "--steps", "2", "--rounds", "3"]


@pytest.fixture
def console() -> Console:
    return make_console()


@pytest.fixture
def rounds(monkeypatch) -> list[tuple[str, int]]:
    """Record every round as (mesh size, steps)."""
    seen = []
    real = Lane.round

    def record_round(self, steps):
        seen.append((self.mesh.size, steps))
        return real(self, steps)

    monkeypatch.setattr(Lane, "round", record_round)
    return seen


@pytest.fixture
def unmeasured(monkeypatch):
    """Bad input must be refused before anything is compiled."""

    def never(*args, **kwargs):
        raise AssertionError("bad input was measured")

    monkeypatch.setattr(scaling, "assemble", never)


@pytest.fixture
def instant(monkeypatch):
    """Fake figures: n devices take 1 / sqrt(n) seconds for their steps; the rounds differ."""

    def fake_measure(given, *, steps, rounds, console):
        return [
            Measured(n, f"data={n}", layout.experiment.batch, True, steps, (n**-0.5, 2 * n**-0.5, n**-0.5))
            for n, layout in given.items()
        ]

    monkeypatch.setattr(scaling, "measure", fake_measure)


def bench(*args) -> int:
    return commands.main(["bench", *map(str, args)])


def refused(capsys, *args) -> str:
    """Check for exit code 2; returns the error, which must be one line."""
    code = bench(*args)
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


@pytest.mark.full("tests/cli/test_scaling.py")
def test_rounds_of_all_device_counts_are_interleaved(experiment, console, rounds):
    found = measure(layouts(experiment, (1, 2, 4)), steps=2, rounds=3, console=console)
    assert [(one.devices, one.mesh, one.batch) for one in found] == [
        (1, "data=1", 16),
        (2, "data=2", 16),
        (4, "data=4", 16),
    ]
    assert all(one.steps == 2 and one.resident and len(one.round_seconds) == 3 for one in found)
    assert all(seconds > 0 for one in found for seconds in one.round_seconds)
    first, later = rounds[:3], rounds[3:]
    assert first == [(1, 1), (2, 1), (4, 1)]  # compile, one after another
    up, down = [(1, 2), (2, 2), (4, 2)], [(4, 2), (2, 2), (1, 2)]
    assert later == [*down, *up, *down, *up]  # the first is discarded


@pytest.mark.full("tests/cli/test_scaling.py")
def test_a_lane_trains_like_a_run_and_compiles_once(experiment, mesh8):
    lane = Lane(experiment, mesh8)
    state, program = lane.program.init(), lane.program
    for step in range(5):
        state, _ = program.train_step(state, program.train.batch(step), program.key)
    lane.round(2)
    lane.round(3)
    assert program.train_step._cache_size() == 1
    assert int(lane.state.step) == 5
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(lane.state), jax.device_get(state))


@pytest.mark.full("tests/cli/test_scaling.py")
def test_a_round_bounds_its_queue_and_waits_at_its_end(experiment, mesh1, monkeypatch):
    lane, waited, read = Lane(experiment, mesh1), [], []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    monkeypatch.setattr(PackedMetrics, "rows", lambda metrics: read.append(metrics) or [])
    lane.round(5)
    assert len(read) == 5 - experiment.max_in_flight and len(waited) == 1
    assert waited[-1][0] is lane.state


@pytest.mark.full("tests/cli/test_scaling.py")
def test_the_loader_is_closed_if_measuring_fails(experiment, console, monkeypatch):
    closed, real = [], Program.close
    monkeypatch.setattr(Program, "close", lambda self: (closed.append(self), real(self)))
    given = layouts(dataclasses.replace(experiment, placement="stream"), (1, 2))
    assert not measure(given, steps=1, rounds=1, console=console)[0].resident
    assert len(closed) == 2
    monkeypatch.setattr(Lane, "round", lambda self, steps: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(given, steps=1, rounds=1, console=console)
    assert len(closed) == 3


def test_strong_scaling_keeps_the_global_batch_and_weak_scaling_the_batch_per_device(experiment):
    counts = (1, 2, 8)
    batches = {
        weak: [found.experiment.batch for found in layouts(experiment, counts, "data=*", weak).values()]
        for weak in (False, True)
    }
    assert batches == {False: [16, 16, 16], True: [16, 32, 128]}
    given = layouts(experiment, (2, 4, 8), "model=2,fsdp=*", weak=True)
    assert [found.sizes["fsdp"] for found in given.values()] == [1, 2, 4]
    assert [found.experiment.batch for found in given.values()] == [32, 64, 128]
    odd = dataclasses.replace(experiment, eval_batch=5)  # nothing is evaluated
    assert layouts(odd, (8,))[8].experiment.eval_batch is None


def test_figures_by_hand():
    one = Measured(2, "data=2", 100, True, 10, (1.0, 3.0, 2.0))
    four = Measured(8, "data=8", 100, True, 10, (0.5, 1.5, 1.0))
    assert one.step_ms() == (150, 200, 250) and one.examples_per_second() == 500
    assert speedup(four, one) == 2 and efficiency(four, one) == 0.5 and efficiency(one, one) == 1
    points = record([one, four])["points"]
    assert points[1] == {
        "devices": 8,
        "mesh": "data=8",
        "batch": 100,
        "resident": True,
        "steps": 10,
        "round_seconds": (0.5, 1.5, 1.0),
        "step_ms": {"median": 100, "q1": 75, "q3": 125},
        "examples_per_second": 1000,
        "speedup": 2,
        "efficiency": 0.5,
    }


def test_every_other_round_is_reversed():
    assert list(interleaved((1, 2), 3)) == [(0, 2), (0, 1), (1, 1), (1, 2), (2, 2), (2, 1)]


@pytest.mark.full("tests/cli/test_scaling.py")
def test_the_command_prints_a_table_and_writes_json(few, tmp_path, capsys):
    words = ["bench", "--scaling", "4,1", *few, "--json", str(tmp_path / "s.json"), "--set", "seed=3"]
    assert commands.main(words) == 0
    out = capsys.readouterr().out
    assert "WARNING: simulated devices share" in out
    assert "small, strong scaling on cpu, medians (and quartiles) of 3 rounds of 2 steps" in out
    row = r"^ +(\d) +(data=\d) +16 +[\d.]+ \([\d.]+–[\d.]+\) +([\d,]+) +([\d.]+) +([\d.]+ %)$"
    table = re.findall(row, out, re.M)
    found = json.loads((tmp_path / "s.json").read_text())
    assert shlex.split(found["command"]) == ["python", "-m", "jaxtrain", *words]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert found["device"] == found["platform"] == "cpu" and found["simulated"] is True
    assert found["versions"]["jax"] == jax.__version__ and found["cores"] >= 1 and found["load_before"] >= 0
    assert (found["experiment"], found["scaling"], found["rounds"]) == ("small", "strong", 3)
    assert table == [
        (
            str(point["devices"]),
            point["mesh"],
            f"{point['examples_per_second']:,.0f}",
            f"{point['speedup']:.2f}",
            f"{100 * point['efficiency']:.1f} %",
        )
        for point in found["points"]
    ]
    assert [point["mesh"] for point in found["points"]] == ["data=1", "data=4"]
    assert all(len(point["round_seconds"]) == 3 for point in found["points"])


def test_one_cpu_device_is_not_simulated(few, instant, capsys):
    assert bench("--scaling", "1", *few) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_the_plot_shows_measured_and_ideal_speed():
    pytest.importorskip("matplotlib")
    found = [Measured(n, "", 100, True, 1, (1 / n**0.5, 2 / n**0.5)) for n in (2, 8)]
    about = {"experiment": "small", "scaling": "weak", "device": "cpu", "simulated": True, **record(found)}
    [axis] = bench_command._figure(about).axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["ideal", "measured, with quartiles"]
    ideal, measured, *_ = (line.get_xydata() for line in axis.lines)
    speed = 100 / (1.5 / 2**0.5)
    np.testing.assert_allclose(ideal, [(2, speed), (8, 4 * speed)])
    np.testing.assert_allclose(measured, [(2, speed), (8, 2 * speed)])
    assert axis.get_title() == "small, weak scaling, cpu (simulated devices)"


def test_the_plot_is_an_image(few, instant, tmp_path):
    pytest.importorskip("matplotlib")
    assert bench("--scaling", "1,2,4,8", *few, "--plot", tmp_path / "s.png") == 0
    with Image.open(tmp_path / "s.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10  # coloured lines, not a blank image


def test_a_plot_without_matplotlib_is_refused_before_measuring(
    few, unmeasured, tmp_path, capsys, monkeypatch
):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    error = refused(
        capsys, "--scaling", "1", *few, "--plot", tmp_path / "s.png", "--json", tmp_path / "s.json"
    )
    assert "pip install 'jaxtrain[plot]'" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scaling", "1,2,1"], "--scaling 1,2,1 names 1 twice"),
        (["--scaling", "0,1"], "give numbers of devices, each at least 1"),
        (["--scaling", "1,,2"], "give numbers of devices"),
        (["--scaling", "two"], "give numbers of devices"),
        (["--scaling=-1"], "give numbers of devices"),
        (["--scaling", "1.5"], "give numbers of devices"),
        (["--scaling", "1,16"], "--scaling 16: this process has 8 devices"),
        (["--scaling", "16"], "--simulate-devices 16"),
        (["--scaling", "1", "--steps", "0"], "--steps 0: give at least 1"),
        (["--scaling", "1", "--rounds", "0"], "--rounds 0: give at least 1"),
        (["--scaling", "1", "--mesh", "data=1"], "put * for the size that grows"),
        (["--scaling", "1", "--mesh", "dta=*"], "did you mean data?"),
        (["--scaling", "1", "--mesh", "data=0,model=*"], "write axis=size"),
        (["--scaling", "1", "--mesh", "data=*,model=*"], "only one size can be *"),
        (
            ["--scaling", "2,3", "--mesh", "data=*,model=2"],
            "--scaling 3: --mesh data=*,model=2 needs a multiple",
        ),
        (
            ["--scaling", "1,2,3"],
            "--scaling 3: batch 16 does not divide into 3 parts (data=3): leave 3 out, or use --set batch=12",
        ),
        (["--scaling", "1,8", "--set", "accumulate=4"], "into 32 parts (data=8, accumulate=4): leave 8 out"),
        (["--scaling", "3", "--weak", "--set", "accumulate=3"], "batch 48 does not divide into 9 parts"),
        (["--scaling", "1", "--json", "none/s.json"], "folder none does not exist"),
        (["--scaling", "1", "--plot", "none/s.png"], "folder none does not exist"),
        (["--scaling", "1", "--json", "."], "is a folder: give a file"),
        (["--scaling", "1", "--plot", "s.pdf"], "give a name that ends in .png"),
        (["--scaling", "1", "--experiment", "digit_cnn"], "did you mean digits_cnn?"),
        (["--scaling", "1", "--set", "batch=many"], "batch=many: expected int"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    few, args, message, unmeasured, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *few, "--json", "s.json", *args)
    assert not list(tmp_path.iterdir())


def test_every_suggested_batch_works_for_all_counts(experiment):
    for counts, mesh, weak, accumulate in itertools.product(
        ((1, 3, 8), (2, 6)), ("data=*", "fsdp=*"), (False, True), (1, 6)
    ):
        odd = dataclasses.replace(experiment, batch=20, accumulate=accumulate)
        try:
            layouts(odd, counts, mesh, weak)
            continue
        except InputError as error:
            fixes = re.search(r"--set batch=(\d+)(?: or (\d+))?", str(error)).groups()
        for batch in filter(None, fixes):
            layouts(dataclasses.replace(odd, batch=int(batch)), counts, mesh, weak)


def test_a_failed_write_after_measuring_is_exit_3(few, instant, tmp_path, capsys, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_json", full)
    assert bench("--scaling", "1,2", *few, "--json", tmp_path / "s.json") == 3
    out, error = capsys.readouterr()
    assert "s.json cannot be written (No space left on device)" in error and "data=2" in out
    assert not list(tmp_path.iterdir())


def test_a_failed_plot_leaves_no_file(few, instant, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(bench_command, "_figure", lambda about: 1 / 0)
    code = bench("--scaling", "1,2", *few, "--json", tmp_path / "s.json", "--plot", tmp_path / "s.png")
    assert code == 1 and "ZeroDivisionError" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_refused(few, unmeasured, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    error = refused(capsys, "--scaling", "1", *few, "--json", tmp_path / "s.json")
    assert "s.json is not writable: give another file" in error


@pytest.mark.full("tests/cli/test_scaling.py")
def test_a_new_process_simulates_its_devices(few, python):
    done = python("-m", "jaxtrain", "bench", "--scaling", "1,2", "--simulate-devices", 2, *few)
    assert done.returncode == 0, done.stderr
    assert "2 devices (data=2): ready" in done.stdout and "WARNING" in done.stdout
