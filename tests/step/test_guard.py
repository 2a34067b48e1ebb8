"""step.guard and train.bad_updates: a bad update is never applied, never saved and never silent."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import EXPERIMENT, split

from jaxtrain import checkpoint, data, losses, models, monitor, optim, sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.types import Model
from jaxtrain.data import compose
from jaxtrain.experiment import Experiment, config_hash
from jaxtrain.metrics import Mean
from jaxtrain.monitor.console import Plain
from jaxtrain.optim import EMA, LossScale
from jaxtrain.program import assemble
from jaxtrain.step import guard, make_init, make_train_step
from jaxtrain.step.gradients import evaluate_loss
from jaxtrain.step.packing import pack_metrics
from jaxtrain.train.bad_updates import BAD_BATCH_FILE, LOSS_WINDOW, MAX_SKIPS_IN_A_ROW, BadUpdateMonitor
from jaxtrain.train.loop import fit
from jaxtrain.train.run_folder import RunFolder

KEY = jax.random.key(0)
LINE = Model(
    lambda key, batch: ({"w": jnp.ones((3, 2))}, {"seen": jnp.zeros(())}),
    lambda params, extra, batch, *, train, key: (
        batch["x"] @ params["w"],
        {**extra, "seen": extra["seen"] + batch["x"].sum()},
    ),
)
BATCH = {"x": jnp.arange(12.0).reshape(4, 3) / 12, "label": jnp.array([0, 1, 0, 1])}


@pytest.fixture
def console():
    return monitor.make_console()


def change(**fields) -> Experiment:
    small = {"model": models.MLP(widths=(8,), classes=4), "augment": (), "eval_every": None}
    return dataclasses.replace(EXPERIMENT, **{**small, **fields})


@dataclasses.dataclass(frozen=True)
class Spoil:
    """A stage that makes the pixels of one example NaN (of all where it is -1), or its label ``label``."""

    example: int
    label: int | None = None

    def __call__(self, batch, key):
        if key is None:
            return batch
        hit = (batch["example_id"] == self.example) | (self.example < 0)
        if self.label is not None:
            return {**batch, "label": jnp.where(hit, self.label, batch["label"])}
        image = jnp.where(hit[:, None, None, None], jnp.nan, batch["image"].astype(jnp.float32))
        return {**batch, "image": image}


def same(a, b):
    """Bit for bit, whatever is NaN."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def final(folder, program):
    with checkpoint.open(folder) as saved:
        return jax.device_get(saved.restore(saved.latest(), program.abstract_state))


def relabelled(label):
    return lambda batch, key: {**batch, "label": batch["label"].at[0].set(label)}


def squared_root(outputs, batch):
    """Finite, with a gradient of 0 · ∞: the NaN that hides behind a finite loss."""
    loss = outputs.mean() + jnp.sqrt(0 * outputs.sum())
    return loss, {"loss": Mean.of(loss)}


HUGE = optax.scale(1e38)
CASES = {
    "NaN in the input": (losses.CrossEntropy(), optax.sgd(0.1), lambda b, _: {**b, "x": b["x"] * jnp.nan}),
    "gradient of a finite loss": (squared_root, optax.sgd(0.1), lambda b, _: b),
    "update": (losses.CrossEntropy(), optax.chain(optax.sgd(0.1), HUGE, HUGE), lambda b, _: b),
    "label above": (losses.CrossEntropy(), optax.sgd(0.1), relabelled(2)),
    "label -1, which is finite": (losses.CrossEntropy(), optax.sgd(0.1), relabelled(-1)),
    "mixed label": (
        losses.CrossEntropy(),
        optax.sgd(0.1),
        lambda b, _: {**b, "label_mixed": b["label"] - 1, "mix": jnp.full(4, 0.25)},
    ),
}
WORDS = {
    "NaN in the input": "loss is nan",
    "gradient of a finite loss": "grad_norm is nan",
    "update": "update_norm is inf",
    "label above": "1 label is no class of the model",
    "label -1, which is finite": "1 label is no class of the model",
    "mixed label": "2 labels are no class of the model",
}


@pytest.mark.full("[NaN in the input]")
@pytest.mark.parametrize("case", CASES)
def test_bad_update_leaves_the_state_bitwise_unchanged(case):
    loss, tx, prepare = CASES[case]
    after = (EMA(0.5),)
    state = make_init(LINE, optax.chain(tx, optax.trace(0.9)), post_update=after)(KEY, BATCH)
    tx = optax.chain(tx, optax.trace(0.9))
    steps = {
        policy: jax.jit(make_train_step(LINE, loss, tx, prepare, after, guard=policy))
        for policy in ("off", "skip")
    }
    guarded, metrics = steps["skip"](state, BATCH, KEY)
    assert int(guarded.step) == 1 and guard.bad_values(metrics["guard"].by_name())[0] == WORDS[case]
    same(guarded.replace(step=state.step), state)
    assert metrics["skipped"].compute() == 1 and float(metrics["loss"].count) == 0
    applied, plain = steps["off"](state, BATCH, KEY)
    assert (np.asarray(applied.params["w"]) != np.asarray(state.params["w"])).any()
    assert not {"guard", "skipped", guard.BAD_LABELS} & plain.keys()


def test_bad_labels_count_over_microbatches_without_masked_rows():
    step = make_train_step(LINE, losses.CrossEntropy(), optax.sgd(0.1), accumulate=2, guard="stop")
    state = make_init(LINE, optax.sgd(0.1))(KEY, BATCH)
    batch = {**BATCH, "label": jnp.array([2, 1, -1, 1])}
    figures = jax.jit(step)(state, batch, KEY)[1]["guard"].by_name()
    assert figures[guard.BAD_LABELS] == 2
    masked = {**batch, "mask": jnp.array([True, True, False, False])}
    assert int(losses.CrossEntropy().outside(jnp.zeros((4, 2)), masked)) == 1
    assert int(losses.CrossEntropy().outside(jnp.zeros((4, 2)), {"label": jnp.ones(4) * 9})) == 0


def test_count_bad_labels_wraps_the_loss_and_keeps_its_settings():
    loss = guard.count_bad_labels(losses.CrossEntropy(smoothing=0.25))
    assert loss.smoothing == 0.25 and guard.count_bad_labels(losses.MSE()) == losses.MSE()
    plain, watched = (evaluate_loss(f, jnp.eye(2), {"label": jnp.arange(2)}) for f in (loss._loss_fn, loss))
    assert float(plain[0]) == float(watched[0]) and watched[1].keys() - plain[1].keys() == {guard.BAD_LABELS}


@pytest.mark.full("[1]")
@pytest.mark.parametrize("devices", [1, 8])
def test_finite_run_is_bitwise_equal_without_the_guard(devices, tmp_path, console, mesh1, mesh8):
    found = {}
    for policy in ("off", "stop"):
        exp = change(optimizer=optim.AdamW(lr=1e-2), guard=policy)
        program = assemble(exp, {1: mesh1, 8: mesh8}[devices])
        found[policy] = fit(program, tmp_path / policy, console)["test"], final(tmp_path / policy, program)
    assert found["off"][0] == found["stop"][0]
    same(found["off"][1], found["stop"][1])


def test_off_adds_nothing_to_the_compiled_program(mesh1):
    def text(program):
        return program.train_step.lower(program.abstract_state, program.train.batch(0), program.key).as_text()

    off, stop = (assemble(change(guard=policy), mesh1) for policy in ("off", "stop"))
    exp, replicated = off.experiment, sharding.replicated(mesh1)
    after = tuple(stage.build(off.steps) if hasattr(stage, "build") else stage for stage in exp.post_update)
    prepare = compose(lambda batch, _: off.train.fetch(batch), *exp.preprocess)
    by_hand = make_train_step(exp.model, exp.loss, exp.optimizer.build(off.steps), prepare, after)
    states = jax.tree.map(lambda x: x.sharding, off.abstract_state)
    step = sharding.compile(
        pack_metrics(by_hand),
        args=(states, off.train.shardings, replicated),
        out=(states, replicated),
        donate=(0,),
    )
    assert text(off) == text(dataclasses.replace(off, train_step=step))
    assert "is_finite" in text(stop) and "is_finite" not in text(off)


def five(model, loss_fn, tx, prepare, after):
    """A step factory that knows nothing of the guard."""
    return make_train_step(model, loss_fn, tx, prepare, after)


def counted(program):
    """The program, and the steps that it is asked for."""
    asked: list[int] = []
    real = program.train.batch
    program.train.batch = lambda step: asked.append(step + 1) or real(step)
    return program, asked


@pytest.mark.full("tests/step/test_guard.py::test_bad_update_leaves_the_state_bitwise_unchanged")
@pytest.mark.parametrize("stage", [Spoil(77), Spoil(77, label=-1)])
def test_stop_ends_the_run_at_once_and_saves_nothing_later(stage, tmp_path, console, mesh1):
    exp = change(augment=(stage,), step_factory=five, log_every=50, save_every=0.2, holdout=40)
    program, asked = counted(assemble(exp, mesh1))
    bad = next(k for k in range(1, 99) if 77 in program.order.indices(k - 1))
    what = "1 label is no class of the model" if stage.label else "loss is nan"
    with pytest.raises(
        RunError, match=rf"^{what} at step {bad}: the update was not applied.*{BAD_BATCH_FILE}"
    ) as error:
        fit(program, tmp_path, console)
    assert "\n" not in str(error.value) and max(asked) <= bad + exp.max_in_flight
    found = json.loads((tmp_path / BAD_BATCH_FILE).read_text())
    assert found["step"] == bad and found["values"][guard.BAD_LABELS] == (1 if stage.label else 0)
    assert found["values"]["loss"] == "nan" or stage.label
    row = program.order.indices(bad - 1).tolist().index(77)
    batch = program.train.fetch(program.train.batch(bad - 1))
    assert int(batch["example_id"][row]) == 77
    examples = exp.train.gather(np.array(found["examples"]))  # of the source itself, hold-out or not
    np.testing.assert_array_equal(examples["image"], batch["image"])
    with checkpoint.open(tmp_path) as saved:
        latest = saved.latest()
        assert latest is None or latest.step < bad


@pytest.mark.full("tests/step/test_guard.py::test_bad_update_leaves_the_state_bitwise_unchanged")
def test_skip_continues_counts_and_equals_a_resumed_run(tmp_path, capsys, mesh1):
    exp = change(augment=(Spoil(77),), epochs=2, log_every=1, save_every=0.2, guard="stop")
    skipping = dataclasses.replace(exp, guard="skip")
    program = assemble(skipping, mesh1)
    straight = fit(program, tmp_path / "straight", Plain())
    bad = [k for k in range(1, 26) if 77 in program.order.indices(k - 1)]
    assert len(bad) == 2 and straight["steps"] == 25 and np.isfinite(straight["test"]["loss"])
    assert capsys.readouterr().out.count(f"loss is nan at step {bad[0]}: the update is skipped") == 1
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    skipped = {line["step"]: line["train/skipped"] for line in lines if "train/skipped" in line}
    assert [step for step, share in skipped.items() if share] == bad and len(skipped) == 25
    assert all(
        ("train/loss" in line) == (line["step"] not in bad) for line in lines if "train/skipped" in line
    )
    state = final(tmp_path / "straight", program)
    assert int(state.step) == 25 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))

    with pytest.raises(RunError, match=f"at step {bad[0]}"):
        fit(assemble(exp, mesh1), tmp_path / "cut", Plain())
    resumed = fit(assemble(skipping, mesh1), tmp_path / "cut", Plain())
    assert 0 < resumed["resumed_from"] < bad[0] and resumed["test"] == straight["test"]
    same(final(tmp_path / "cut", program), state)


@pytest.mark.full("tests/step/test_guard.py::test_bad_update_leaves_the_state_bitwise_unchanged")
def test_skips_are_bounded(tmp_path, console, mesh1):
    exp = change(augment=(Spoil(-1),), guard="skip", log_every=1, epochs=2)
    program, asked = counted(assemble(exp, mesh1))
    with pytest.raises(
        RunError,
        match=rf"at step {MAX_SKIPS_IN_A_ROW + 1}, the {MAX_SKIPS_IN_A_ROW + 1}th bad update in a row",
    ):
        fit(program, tmp_path, console)
    assert max(asked) <= MAX_SKIPS_IN_A_ROW + 1 + exp.max_in_flight
    assert json.loads((tmp_path / BAD_BATCH_FILE).read_text())["step"] == MAX_SKIPS_IN_A_ROW + 1


@pytest.mark.parametrize("scale", [2.0**15, 1.0])
def test_overflow_handled_by_the_loss_scale_is_not_bad(scale):
    def overflow(outputs, batch):
        """A gradient of float16 that is finite only while it is not scaled up, or not at all at scale 1."""
        factor = 1e3 if scale > 1 else jnp.inf
        loss = (outputs.astype(jnp.float16) * jnp.float16(factor)).astype(jnp.float32).mean()
        return loss, {"loss": Mean.of(jnp.float32(1))}

    config, tx = LossScale(initial=scale), optax.sgd(0.1)
    state = make_init(LINE, tx, loss_scale=config)(KEY, BATCH)
    step = jax.jit(make_train_step(LINE, overflow, tx, loss_scale=config, guard="skip"))
    after, metrics = step(state, BATCH, KEY)
    wrong = guard.bad_values(metrics["guard"].by_name())
    assert metrics["skipped"].compute() == 1 and (after.params["w"] == state.params["w"]).all()
    if scale > 1:
        assert wrong == [] and float(after.extra["loss_scale"]["scale"]) == scale / 2
        assert float(metrics["loss"].count) == 1
    else:
        assert wrong == ["grad_norm is nan"] and float(after.extra["loss_scale"]["scale"]) == 1


def make_monitor(tmp_path=None, **fields):
    settings = {"guard": "stop", "max_loss_spike": None, "max_in_flight": 2} | fields
    program = types.SimpleNamespace(
        experiment=types.SimpleNamespace(**settings), example_ids=lambda step: np.arange(3)
    )
    return BadUpdateMonitor(program, tmp_path, lambda text: None)


def figures(loss=1.0):
    return {"guard": guard.GuardValues(np.array([loss, 1, 1, 0]))}


def test_loss_spike_ends_the_run_once_there_is_an_average(tmp_path):
    monitor = make_monitor(tmp_path, max_loss_spike=3.0)
    for step in range(LOSS_WINDOW):
        monitor.judge(step, figures(9.0 if step == 1 else 1.0))  # no average yet
    monitor.judge(LOSS_WINDOW, figures(3.0))
    with pytest.raises(
        RunError, match=r"loss 9 at step 51 is above max_loss_spike=3 times its average of 1\.1"
    ):
        monitor.judge(LOSS_WINDOW + 1, figures(9.0))
    found = json.loads((tmp_path / BAD_BATCH_FILE).read_text())
    assert found["values"]["average_loss"] == pytest.approx(1.2, abs=0.1) and found["examples"] == [0, 1, 2]


def test_bad_update_ends_the_run_with_a_message(tmp_path):
    monitor, metrics = make_monitor(tmp_path / "absent"), figures()
    monitor.judge(1, metrics)
    assert metrics == {}  # taken out: the recorder has no use for them
    monitor.judge(2, {})
    with pytest.raises(RunError, match=r"at step 3:.*could not be written to .*absent"):
        monitor.judge(3, figures(np.nan))
    with pytest.raises(RunError, match=r"loss is inf at step 2:.*examples are not recorded"):
        make_monitor().judge(2, figures(np.inf))


def test_figures_of_several_steps_merge():
    good, bad = figures()["guard"], figures(np.inf)["guard"]
    assert good.merge(good).compute() == 0 and good.merge(bad).compute() == 1
    assert guard.Total(2).merge(guard.Total(3)).compute() == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guard": "halt"}, "guard is 'halt': it must be one of stop, skip, off"),
        ({"max_loss_spike": 1}, "max_loss_spike is 1: it must be a number above 1"),
        ({"max_loss_spike": True}, "max_loss_spike is True"),
        ({"max_loss_spike": 2.0, "guard": "off"}, "max_loss_spike needs the guard"),
    ],
)
def test_invalid_guard_settings_are_rejected(fields, message):
    with pytest.raises(InputError, match=message):
        change(**fields)


def test_policy_is_part_of_the_config_hash_and_max_loss_spike_is_not(tmp_path):
    """What a run computes from a bad batch on depends on it; ending early changes no number."""
    stop = change()
    assert len({config_hash(change(guard=policy)) for policy in ("stop", "skip", "off")}) == 3
    assert config_hash(change(max_loss_spike=2.0)) == config_hash(stop)
    RunFolder(tmp_path).acquire("tiny", stop, {})
    RunFolder(tmp_path).acquire("tiny", change(guard="skip"), {})  # allowed: nothing has been skipped so far
    with pytest.raises(InputError, match="guard is 'skip' there and 'stop' here"):
        RunFolder(tmp_path).acquire("tiny", stop, {})


def test_label_that_only_the_step_sees_passes_the_host_check(mesh1):
    """What the check inside the step is for: the raw labels are in range, and checked."""
    assemble(change(augment=(Spoil(3, label=9),)), mesh1)
    fields = dict(split(20, 0).fields) | {"label": np.full(20, 9, np.int32)}
    with pytest.raises(InputError, match="label 9 of example 0"):
        assemble(change(train=data.Arrays(fields)), mesh1)
