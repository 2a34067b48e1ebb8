"""The loop: exact resume on one and eight devices, exact evaluation, bounded queue, no hidden sync."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import EXPERIMENT, split

from jaxtrain import checkpoint, data, losses, models, monitor, optim
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.signals import Stopped
from jaxtrain.experiment import Experiment
from jaxtrain.program import assemble
from jaxtrain.step import make_train_step
from jaxtrain.step.packing import PackedMetrics
from jaxtrain.train import session
from jaxtrain.train.dispatch import Dispatch, InFlight
from jaxtrain.train.loop import evaluate, fit


@pytest.fixture
def console():
    return monitor.make_console()


def change(**fields) -> Experiment:
    return dataclasses.replace(EXPERIMENT, **fields)


def final(folder, program):
    with checkpoint.open(folder) as saved:
        return jax.device_get(saved.restore(saved.latest(), program.abstract_state))


def stopping(at: int, monkeypatch):
    """Make the run believe that a SIGINT came during update ``at``."""
    real = Dispatch.__call__

    def call(self, state, step, count):
        if step + count == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, state, step, count)

    monkeypatch.setattr(Dispatch, "__call__", call)


@pytest.mark.full("[stream-1]")
@pytest.mark.parametrize("way", ["device-1", "device-8", "stream-1", "stream-8"])
def test_stop_and_resume_is_bitwise_the_straight_run(way, tmp_path, console, monkeypatch, mesh1, mesh8):
    placement, _, devices = way.partition("-")
    mesh = {"1": mesh1, "8": mesh8}[devices]
    program = assemble(change(placement=placement, epochs=2), mesh)
    straight = fit(program, tmp_path / "straight", console)
    with monkeypatch.context() as patch:
        stopping(9, patch)
        with pytest.raises(Stopped) as stopped:
            fit(assemble(change(placement=placement, epochs=2), mesh), tmp_path / "cut", console)
    assert stopped.value.exit_code == 130
    resumed = fit(assemble(change(placement=placement, epochs=2), mesh), tmp_path / "cut", console)
    assert resumed["resumed_from"] == 9 and straight["resumed_from"] == 0
    assert resumed["test"] == straight["test"]
    a, b = final(tmp_path / "straight", program), final(tmp_path / "cut", program)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert int(a.step) == 25


@pytest.mark.full("tests/train/test_loop.py::test_stop_and_resume_is_bitwise_the_straight_run")
def test_metrics_file_of_a_resumed_run_has_each_step_once(tmp_path, console, monkeypatch, mesh1):
    with monkeypatch.context() as patch:
        stopping(9, patch)
        with pytest.raises(Stopped):
            fit(assemble(EXPERIMENT, mesh1), tmp_path, console)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "train/loss": 1}\n{"step": 1')  # what a kill leaves behind
    fit(assemble(EXPERIMENT, mesh1), tmp_path, console)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 9, 10, 13, 13]


def test_evaluations_and_saves_come_as_epochs_are_completed(mesh1):
    cadence = assemble(change(epochs=3, eval_every=1, save_every=0.5), mesh1).cadence  # 12.5 steps an epoch
    assert [s for s in range(1, 39) if cadence.evaluates_after(s)] == [13, 25]  # the last is the final one
    assert [s for s in range(1, 39) if cadence.saves_after(s)] == [7, 13, 19, 25, 32, 38]
    often = assemble(change(eval_every=0.01), mesh1).cadence
    assert all(often.evaluates_after(s) for s in range(1, 13))


@pytest.mark.full("tests/train/test_loop.py::test_stop_and_resume_is_bitwise_the_straight_run")
def test_records_hold_epoch_and_learning_rate(tmp_path, console, mesh1):
    fit(assemble(EXPERIMENT, mesh1), tmp_path, console)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rate = EXPERIMENT.optimizer.lr.build(13)
    train = [r for r in records if "train/loss" in r]
    assert [r["learning_rate"] for r in train] == pytest.approx([float(rate(r["step"] - 1)) for r in train])
    assert train[0]["epoch"] == 5 / 12.5


@pytest.mark.full("tests/train/test_loop.py::test_train_and_evaluation_compile_once")
def test_a_regression_needs_no_accuracy(tmp_path, console, mesh1):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3)).astype(np.float32)
    source = data.Arrays({"image": x, "target": x @ np.array([[1.0], [2.0], [-1.0]], np.float32)})
    fields = {"train": source, "test": source, "loss": losses.MSE(), "augment": (), "preprocess": ()}
    model = models.MLP(widths=(), classes=1)
    exp = change(
        **fields, model=model, optimizer=optim.Adam(0.05), epochs=100, eval_every=None, save_every=100
    )
    assert fit(assemble(exp, mesh1), tmp_path, console)["test"]["mae"] < 0.01
    with pytest.raises(InputError, match="select=accuracy is not a metric"):
        assemble(change(**fields, model=model, holdout=8), mesh1)


@pytest.mark.full("tests/program/test_parallel.py::test_twenty_float64_steps_equal_one_device")
def test_one_and_eight_devices_train_alike(tmp_path, console, mesh1, mesh8):
    exp = change(model=models.MLP(widths=(16,), classes=4), augment=(), post_update=())
    results = [fit(assemble(exp, mesh), tmp_path / str(k), console) for k, mesh in enumerate((mesh1, mesh8))]
    assert results[0]["test"]["loss"] == pytest.approx(results[1]["test"]["loss"], rel=1e-5)


@pytest.mark.full("tests/program/test_parallel.py")
def test_batch_norm_statistics_are_over_the_global_batch(tmp_path, console, mesh1, mesh8):
    """On eight devices of two images each, per-device statistics would be far off."""
    exp = change(model=models.CNN(widths=(8,), convs=1, classes=4), augment=(), epochs=0.4)
    programs = [assemble(exp, mesh) for mesh in (mesh1, mesh8)]
    for k, program in enumerate(programs):
        fit(program, tmp_path / str(k), console)
    a, b = (final(tmp_path / str(k), p).extra["batch_stats"] for k, p in enumerate(programs))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.full("[17-8]")
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 50])
def test_evaluation_counts_each_example_once(n, devices, console, mesh1, mesh8):
    exp = change(test=split(n, 3), post_update=())
    program = assemble(exp, {1: mesh1, 8: mesh8}[devices])
    state = program.init()
    values = evaluate(program, state, "test", console)
    fields = exp.test.gather(np.arange(n))
    variables = {"params": state.params, **state.extra}
    logits = exp.model.apply(jax.device_get(variables), fields["image"] / np.float32(255))
    right = np.asarray(logits).argmax(-1) == fields["label"]
    assert values["accuracy"] == pytest.approx(right.mean(), abs=1e-7)
    nll = -np.asarray(jax.nn.log_softmax(logits))[np.arange(n), fields["label"]]
    assert values["loss"] == pytest.approx(nll.mean(), rel=1e-5)


def test_train_and_evaluation_compile_once(tmp_path, console, mesh8):
    program = assemble(change(epochs=2, test=split(50, 1)), mesh8)
    fit(program, tmp_path, console)
    assert program.train_step._cache_size() == 1
    assert program.evals["test"].step._cache_size() == 1


@pytest.mark.full("tests/train/test_loop.py::test_in_flight_waits_for_the_step_before_the_last_ones")
def test_500_tiny_steps_on_eight_devices_do_not_pile_up(tmp_path, console, mesh8):
    """Some 300 queued programs with a collective deadlock the CPU backend and abort the process."""
    exp = change(
        model=models.MLP(widths=(), classes=4), augment=(), post_update=(), epochs=40, eval_every=None
    )
    assert fit(assemble(exp, mesh8), tmp_path, console)["steps"] == 500


class Dispatched:
    """Metrics on the device, which record when they are read."""

    def __init__(self, number, read):
        self.number, self.read, self.vectors = number, read, ()

    def rows(self):
        self.read.append(self.number)
        return [self.number]


def test_in_flight_waits_for_the_step_before_the_last_ones():
    read, flight = [], InFlight(2)
    returned = [flight.add(Dispatched(step, read)) for step in range(5)]
    assert read == [0, 1, 2] and returned == [[], [], [[0]], [[1]], [[2]]]
    rest = flight.drain()
    assert next(rest) == [3] and read == [
        0,
        1,
        2,
        3,
    ]  # one by one, because the times between them are recorded
    assert list(rest) == [[4]] and list(flight.drain()) == []


def test_in_flight_reads_where_nothing_else_may(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    flight = InFlight(0)
    with jax.transfer_guard_device_to_host("disallow"):
        assert flight.add(PackedMetrics.of({"seen": jnp.ones(())})) == [[{"seen": 1.0}]]


def test_the_loop_reads_each_metric_once_and_behind_later_updates(tmp_path, console, monkeypatch, mesh1):
    program = assemble(change(eval_every=None, epochs=1, save_every=100, max_in_flight=3), mesh1)
    dispatched, reads = [], []
    call, rows = Dispatch.__call__, PackedMetrics.rows

    def dispatch(*args):
        state, metrics = call(*args)
        dispatched.append(metrics)
        return state, metrics

    def read(self):
        if any(self is each for each in dispatched):
            reads.append(len(dispatched))
        return rows(self)

    monkeypatch.setattr(Dispatch, "__call__", dispatch)
    monkeypatch.setattr(PackedMetrics, "rows", read)
    monkeypatch.delattr(PackedMetrics, "__getitem__")  # which would read too
    fit(program, tmp_path, console)
    steps = len(dispatched)
    assert steps > 10 and reads == [*range(4, steps + 1), steps, steps, steps]


@pytest.mark.full("tests/train/test_loop.py::test_train_and_evaluation_compile_once")
def test_best_checkpoint_is_chosen_on_valid_and_not_deleted(tmp_path, console, monkeypatch, mesh1):
    exp = change(holdout=40, epochs=12, optimizer=optim.SGD(lr=0.05), max_to_keep=1, save_every=100)
    real, calls = checkpoint.Checkpoints.save, []
    monkeypatch.setattr(
        checkpoint.Checkpoints, "save", lambda self, *args: calls.append(args[0]) or real(self, *args)
    )
    found = fit(assemble(exp, mesh1), tmp_path, console)
    with checkpoint.open(tmp_path) as saved:
        steps = {s.step: s.score for s in saved.steps()}
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    valid = {r["step"]: r["valid/accuracy"] for r in records if "valid/accuracy" in r}
    best = max(valid.values())
    first = min(step for step, value in valid.items() if value == best)
    assert found["best"] == {"step": first, "valid": best, "test": found["best"]["test"]}
    assert set(steps) == {first, found["steps"]}
    values = list(valid.values())
    improved = [s for k, s in enumerate(valid) if values[k] > max(values[:k], default=-1)]
    assert calls == sorted({*improved, found["steps"]}) and len(calls) < len(valid)


def test_holdout_leaves_training_examples_out(mesh1):
    program = assemble(change(holdout=0.25), mesh1)
    assert program.evals["valid"].examples == 50 and program.steps == 10  # ceil(150 / 16)


@pytest.mark.full("tests/step/test_guard.py")
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path, console, mesh1):
    quiet = {"eval_every": None, "save_every": 0.2, "log_every": 100}  # no record before the first save
    exp = change(optimizer=optim.SGD(lr=1e38), **quiet)
    with pytest.raises(RunError, match=r"(loss|grad_norm|update_norm) is (nan|inf)"):
        fit(assemble(exp, mesh1), tmp_path, console)
    with checkpoint.open(tmp_path) as saved:
        assert saved.latest() is None


def test_a_step_factory_and_data_init_of_the_users_own(tmp_path, console, mesh1):
    def negate(params, batch):
        assert batch["image"].dtype == jnp.float32  # prepared, not raw
        return jax.tree.map(jnp.zeros_like, params)

    calls = []

    def factory(*args, **kwargs):
        calls.append(len(args))
        return make_train_step(*args, **kwargs)

    program = assemble(change(step_factory=factory, data_init=negate), mesh1)
    assert calls == [5]
    assert all(not leaf.any() for leaf in jax.tree.leaves(jax.device_get(program.init().params)))


@pytest.mark.full("[stream]")
@pytest.mark.parametrize("placement", ["device", "stream"])
def test_data_init_sees_the_first_examples_preprocessed_and_not_augmented(placement, mesh8):
    seen = []

    class Look:
        examples = 30

        def __call__(self, params, batch):
            jax.debug.callback(lambda *arrays: seen.append(arrays), batch["image"], batch["label"])
            return params

    exp = change(data_init=Look(), placement=placement)
    jax.block_until_ready(assemble(exp, mesh8).init())
    jax.effects_barrier()
    first = exp.train.gather(np.arange(30))
    np.testing.assert_allclose(seen[0][0], first["image"] / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(seen[0][1], first["label"])


def test_post_update_stages_are_built_for_the_runs_length(mesh1):
    class Counted:
        def build(self, steps):
            lengths.append(steps)
            return lambda state: state

    lengths: list[int] = []
    program = assemble(change(post_update=(Counted(),)), mesh1)
    assert lengths and set(lengths) == {program.steps}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"batch": 12},
            "batch 12 does not divide over 8 devices: use --devices 6 at most, or --set batch=8 or 16",
        ),
        (
            {"eval_batch": 3},
            "eval_batch 3 does not divide over 8 devices: use --devices 3 at most, or --set eval_batch=8",
        ),
        (
            {"select": "acuracy", "holdout": 40},
            "select=acuracy is not a metric of this loss, which reports accuracy, loss",
        ),
        ({"model": models.CNN(widths=(8, 8, 8, 8), classes=4)}, "is too small"),
        ({"model": models.CNN(widths=(8,), classes=3)}, "train: label 3 of example"),
        ({"test": data.Synthetic(n=50, shape=(8, 8, 3))}, "field 'image' is uint8"),
        ({"preprocess": (data.Normalise(mean=(0.1, 0.2)),)}, "2 values of mean for images of 1"),
        ({"holdout": 200}, "holdout=200 of 200 examples"),
    ],
)
def test_bad_input_is_one_line_before_anything_compiles(fields, message, mesh8):
    with pytest.raises(InputError) as error:
        assemble(change(**fields), mesh8)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_nchw_images_are_recognised(mesh1):
    image = np.zeros((64, 3, 32, 32), np.uint8)
    source = data.Arrays({"image": image, "label": np.zeros(64, np.int32)})
    with pytest.raises(InputError, match=r"looks like .*NCHW"):
        assemble(change(train=source, test=source, augment=(), preprocess=()), mesh1)


def test_streamed_labels_are_checked_on_the_way(tmp_path, console, mesh1):
    bad = split(200, 0)
    bad.fields["label"][199] = 9
    source = data.Subset(bad, np.arange(200))  # a Subset is not checked before the run
    program = assemble(change(train=source, placement="stream", epochs=2), mesh1)
    assert program.choices["resident"] == {"train": False, "test": False}
    with pytest.raises(RunError, match=r"label 9 of example 199"):
        fit(program, tmp_path, console)


def test_a_score_that_is_not_finite_is_never_the_best(mesh1):
    program = assemble(change(holdout=40, select="-loss"), mesh1)
    assert program.score({"loss": float("nan")}) is None and program.score({"loss": 2.0}) == -2.0


@dataclasses.dataclass(frozen=True)
class Broken:
    """A source that fails in its own way."""

    n: int = 10

    def __len__(self):
        return self.n

    def gather(self, indices):
        raise OSError("disk gone")


def test_sources_that_are_empty_or_fail_are_one_line(mesh1):
    with pytest.raises(InputError, match="train: the data set Broken is empty"):
        assemble(change(train=Broken(0)), mesh1)
    with pytest.raises(RunError, match=r"test: Broken.gather failed: OSError: disk gone"):
        assemble(change(test=Broken()), mesh1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"post_update": 0.9}, r"post_update is 0.9: it must be a tuple"),
        ({"loss": None}, "loss is None: it must be a function"),
        ({"batch": "64"}, "batch is '64': it must be an int"),
        ({"epochs": True}, "epochs is True: it must be a number"),
        ({"optimizer": optax.adam(1e-2)}, "whose settings cannot be recorded"),
        ({"optimizer": optim.SGD}, "whose settings cannot be recorded"),
        ({"augment": [data.Normalise()]}, r"augment is \[Normalise.*: it must be a tuple of functions"),
        ({"preprocess": data.Normalise()}, r"preprocess is Normalise.*: it must be a tuple of functions"),
        ({"preprocess": (data.Normalise,)}, "preprocess is .*: it must be a tuple of functions"),
        ({"eval_every": "x"}, "eval_every is 'x': it must be a number"),
        ({"eval_batch": 8.0}, "eval_batch is 8.0: it must be an int or None"),
        ({"data_init": 3}, "data_init is 3: it must be a function or None"),
        ({"train": 3}, "train is 3: it must have __len__ and gather"),
    ],
)
def test_experiment_fields_of_the_wrong_kind_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        change(**fields)


def test_mistakes_inside_a_loss_or_an_init_are_named(mesh1):
    with pytest.raises(InputError, match=r"must return \(loss, metrics\)"):
        assemble(change(loss=lambda outputs, batch: outputs.mean()), mesh1)
    with pytest.raises(InputError, match="data_init must return params"):
        assemble(change(data_init=lambda params, batch: None), mesh1)
    with pytest.raises(InputError, match=r"epochs=1e\+300 is 2\^31 steps or more"):
        assemble(change(epochs=1e300), mesh1)


def test_a_deleted_working_directory_is_recorded_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.setenv("PWD", str(tmp_path / "gone"))
    assert session._working_directory() == str(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert session._working_directory() == str(tmp_path / "gone")
    monkeypatch.delenv("PWD")
    assert session._working_directory() == "/"
