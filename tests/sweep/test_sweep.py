"""Members of a sweep are the runs that they would be alone; what they share, and what stops them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import types

import jax
import numpy as np
import pytest
from tiny import EXPERIMENT

from jaxtrain import __main__ as commands
from jaxtrain import checkpoint, models, optim, run, sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.signals import Stopped
from jaxtrain.monitor.console import Plain, Quiet
from jaxtrain.sweep import lockstep, strategy
from jaxtrain.sweep import run as sweep_run
from jaxtrain.sweep.members import expand
from jaxtrain.sweep.programs import assemble_settings
from jaxtrain.sweep.stacked import REPLICA
from jaxtrain.sweep.strategy import choose
from jaxtrain.sweep.training import Sweep
from jaxtrain.train import session
from jaxtrain.train.run_folder import RunFolder
from jaxtrain.train.session import Session

TINY = "tests/tiny.py"
MLP = dataclasses.replace(
    EXPERIMENT,
    model=models.MLP(widths=(16,), classes=4, dropout=0.1),
    optimizer=optim.SGD(lr=0.1, momentum=0.9, clip=1.0),
    epochs=1.6,  # 20 updates
    eval_every=0.8,
    save_every=0.8,
)
RATES = {"optimizer.lr": ["0.1", "0.05"]}


def full(witness, *values):
    return pytest.param(*values, marks=pytest.mark.full(witness))


def devices(count):
    return sharding.make_mesh(jax.devices()[:count], {"data": count})


def sweep_of(folder, experiment=MLP, grid=None, seeds=2, how="sequential", mesh=None, console=None):
    own = Session(
        name="tiny",
        folder=RunFolder(folder),
        mesh=mesh or devices(1),
        console=console or Quiet(),
        grace=None,
    )
    cells = expand(experiment, grid or {}, seeds)
    return Sweep(experiment=experiment, cells=cells, session=own, runs=folder, strategy=how)


def alone(folder, experiment):
    own = Session(name="tiny", folder=RunFolder(folder), mesh=devices(1), console=Quiet(), grace=None)
    session.run(own, experiment)
    return dict(checkpoint.arrays(folder))


def assert_equal(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        scale = tolerance * max(1e-3, float(np.abs(np.asarray(array, np.float64)).max(initial=0)))
        np.testing.assert_allclose(found[path], array, rtol=0, atol=scale, err_msg=path)


@pytest.fixture(scope="module")
def runs_alone(tmp_path_factory):
    """The arrays of both rates and both seeds, each trained by a run of its own."""
    folder = tmp_path_factory.mktemp("alone")
    cells = expand(MLP, RATES, 2)
    return {cell.folder_name: alone(folder / cell.folder_name, cell.experiment) for cell in cells}


@pytest.mark.parametrize(
    ("how", "grid", "tolerance"),
    [
        ("sequential", {}, 0.0),
        ("devices", {}, 0.0),
        ("vmap", RATES, 1e-5),
        full("[sequential-seeds]", "vmap", {}, 1e-5),
        full("[vmap-rates]", "sequential", RATES, 1e-5),  # the rates are inputs, not constants of the program
        full("[vmap-rates]", "devices", RATES, 1e-5),
    ],
    ids=[
        "sequential-seeds",
        "devices-seeds",
        "vmap-rates",
        "vmap-seeds",
        "sequential-rates",
        "devices-rates",
    ],
)
def test_members_are_the_runs_that_they_are_alone(tmp_path, runs_alone, how, grid, tolerance):
    sweep = sweep_of(tmp_path, grid=grid, how=how, mesh=devices(2 if how == "devices" else 1))
    table = sweep_run.run(sweep)
    assert table["strategy"] == how
    assert [tmp_path / m["folder"] for m in table["members"]] == [sweep.folder(c) for c in sweep.cells]
    for cell in sweep.cells:
        assert_equal(dict(checkpoint.arrays(sweep.folder(cell))), runs_alone[cell.folder_name], tolerance)
        lines = [json.loads(x) for x in (sweep.folder(cell) / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "train/loss" in line] == [5, 10, 15, 20]
        assert [line["step"] for line in lines if "test/accuracy" in line] == [10, 20]
        result = json.loads((sweep.folder(cell) / "result.json").read_text())
        row = next(row for row in table["settings"] if row["settings"] == cell.settings)
        assert row["values"][str(cell.seed)] == result["test"]["accuracy"]
    means = [np.mean(list(row["values"].values())) for row in table["settings"]]
    np.testing.assert_allclose([row["mean"] for row in table["settings"]], means)


@contextlib.contextmanager
def log_compiles():
    """Log them in every thread, where ``jax.log_compiles`` is for this one."""
    jax.config.update("jax_log_compiles", True)
    try:
        yield
    finally:
        jax.config.update("jax_log_compiles", False)


def compiled(caplog):
    """Names of the functions that XLA has compiled."""
    text = [record.getMessage() for record in caplog.records]
    return [
        line.split("jit(")[1].split(")")[0] for line in text if line.startswith("Finished XLA compilation")
    ]


def test_all_members_of_a_sweep_share_one_compiled_step(tmp_path, caplog):
    """Nothing is compiled for another seed, and nothing for another learning rate."""
    rates = {"optimizer.lr": ["0.1", "0.05", "0.01"]}
    with log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        sweep_run.run(sweep_of(tmp_path / "a", seeds=1))
        caplog.clear()
        for folder, grid, seeds in (("b", {}, 3), ("c", rates, 2)):
            sweep_run.run(sweep_of(tmp_path / folder, grid=grid, seeds=seeds))
            assert sorted(compiled(caplog)) == ["eval_step", "init", "step"]
            caplog.clear()


def test_devices_exchange_nothing(tmp_path):
    mesh = devices(2)
    setting, *_ = assemble_settings([MLP], strategy.alone_mesh(mesh))
    stacked = strategy.make("devices", [(setting, 0), (setting, 1)], strategy.alone_mesh(mesh), mesh)
    states = stacked.stack([setting.program.with_seed(seed).init() for seed in (0, 1)])
    for leaf in jax.tree.leaves(states):
        assert leaf.sharding.mesh.axis_names == (REPLICA,) and len(leaf.addressable_shards) == 2
    text = stacked.lower(states, 0).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "collective"))


@pytest.mark.parametrize("how", [full("[vmap]", "sequential"), "vmap"], ids=["sequential", "vmap"])
def test_a_run_that_fails_ends_alone(tmp_path, how):
    sweep = sweep_of(tmp_path, grid={"optimizer.lr": ["0.1", "1e30"]}, seeds=1, how=how)
    found = sweep_run.run(sweep)
    with pytest.raises(RunError, match=r"1 of 2 runs failed; the first: optimizer.lr=1e30 seed=0: .*step"):
        sweep_run.check(found)
    table = json.loads((tmp_path / sweep_run.FILE).read_text())
    good, bad = table["settings"]
    assert good["n"] == 1 and not good["failed"] and bad["n"] == 0 and bad["failed"][0]["seed"] == 0
    assert not (sweep.folder(sweep.cells[1]) / "result.json").exists()


@pytest.mark.full("tests/sweep/test_sweep.py::test_members_are_the_runs_that_they_are_alone")
@pytest.mark.parametrize("how", ["sequential", "vmap"])
def test_a_stopped_sweep_resumes_to_the_same_bits(tmp_path, monkeypatch, how):
    sweep_run.run(sweep_of(tmp_path / "straight", how=how))
    take, count = lockstep.loop.MetricsConsumer.take, [0]

    def stop(self, finished):
        count[0] += 1
        if count[0] == 30:
            signal.raise_signal(signal.SIGTERM)
        take(self, finished)

    with monkeypatch.context() as patch:
        patch.setattr(lockstep.loop.MetricsConsumer, "take", stop)
        with pytest.raises(Stopped, match="stopped after step") as stopped:
            sweep_run.run(sweep_of(tmp_path / "stopped", how=how))
    step = int(str(stopped.value).split("step ")[1].split()[0])
    folders = [tmp_path / "stopped" / cell.folder_name for cell in expand(MLP, {}, 2)]
    assert not all((folder / "result.json").exists() for folder in folders)
    saved = [(folder / "checkpoints" / f"{step:06d}" / "manifest.json").exists() for folder in folders]
    assert any(saved) if how == "sequential" else all(saved)
    monkeypatch.delattr(strategy, "choose")  # it is as it began, not measured again
    table = sweep_run.run(sweep_of(tmp_path / "stopped", how="auto"))
    assert table["strategy"] == how
    for cell in expand(MLP, {}, 2):
        found, expected = (
            dict(checkpoint.arrays(tmp_path / x / cell.folder_name)) for x in ("stopped", "straight")
        )
        assert_equal(found, expected)


@pytest.mark.full("tests/sweep/test_sweep.py::test_members_are_the_runs_that_they_are_alone")
def test_members_that_are_finished_are_not_trained_again(tmp_path, capsys):
    sweep_run.run(sweep_of(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    table = sweep_run.run(sweep_of(tmp_path, seeds=3, console=Plain()))
    assert len(before) == 2 and all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert table["settings"][0]["n"] == 3
    assert "n = 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"sequential": 1.0, "vmap": 0.5, "devices": 0.7}, "vmap"),
        ({"sequential": 1.0, "vmap": 6.0, "devices": 0.7}, "devices"),
        ({"sequential": 1.0, "vmap": 6.0, "devices": 1.5}, "sequential"),
        ({"sequential": 1.0, "vmap": 0.9, "devices": 0.9}, "sequential"),  # not worth other bits
    ],
)
def test_auto_chooses_what_is_fastest(monkeypatch, seconds, chosen):
    monkeypatch.setattr(strategy._Alone, "seconds", lambda self: seconds["sequential"])
    monkeypatch.setattr(
        strategy._Together, "seconds", lambda self: seconds["vmap" if self._count == 4 else "devices"]
    )
    monkeypatch.setattr(strategy, "make", lambda how, members, *_: Count(4 if how == "vmap" else 2))
    mesh = devices(2)
    settings = assemble_settings([MLP], mesh)
    found = choose(settings, lambda: settings, range(4), mesh)
    assert found.strategy == chosen and found.seconds == seconds


class Count:
    def __init__(self, count):
        self.count = count

    def stack(self, states):
        return states


def test_a_model_that_cannot_be_batched_trains_one_after_the_other(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no batching rule")

    monkeypatch.setattr(strategy, "make", refuse)
    settings = assemble_settings([MLP], devices(1))
    found = choose(settings, lambda: settings, range(2), devices(1))
    assert found.strategy == "sequential" and "vmap is not possible (no batching rule)" in found.why


@pytest.mark.parametrize(
    ("how", "mesh", "seeds", "message"),
    [
        ("devices", {"data": 1}, 2, "there is one device"),
        ("vmap", {"data": 1}, 1, "there is one member"),
        ("vmap", {"data": 1, "fsdp": 2}, 2, "divides the parameters"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(tmp_path, how, mesh, seeds, message):
    mesh = sharding.make_mesh(jax.devices()[: mesh.get("fsdp", 1)], mesh)
    with pytest.raises(InputError, match=f"--strategy {how}: .*{message}"):
        sweep_run.run(sweep_of(tmp_path, how=how, mesh=mesh, seeds=seeds))
    assert not any(tmp_path.iterdir())


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").touch()
    with pytest.raises(InputError, match="is not empty and holds no sweep"):
        sweep_run.run(sweep_of(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / sweep_run.FILE).write_text('{"hash": "0"}')
    with pytest.raises(InputError, match="holds a sweep of another experiment"):
        sweep_run.run(sweep_of(tmp_path / "b"))
    (tmp_path / "b" / sweep_run.FILE).write_text("[")
    with pytest.raises(InputError, match="cannot be read"):
        sweep_run.run(sweep_of(tmp_path / "b"))


@pytest.mark.full("tests/sweep/test_sweep.py::test_members_are_the_runs_that_they_are_alone")
def test_streamed_data_trains_together_too(tmp_path):
    stream = dataclasses.replace(MLP, placement="stream", eval_every=None)
    sweep_run.run(sweep_of(tmp_path / "a", stream, how="vmap"))
    sweep_run.run(sweep_of(tmp_path / "b", stream, how="sequential"))
    for cell in expand(stream, {}, 2):
        one, other = (dict(checkpoint.arrays(tmp_path / x / cell.folder_name)) for x in "ab")
        assert_equal(one, other, 1e-5)


def command(*arguments):
    return commands.main(["sweep", "--experiment", TINY, "--devices", "1", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "optimizer.rate=1"], "optimizer.rate is unknown"),
        (["--grid", "batch=two"], "expected int"),
        (["--seeds", "0"], "1 or more"),
        (["--grid", "batch"], "write PATH=V1,V2"),
        (["--grace", "0"], "give seconds above 0"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path):
    assert command("--workdir", str(tmp_path / "s"), *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("flags", [["--new"], ["--smoke"], ["--profile", "1:2"], ["--resume", "last-good"]])
def test_flags_of_one_run_do_not_go_with_seeds(flags, capsys):
    assert run.main(["--experiment", TINY, "--seeds", "2", *flags]) == 2
    assert capsys.readouterr().err.strip() == f"jaxtrain.run: {flags[0]} is for one run: leave out --seeds"
    assert run.main(["--experiment", TINY, "--strategy", "vmap"]) == 2
    assert "--strategy vmap needs --seeds" in capsys.readouterr().err


@pytest.mark.full("tests/sweep/test_sweep.py::test_members_are_the_runs_that_they_are_alone")
def test_run_seeds_trains_runs_that_other_commands_read(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "s"
    arguments = ["--set", "epochs=1", "--devices", "1", "--strategy", "sequential", "--workdir", str(folder)]
    assert run.main(["--experiment", TINY, "--seeds", "2", *arguments]) == 0
    assert "accuracy" in capsys.readouterr().out
    member = next(folder.glob("*-seed1"))
    assert commands.main(["evaluate", "--workdir", str(member), "--experiment", TINY, "--devices", "1"]) == 0
    assert (
        run.main(["--experiment", TINY, "--set", "epochs=1", "--set", "seed=1", "--workdir", str(member)])
        == 0
    )
    assert "this run is finished" in capsys.readouterr().out


def test_the_table_as_json_is_all_that_is_printed(tmp_path, capsys):
    assert command("--seeds", "1", "--json", "--workdir", str(tmp_path / "s")) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["settings"][0]["n"] == 1 and table["members"][0]["seed"] == 0


@dataclasses.dataclass(frozen=True)
class Noisy:
    """The images of ``tiny.py`` with noise, a setting of the data."""

    noise: float = 0.0

    def __len__(self):
        return len(EXPERIMENT.train)

    def gather(self, indices):
        fields = EXPERIMENT.train.gather(indices)
        noise = np.random.default_rng(0).normal(size=(len(self), 8, 8, 1))[indices]
        return {**fields, "image": (fields["image"] + self.noise * noise).clip(0, 255).astype(np.uint8)}


def test_settings_of_other_data_do_not_train_together():
    noisy = [dataclasses.replace(MLP, train=Noisy(noise)) for noise in (0.0, 100.0, 0.0)]
    assert [setting.family for setting in assemble_settings(noisy, devices(1))] == [0, 1, 0]


@pytest.mark.full("tests/sweep/test_sweep.py::test_settings_of_other_data_do_not_train_together")
@pytest.mark.parametrize("how", ["vmap", "devices"])
def test_members_on_other_data_train_on_their_own(tmp_path, how):
    noisy = dataclasses.replace(MLP, train=Noisy(), epochs=0.5, eval_every=None)
    grid = {"train.noise": ["0", "100"]}
    mesh = devices(2 if how == "devices" else 1)
    sweep_run.run(sweep_of(tmp_path / "a", noisy, grid=grid, how=how, mesh=mesh))
    for cell in expand(noisy, grid, 2):
        found = dict(checkpoint.arrays(tmp_path / "a" / cell.folder_name))
        assert_equal(found, alone(tmp_path / "b" / cell.folder_name, cell.experiment), 1e-5)


@pytest.mark.full("tests/sweep/test_sweep.py::test_a_run_that_fails_ends_alone")
@pytest.mark.parametrize("how", ["sequential", "vmap"])
def test_a_member_that_cannot_be_opened_fails_alone(tmp_path, how):
    sweep = sweep_of(tmp_path, seeds=3, how=how)
    sweep_run.run(sweep)
    damaged, in_use, missing = (sweep.folder(cell) for cell in sweep.cells)
    for folder in (damaged, in_use, missing):
        (folder / "result.json").unlink()
    (damaged / "config.json").write_text("{")
    with RunFolder(in_use).locked():
        table = sweep_run.run(sweep)
    (row,) = table["settings"]
    assert row["n"] == 1 and list(row["values"]) == [str(sweep.cells[2].seed)]
    why = [each["why"] for each in row["failed"]]
    assert "config.json cannot be read" in why[0] and "is in use by another run" in why[1]
    with pytest.raises(RunError, match="2 of 3 runs failed; the first: seed=0: "):
        sweep_run.check(table)


@pytest.mark.parametrize("how", ["vmap", "devices"])
def test_distillation_does_not_train_together(tmp_path, how):
    setting = types.SimpleNamespace(program=types.SimpleNamespace(teacher="a teacher"))
    with pytest.raises(InputError, match=f"--strategy {how}: distillation trains one run at a time"):
        sweep_run._choose(sweep_of(tmp_path, how=how, mesh=devices(2)), [setting], list, {})


def test_a_recorded_strategy_that_is_not_possible_any_more_is_replaced(tmp_path):
    sweep = sweep_of(tmp_path, how="auto", mesh=sharding.make_mesh(jax.devices()[:2], {"data": 1, "fsdp": 2}))
    chosen = sweep_run._choose(sweep, [], list, {"strategy": "vmap", "why": "measured"})
    assert chosen.strategy == "sequential" and "it began with vmap, and now the mesh" in chosen.why


def test_secrets_are_in_no_file_of_a_sweep(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Loss:
        api_key: str = ""

        def __call__(self, outputs, batch):
            return EXPERIMENT.loss(outputs, batch)

    secret = dataclasses.replace(MLP, loss=Loss(), epochs=0.1)
    sweep_run.run(sweep_of(tmp_path, secret, grid={"loss.api_key": ["CANARY-1-XYZ"]}, seeds=1))
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"CANARY-1-XYZ" not in path.read_bytes(), path


@pytest.mark.parametrize(
    "arguments",
    [
        {"grid": {"optimizer.lr": "0.1"}},
        {"grid": {"optimizer.lr": []}},
        {"grid": {"optimizer.lr": 0.1}},
        {"grid": {"select": ["accuracy", "-loss"]}},
        {"seeds": 2.0},
        {"strategy": "threads"},
    ],
    ids=str,
)
def test_wrong_arguments_of_fit_are_one_line(tmp_path, arguments):
    with pytest.raises(InputError) as error:
        sweep_run.fit(MLP, folder=tmp_path / "s", mesh=devices(1), console=Quiet(), **arguments)
    assert "\n" not in str(error.value) and not (tmp_path / "s").exists()


def test_json_is_printed_although_a_member_failed(tmp_path, capsys):
    arguments = ("--set", "optimizer.lr.peak=1e30", "--json", "--workdir", str(tmp_path / "s"))
    assert command(*arguments) == 3
    output = capsys.readouterr()
    assert json.loads(output.out)["settings"][0]["failed"] and "1 of 1 runs failed" in output.err
