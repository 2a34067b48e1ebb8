"""Checkpoints: what is saved is what was there, nothing is restored in silence, nothing is lost."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import checkpoint, sharding
from jaxtrain.errors import InputError, RunError
from jaxtrain.types import State


def make_state(mesh, value=0.0, width=8, dtype=jnp.float32) -> State:
    whole = sharding.replicated(mesh)
    state = State(
        jnp.zeros((), jnp.int32),
        {"head": {"kernel": jnp.full((4, width), value, dtype)}},
        {"batch_stats": {"mean": jnp.full(3, float(value))}},
        ({"count": jnp.zeros((), jnp.int32)}, (), {"trace": jnp.full((4, width), float(value))}),
    )
    return jax.device_put(state, whole)


def like(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(folder, *steps, mesh, keep=9, scores=()):
    with checkpoint.open(folder, keep) as saved:
        for k, step in enumerate(steps):
            saved.save(step, make_state(mesh, step), scores[k] if scores else None)


def kept(folder):
    with checkpoint.open(folder) as saved:
        return [s.step for s in saved.steps()]


def test_round_trip_between_one_and_eight_devices(tmp_path, mesh1, mesh8):
    for number, (here, there) in enumerate([(mesh1, mesh8), (mesh8, mesh1)]):
        folder = tmp_path / str(number)
        save(folder, 7, mesh=here)
        with checkpoint.open(folder) as saved:
            state, step = saved.restore_or(lambda: pytest.fail("started afresh"), like(make_state(there)))
        assert step == 7
        jax.tree.map(np.testing.assert_array_equal, state, make_state(mesh1, 7))
        assert state.params["head"]["kernel"].sharding == sharding.replicated(there)


def test_a_save_is_not_touched_by_the_steps_that_follow_it(tmp_path, mesh1, mesh8):
    """The next step reuses the state's buffers while the file is still being written."""
    for number, mesh in enumerate((mesh1, mesh8)):
        whole = sharding.replicated(mesh)
        step = sharding.compile(
            lambda s: jax.tree.map(lambda x: x + 1, s), args=(whole,), out=whole, donate=(0,)
        )
        state = make_state(mesh, 0, width=200_000)
        with checkpoint.open(tmp_path / str(number)) as saved:
            saved.save(1, state)
            for _ in range(20):
                state = step(state)
            jax.block_until_ready(state)
        with checkpoint.open(tmp_path / str(number)) as saved:
            restored = saved.restore(saved.latest(), like(state))
        assert not np.asarray(restored.params["head"]["kernel"]).any()


def test_keeps_the_latest_and_the_best(tmp_path, mesh1):
    save(tmp_path, 1, 2, 3, 4, mesh=mesh1, keep=2, scores=(0.1, 0.9, 0.9, 0.2))
    assert kept(tmp_path) == [2, 3, 4]
    save(tmp_path, 5, 6, mesh=mesh1, keep=1, scores=(0.3, 0.3))
    assert kept(tmp_path) == [2, 6]
    with checkpoint.open(tmp_path) as saved:
        assert saved.best().step == 2 and saved.best_score() == 0.9


def test_nothing_saved_starts_afresh(tmp_path, mesh1):
    with checkpoint.open(tmp_path) as saved:
        assert saved.restore_or(lambda: "new", None) == ("new", 0)
        assert saved.latest() is None and saved.best() is None


def test_an_unfinished_save_is_not_a_checkpoint_and_is_cleaned_up(tmp_path, mesh1):
    save(tmp_path, 1, 2, mesh=mesh1)
    folder = tmp_path / "checkpoints"
    (folder / "000002" / "manifest.json").unlink()  # killed before the last write
    (folder / ".trash-000000-1").mkdir()  # killed while deleting
    (folder / "notes").mkdir()  # not ours
    (folder / "99.txt").write_text("")
    assert kept(tmp_path) == [1]
    with checkpoint.open(tmp_path) as saved:
        assert saved.clean() == ["000002"]
    assert sorted(p.name for p in folder.iterdir()) == ["000001", "99.txt", "notes"]


def test_arrays_whose_manifests_are_all_gone_are_not_thrown_away(tmp_path, mesh1):
    save(tmp_path, 1, 2, mesh=mesh1)
    for path in (tmp_path / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    with pytest.raises(RunError, match=r"has its arrays and no manifest"), checkpoint.open(tmp_path) as saved:
        saved.clean()
    assert len(list((tmp_path / "checkpoints").glob("*/state"))) == 2


def damage_types(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tree": 5}))


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"format": 1')


def damage_arrays(folder):
    shutil.rmtree(folder / "state" / "state")


def damage_everything(folder):
    shutil.rmtree(folder / "state")


@pytest.mark.parametrize("damage", [damage_types, damage_manifest, damage_arrays, damage_everything])
def test_a_checkpoint_that_cannot_be_read_is_an_error_that_names_it(damage, tmp_path, mesh1):
    save(tmp_path, 1, 2, mesh=mesh1)
    damage(tmp_path / "checkpoints" / "000002")
    with (
        pytest.raises(RunError, match=r"000002 cannot be read") as error,
        checkpoint.open(tmp_path) as saved,
    ):
        saved.restore_or(lambda: pytest.fail("started afresh"), like(make_state(mesh1)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 9}, r"params/head/kernel is float32\[4, 8\] there and float32\[4, 9\] here"),
        ({"dtype": jnp.bfloat16}, r"params/head/kernel is float32\[4, 8\] there and bfloat16\[4, 8\] here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_path(other, message, tmp_path, mesh1):
    """Orbax alone would cast and reshape."""
    save(tmp_path, 1, mesh=mesh1)
    with pytest.raises(InputError, match=message), checkpoint.open(tmp_path) as saved:
        saved.restore_or(lambda: None, like(make_state(mesh1, **other)))


def test_missing_and_surplus_arrays_are_refused(tmp_path, mesh1):
    save(tmp_path, 1, mesh=mesh1)
    state = make_state(mesh1)
    more = state.replace(extra={**state.extra, "ema": jnp.zeros(3)})
    less = state.replace(extra={})
    for other, message in (
        (more, "extra/ema is absent there"),
        (less, r"mean is float32\[3\] there and absent"),
    ):
        with pytest.raises(InputError, match=message), checkpoint.open(tmp_path) as saved:
            saved.restore(saved.latest(), other)


def test_a_newer_format_is_refused(tmp_path, mesh1):
    save(tmp_path, 1, mesh=mesh1)
    path = tmp_path / "checkpoints" / "000001" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with (
        pytest.raises(InputError, match=r"has format 99 and this version reads 1"),
        checkpoint.open(tmp_path) as saved,
    ):
        saved.restore(saved.latest(), like(make_state(mesh1)))


def test_the_manifest_says_what_it_is(tmp_path, mesh1):
    with checkpoint.open(tmp_path, about={"experiment": "mine", "hash": "abc"}) as saved:
        saved.save(3, make_state(mesh1), 0.5)
    manifest = json.loads((tmp_path / "checkpoints" / "000003" / "manifest.json").read_text())
    assert manifest["experiment"] == "mine" and manifest["step"] == 3 and manifest["score"] == 0.5
    assert manifest["tree"]["opt_state/2/trace"] == "float32[4, 8]"


def test_a_failed_save_is_an_error_at_the_next_poll_or_at_the_end(tmp_path, mesh1, monkeypatch):
    def fail(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", fail)
    with pytest.raises(RunError, match=r"saving step 1 .*No space left.*no step has been saved"):
        save(tmp_path, 1, mesh=mesh1)


def test_a_state_with_colliding_paths_is_refused(tmp_path, mesh1):
    state = make_state(mesh1).replace(extra={"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})
    with pytest.raises(InputError, match="one path"), checkpoint.open(tmp_path) as saved:
        saved.save(1, state)


def test_a_save_on_eight_devices_compiles_nothing(mesh8, tmp_path, caplog):
    """Orbax would cut every array into a slice for each device, and compile a program for each cut."""
    values = {f"w{i}": np.zeros((64 + i, 24), np.float32) for i in range(4)}
    state = State(np.int32(3), values, {}, {})
    state = jax.device_put(state, sharding.replicated(mesh8))
    with checkpoint.open(tmp_path) as saved, jax.log_compiles(), caplog.at_level("WARNING"):
        saved.save(3, state)
        saved.wait()
    assert not [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
