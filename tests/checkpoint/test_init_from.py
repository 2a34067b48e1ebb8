"""checkpoint.init_from: read another run's parameters by path, renamed on request, none left out silently."""

from __future__ import annotations

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import checkpoint, run, sharding
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import State, leaf_paths

TINY = Path(__file__).parents[1] / "tiny.py"


def make_state(value, names=("body", "head"), classes=4, ema=False) -> State:
    replicated = sharding.replicated(sharding.make_mesh(jax.devices()[:1]))
    params = {name: {"kernel": jnp.full((3, classes if name == "head" else 5), value)} for name in names}
    extra = {"batch_stats": {"body": jnp.full(5, value)}}
    if ema:
        extra["ema"] = jax.tree.map(lambda x: x + 100, {"params": params, **extra})
    return jax.device_put(State(jnp.int32(value), params, extra, {"trace": jnp.full(3, value)}), replicated)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    with checkpoint.open(folder, max_to_keep=3) as saved:
        saved.save(1, make_state(1.0), 0.5)
        saved.save(2, make_state(2.0), 0.1)
        saved.save(3, make_state(3.0, ema=True), 0.2)
    return str(folder)


def values(state: State) -> dict[str, float]:
    return {path: float(np.ravel(leaf)[0]) for path, leaf in leaf_paths(state).items()}


def test_reads_the_best_or_the_given_step_without_optimizer_state(source):
    lines = []
    state = checkpoint.init_from(source, [], make_state(0.0), lines.append)
    want = {
        "step": 0,
        "params/body/kernel": 1,
        "params/head/kernel": 1,
        "extra/batch_stats/body": 1,
        "opt_state/trace": 0,
    }
    assert values(state) == want and "initialized 3 arrays from" in lines[0] and lines[0].endswith("0 new")
    assert values(checkpoint.init_from(f"{source}:2", [], make_state(0.0)))["params/body/kernel"] == 2


def test_averages_are_read_and_initialized(source):
    """The averages that evaluation uses are read; averages of this state start as copies of them."""
    state = checkpoint.init_from(f"{source}:3", [], make_state(0.0, ema=True))
    found = values(state)
    assert {found.pop("step"), found.pop("opt_state/trace")} == {0} and set(found.values()) == {103}
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)  # or the train step could not donate them


@pytest.mark.full(
    "tests/checkpoint/test_init_from.py::test_reads_the_best_or_the_given_step_without_optimizer_state"
)
def test_averages_in_float32_of_half_precision_parameters(tmp_path):
    """The average is read into the parameters, rounded, and the new averages start as copies of it."""

    def half(value, ema):
        state = make_state(value, ema=ema)
        return state.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))

    with checkpoint.open(tmp_path / "averaged", max_to_keep=1) as saved:
        saved.save(1, half(0.01, ema=True))
    for ema in (True, False):
        state = checkpoint.init_from(str(tmp_path / "averaged"), [], half(0.0, ema))
        assert (
            state.params["body"]["kernel"].dtype == jnp.bfloat16
            and state.params["body"]["kernel"][0, 0] == 100
        )
    found = checkpoint.init_from(str(tmp_path / "averaged"), [], half(0.0, True)).extra["ema"]["params"]
    assert found["body"]["kernel"].dtype == jnp.float32 and found["body"]["kernel"][0, 0] == np.float32(
        100.01
    )
    with checkpoint.open(tmp_path / "plain", max_to_keep=1) as saved:
        saved.save(1, half(3.0, ema=False))
    found = checkpoint.init_from(str(tmp_path / "plain"), [], half(0.0, True)).extra["ema"]["params"]
    assert found["body"]["kernel"].dtype == jnp.float32 and found["body"]["kernel"][0, 0] == 3
    with pytest.raises(InputError, match="does not fit"):
        checkpoint.init_from(str(tmp_path / "plain"), [], make_state(0.0))


def test_arrays_needs_no_experiment(source):
    state = make_state(2.0)
    found = checkpoint.arrays(f"{source}:2")
    assert found.keys() == leaf_paths(state).keys()
    chex.assert_trees_all_equal(found, leaf_paths(state), strict=True)
    assert checkpoint.arrays(Path(source)).keys() == found.keys()  # the best step
    with pytest.raises(InputError, match="there is no step 7: give one of 1, 2, 3"):
        checkpoint.arrays(f"{source}:7")


def test_renamed_and_new_parameters(source):
    fresh = make_state(0.0, names=("trunk", "head"), classes=9)
    found = values(checkpoint.init_from(f"{source}:2", ["body=trunk", "head="], fresh))
    assert found["params/trunk/kernel"] == 2 and found["params/head/kernel"] == 0


@pytest.mark.parametrize(
    ("step", "renames", "other", "message"),
    [
        (
            "",
            [],
            {"classes": 9},
            r"head/kernel is float32\[3, 4\] there .* float32\[3, 9\] here.*--init-map head=",
        ),
        ("", [], {"names": ("body", "tail")}, r"params/tail/kernel is absent there.*--init-map tail="),
        ("", ["hed="], {}, "no parameter here is under hed"),
        ("", ["head"], {}, "--init-map head: give OLD=NEW"),
        (":9", [], {}, "there is no step 9: give one of 1, 2, 3"),
        ("/gone", [], {}, "there is no checkpoint in it"),
    ],
)
def test_mismatching_parameters_are_refused(step, renames, other, message, source):
    with pytest.raises(InputError, match=message) as error:
        checkpoint.init_from(source + step, renames, make_state(0.0, **other))
    assert "\n" not in str(error.value)


def test_damage_is_detected(source, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    real = ocp.load
    monkeypatch.setattr(ocp, "load", lambda *args: jax.tree.map(lambda x: x.at[0].set(9), real(*args)))
    with pytest.raises(checkpoint.CorruptCheckpointError, match="000001 is damaged: the array"):
        checkpoint.init_from(source, [], make_state(0.0))


MLP = """
import dataclasses
from jaxtrain import models
from tiny import EXPERIMENT

EXPERIMENT = dataclasses.replace(EXPERIMENT, model=models.MLP(widths=(8,), classes=4),
    augment=(), post_update=())
"""


@pytest.mark.full("tests/checkpoint/test_init_from.py")
def test_a_run_records_its_init_from_and_reads_it_once(tmp_path, capsys):
    file, first, second = tmp_path / "mlp.py", tmp_path / "first", tmp_path / "second"
    file.write_text(MLP)
    words = ["--experiment", str(file), "--workdir"]
    assert run.main([*words, str(first)]) == 0
    file.write_text(MLP.replace("augment=(),", "augment=(), seed=1,"))
    assert run.main([*words, str(second), "--init-from", str(tmp_path / "gone")]) == 2
    assert "--init-from" in capsys.readouterr().err and not second.exists()
    again = [*words, str(second), "--init-from", f"{first}:13"]
    assert run.main(again) == 0
    out = capsys.readouterr().out
    assert f"initialized 4 arrays from {first / 'checkpoints' / '000013'}, 0 new" in out
    assert json.loads((second / "config.json").read_text())["init_from"] == [f"{first}:13", []]
    (second / "result.json").unlink()
    (first / "checkpoints").rename(first / "moved")  # it is not needed any more
    assert run.main([*words, str(second)]) == 0 and run.main(again) == 0
    capsys.readouterr()
    assert run.main([*again, "--init-map", "head="]) == 2
    assert f"holds a run that started with --init-from {first}:13" in capsys.readouterr().err
