"""Checkpoints: what is saved is what was there, nothing is restored in silence, nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import __main__ as commands
from jaxtrain import checkpoint, run, sharding
from jaxtrain.checkpoint import async_save, fingerprint, manifest, store
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.types import State, leaf_paths


def make_state(mesh, value=0.0, width=8, dtype=jnp.float32) -> State:
    replicated = sharding.replicated(mesh)
    state = State(
        jnp.zeros((), jnp.int32),
        {"head": {"kernel": jnp.full((4, width), value, dtype)}},
        {"batch_stats": {"mean": jnp.full(3, float(value))}},
        ({"count": jnp.zeros((), jnp.int32)}, (), {"trace": jnp.full((4, width), float(value))}),
    )
    return jax.device_put(state, replicated)


def like(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(folder, *steps, mesh, max_to_keep=9, scores=()):
    with checkpoint.open(folder, max_to_keep) as saved:
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


@pytest.mark.full("tests/checkpoint/test_checkpoint.py::test_round_trip_between_one_and_eight_devices")
def test_later_steps_do_not_change_a_pending_save(tmp_path, mesh1, mesh8):
    """The next step reuses the state's buffers while the file is still being written."""
    for number, mesh in enumerate((mesh1, mesh8)):
        replicated = sharding.replicated(mesh)
        step = sharding.compile(
            lambda s: jax.tree.map(lambda x: x + 1, s), args=(replicated,), out=replicated, donate=(0,)
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
    save(tmp_path, 1, 2, 3, 4, mesh=mesh1, max_to_keep=2, scores=(0.1, 0.9, 0.9, 0.2))
    assert kept(tmp_path) == [2, 3, 4]
    save(tmp_path, 5, 6, mesh=mesh1, max_to_keep=1, scores=(0.3, 0.3))
    assert kept(tmp_path) == [2, 6]
    with checkpoint.open(tmp_path) as saved:
        assert saved.best().step == 2 and saved.best_score() == 0.9


def test_no_checkpoint_starts_from_init(tmp_path, mesh1):
    with checkpoint.open(tmp_path) as saved:
        assert saved.restore_or(lambda: "new", like(make_state(mesh1))) == ("new", 0)
        assert saved.latest() is None and saved.best() is None


def test_an_unfinished_save_is_not_a_checkpoint_and_is_cleaned_up(tmp_path, mesh1):
    save(tmp_path, 1, 2, mesh=mesh1)
    folder, lines = tmp_path / "checkpoints", []
    (folder / "000002" / "manifest.json").unlink()  # killed before the last write
    (folder / "000002" / ".saving").touch()
    (folder / "000003" / "state.orbax-checkpoint-tmp").mkdir(parents=True)  # by an older version
    (folder / ".trash-000000-1").mkdir()  # killed while deleting
    (folder / "99").mkdir()  # not ours: Orbax alone would take it for the latest step
    (folder / "notes").mkdir()
    assert kept(tmp_path) == [1]
    with checkpoint.open(tmp_path, log=lines.append) as saved:
        saved.clean()
    assert sorted(p.name for p in folder.iterdir()) == ["000001", "99", "notes"]
    removed = [f"the save of step 00000{k} was unfinished and has been removed" for k in (2, 3)]
    assert lines == [*removed, f"{folder} also contains 99, notes: not a checkpoint, ignored"]


def test_a_save_marks_its_folder_until_it_is_complete(tmp_path, mesh1, monkeypatch):
    """It distinguishes a save that was killed from a lost manifest."""
    real, seen = manifest.write, []
    monkeypatch.setattr(manifest, "write", lambda f, m: seen.append((f / ".saving").exists()) or real(f, m))
    save(tmp_path, 1, mesh=mesh1)
    assert seen == [True]
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "000001").iterdir()) == [
        "manifest.json",
        "state",
    ]


@pytest.mark.parametrize("what", ["step", "state", "manifest.json"])
def test_links_are_not_followed(what, tmp_path, mesh1):
    save(tmp_path / "r", 1, 2, mesh=mesh1)
    step = tmp_path / "r" / "checkpoints" / "000002"
    link = step if what == "step" else step / what
    target = link.rename(tmp_path / "elsewhere")
    link.symlink_to(target)
    trash = tmp_path / "r" / "checkpoints" / ".trash-9"
    trash.symlink_to(tmp_path / "r" / "checkpoints" / "000001")
    before = sorted(tmp_path.glob("elsewhere/**/*"))
    with pytest.raises(RunError, match="000002 is damaged"), checkpoint.open(tmp_path / "r") as saved:
        saved.clean()
        saved.restore_or(lambda: None, like(make_state(mesh1)))
    with checkpoint.open(tmp_path / "r", max_to_keep=1) as saved:
        _, step = saved.restore_or(lambda: None, like(make_state(mesh1)), "last-good")
        assert step == 1
        saved.save(3, make_state(mesh1))
    assert kept(tmp_path / "r") == [3] and not trash.is_symlink()
    assert target.exists() and sorted(tmp_path.glob("elsewhere/**/*")) == before


def test_a_save_does_not_write_through_a_link(tmp_path, mesh1):
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "r" / "checkpoints" / "000001").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="000001 is a link, which is not followed"):
        save(tmp_path / "r", 1, mesh=mesh1)
    assert not list((tmp_path / "elsewhere").iterdir())


def damage_types(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tree": 5}))


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"format": 1')


def damage_score(folder):
    """Still good JSON: another step would be thought the best."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"score": 7.0}))


def lose_manifest(folder):
    (folder / "manifest.json").unlink()


def lose_arrays(folder):
    shutil.rmtree(folder / "state" / "state")


def lose_everything(folder):
    shutil.rmtree(folder / "state")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_types, "its manifest.json cannot be read"),
        (damage_manifest, "its manifest.json cannot be read"),
        (damage_score, "its manifest.json has been changed"),
        (lose_manifest, "its manifest.json is missing"),
        (lose_arrays, r"the file state/\S+ is missing"),
        (lose_everything, r"the file state/\S+ is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_in_the_error(damage, message, tmp_path, mesh1):
    save(tmp_path, 1, 2, mesh=mesh1)
    damage(tmp_path / "checkpoints" / "000002")
    pattern = f"000002 is damaged: {message}.*resume from an older one with --resume last-good"
    with (
        pytest.raises(checkpoint.CorruptCheckpointError, match=pattern) as error,
        checkpoint.open(tmp_path) as saved,
    ):
        saved.clean()
        saved.restore_or(lambda: pytest.fail("started afresh"), like(make_state(mesh1)))
    assert "\n" not in str(error.value)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << place % 8
    path.write_bytes(data)


def zero(path, place):
    data = bytearray(path.read_bytes())
    data[place : place + 4096] = bytes(len(data[place : place + 4096]))
    path.write_bytes(data)


def truncate(path, place):
    os.truncate(path, place)


def lose(path, place):
    path.unlink()


MESSAGES = {flip: "has changed", zero: "has changed", truncate: "has ", lose: "is missing"}


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory, mesh1):
    folder = tmp_path_factory.mktemp("one")
    rng = np.random.default_rng(0)
    state = make_state(mesh1, width=4000)
    state = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), state)
    with checkpoint.open(folder) as saved:
        saved.save(1, jax.device_put(state, sharding.replicated(mesh1)))
    return folder, like(jax.device_put(state, sharding.replicated(mesh1)))


@pytest.mark.parametrize("how", [flip, zero, truncate, lose])
def test_damage_to_any_file_is_detected_and_the_file_is_named(how, one_checkpoint, tmp_path):
    original, wanted = one_checkpoint
    files = [p.relative_to(original) for p in original.glob("checkpoints/000001/state/**/*") if p.is_file()]
    assert sum((original / name).stat().st_size for name in files) > 100_000  # the arrays are among them
    shutil.copytree(original, tmp_path / "r")
    found = 0
    with checkpoint.open(tmp_path / "r") as saved:
        saved.restore(saved.latest(), wanted)
        for name in files:
            was = (original / name).read_bytes()
            for place in sorted({0, len(was) // 2, max(0, len(was) - 1)}) if was and how is not lose else [0]:
                if was or how is lose:
                    how(tmp_path / "r" / name, place)
                    with pytest.raises(checkpoint.CorruptCheckpointError) as error:
                        saved.restore(saved.latest(), wanted)
                    assert f"the file {Path(*name.parts[2:])} {MESSAGES[how]}" in str(error.value)
                    assert how is not truncate or f"{place:,} bytes instead of {len(was):,}" in str(
                        error.value
                    )
                    shutil.copy(original / name, tmp_path / "r" / name)
                    found += 1
    assert found >= len(files) > 3


def test_changed_arrays_are_detected_and_named(one_checkpoint, tmp_path, monkeypatch):
    """Fingerprints check the arrays in device memory, whatever is in the files."""
    from orbax.checkpoint import v1 as ocp

    folder, wanted = one_checkpoint
    real = ocp.load

    def changed(path, abstract):
        arrays = real(path, abstract)
        return {**arrays, "extra/batch_stats/mean": arrays["extra/batch_stats/mean"].at[1].set(0)}

    monkeypatch.setattr(ocp, "load", changed)
    with (
        pytest.raises(
            checkpoint.CorruptCheckpointError, match="the array extra/batch_stats/mean has changed"
        ),
        checkpoint.open(folder) as saved,
    ):
        saved.restore(saved.latest(), wanted)


def test_last_good_falls_back_and_renames(tmp_path, mesh1):
    save(tmp_path, 1, 2, 3, 4, mesh=mesh1, scores=(0.9, 0.1, 0.2, 0.3))
    folder, lines = tmp_path / "checkpoints", []
    damage_manifest(folder / "000004")
    lose_arrays(folder / "000003")
    zero(next(p for p in (folder / "000001" / "state").rglob("*") if p.is_file()), 0)  # the best
    (folder / "damaged-000004").mkdir()  # it happened before
    with checkpoint.open(tmp_path, log=lines.append) as saved:
        state, step = saved.restore_or(
            lambda: pytest.fail("started afresh"), like(make_state(mesh1)), "last-good"
        )
        assert step == 2 and (np.asarray(state.params["head"]["kernel"]) == 2).all()
        assert saved.best().step == 2
        saved.save(3, make_state(mesh1, 3))
    names = ["000002", "000003", "damaged-000001", "damaged-000003", "damaged-000004", "damaged-000004-2"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert [line.partition(" is damaged")[0] for line in lines] == [
        f"WARNING: checkpoint {folder / name}" for name in ("000001", "000003", "000004")
    ]


def test_last_good_with_all_damaged_is_an_error_and_renames_nothing(tmp_path, mesh1):
    save(tmp_path, 1, 2, mesh=mesh1)
    for name in ("000001", "000002"):
        lose_arrays(tmp_path / "checkpoints" / name)
    with pytest.raises(checkpoint.CorruptCheckpointError, match=r"is damaged.*train again") as error:  # noqa: SIM117
        with checkpoint.open(tmp_path) as saved:
            saved.restore(saved.steps()[0], like(make_state(mesh1)))
    assert "last-good" not in str(error.value)  # there is no older one
    with (
        pytest.raises(
            checkpoint.CorruptCheckpointError, match=r"all checkpoints in \S+ are damaged \(step 2: the file"
        ),
        checkpoint.open(tmp_path) as saved,
    ):
        saved.restore_or(lambda: pytest.fail("started afresh"), like(make_state(mesh1)), "last-good")
    assert kept(tmp_path) == [1, 2]


@pytest.mark.parametrize("resume", ["newest", "last-good"])
def test_a_checkpoint_of_format_1_is_restored_with_a_notice(resume, tmp_path, mesh1):
    save(tmp_path, 1, mesh=mesh1)
    path, lines = tmp_path / "checkpoints" / "000001" / "manifest.json", []
    old = json.loads(path.read_text()) | {"format": 1}
    for new in ("seal", "files", "fingerprints"):
        del old[new]
    path.write_text(json.dumps(old))
    with checkpoint.open(tmp_path, log=lines.append) as saved:
        assert saved.restore_or(lambda: None, like(make_state(mesh1)), resume)[1] == 1
    assert len(lines) == 1 and "has no checksums" in lines[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 9}, r"params/head/kernel is float32\[4, 8\] there and float32\[4, 9\] here"),
        ({"dtype": jnp.bfloat16}, r"params/head/kernel is float32\[4, 8\] there and bfloat16\[4, 8\] here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_the_path_named(other, message, tmp_path, mesh1):
    """Orbax alone would cast and reshape."""
    save(tmp_path, 1, mesh=mesh1)
    with pytest.raises(InputError, match=message), checkpoint.open(tmp_path) as saved:
        saved.restore_or(lambda: None, like(make_state(mesh1, **other)))


def test_missing_and_extra_arrays_are_refused(tmp_path, mesh1):
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
        pytest.raises(InputError, match=r"has format 99 and this version reads 1 and 2"),
        checkpoint.open(tmp_path) as saved,
    ):
        saved.restore(saved.latest(), like(make_state(mesh1)))


def test_the_manifest_contains_about(tmp_path, mesh1):
    with checkpoint.open(tmp_path, about={"experiment": "mine", "hash": "abc"}) as saved:
        saved.save(3, make_state(mesh1), 0.5)
    manifest = json.loads((tmp_path / "checkpoints" / "000003" / "manifest.json").read_text())
    assert manifest["experiment"] == "mine" and manifest["step"] == 3 and manifest["score"] == 0.5
    assert manifest["tree"]["opt_state/2/trace"] == "float32[4, 8]"


@pytest.mark.parametrize("kept_before", [(), (4,)])
def test_a_failed_save_reports_the_last_step_and_the_space_needed(kept_before, tmp_path, mesh1, monkeypatch):
    def fail(path, data):
        raise OSError(28, "No space left on device")

    save(tmp_path, *kept_before, mesh=mesh1)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(2_500_000))
    monkeypatch.setattr(manifest, "write_json", fail)
    safe = "step 4 is safe" if kept_before else "no step has been saved"
    needs = "74.28 KB and 2.50 MB are free"
    with pytest.raises(RunError, match=f"saving step 5 .*No space left.*{safe}; a checkpoint needs {needs}"):
        save(tmp_path, 5, mesh=mesh1)
    assert kept(tmp_path) == list(kept_before)
    assert not (tmp_path / "checkpoints" / "000005").exists()  # it would keep the space


def test_a_failed_save_asks_for_space_only_where_space_is_the_reason(tmp_path, mesh1, monkeypatch):
    def fail(path, data):
        raise error

    monkeypatch.setattr(manifest, "write_json", fail)
    wrapped = ValueError("TensorStore: Disk quota exceeded")
    for error, space in ((PermissionError(13, "Permission denied"), False), (wrapped, True)):
        with pytest.raises(RunError, match=str(error.args[-1])) as raised:
            save(tmp_path, 5, mesh=mesh1)
        assert ("free space" in str(raised.value)) == space and "run the same command" in str(raised.value)


def test_empty_arrays_and_random_keys_are_saved_and_restored(tmp_path, mesh1):
    sharding = jax.sharding.NamedSharding(mesh1, jax.sharding.PartitionSpec())
    extra = {"lora": jnp.zeros((64, 0)), "key": jax.random.key(7), "complex": jnp.full(2, 1 + 2j)}
    state = jax.device_put(make_state(mesh1).replace(extra=extra), sharding)
    with checkpoint.open(tmp_path) as saved:
        saved.save(1, state)
    with checkpoint.open(tmp_path) as saved:
        found = saved.restore(saved.latest(), like(state)).extra
    assert found["lora"].shape == (64, 0) and found["lora"].dtype == jnp.float32
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(extra["key"])).all()
    assert (found["complex"] == extra["complex"]).all()
    on_host = checkpoint.arrays(tmp_path)
    assert on_host["extra/lora"].shape == (64, 0) and on_host["extra/key"].tolist() == [0, 7]


def test_a_complete_checkpoint_survives_an_error_after_it(tmp_path, mesh1, monkeypatch):
    real = store.folders.remove

    def fail(path):
        if path.name == "000001":
            raise OSError("cannot delete")
        real(path)

    monkeypatch.setattr(store.folders, "remove", fail)
    with pytest.raises(RunError, match=r"saving step 2 .*cannot delete.*step 2 is safe"):
        save(tmp_path, 1, 2, mesh=mesh1, max_to_keep=1)
    assert kept(tmp_path) == [1, 2]


def test_a_state_with_colliding_paths_is_refused(tmp_path, mesh1):
    state = make_state(mesh1).replace(extra={"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})
    with (
        pytest.raises(InputError, match="two arrays of the state have the path extra/a/b"),
        checkpoint.open(tmp_path) as saved,
    ):
        saved.save(1, state)


@pytest.fixture
def compiled(caplog):
    """Messages of what is compiled, in any thread, from now on."""
    jax.config.update("jax_log_compiles", True)
    with caplog.at_level("WARNING"):
        yield lambda: [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    jax.config.update("jax_log_compiles", False)


def test_a_save_on_eight_devices_compiles_the_fingerprints_only(mesh8, tmp_path, compiled):
    """Orbax would cut every array into a slice for each device, and compile a program for each cut."""
    values = {f"w{i}": np.zeros((64 + i, 24), np.float32) for i in range(4)}
    state = State(np.int32(3), values, {}, {})
    state = jax.device_put(state, sharding.replicated(mesh8))
    with checkpoint.open(tmp_path) as saved:
        saved.save(3, state)
        saved.wait()
    assert len(compiled()) == 1 and "fingerprints" in compiled()[0]


@pytest.mark.parametrize("axes", ["data=1", "data=2,fsdp=4"])
def test_a_save_on_cpus_only_copies(axes, tmp_path, monkeypatch):
    """Orbax may take its time: steps go on in the state's memory, and its step is what is saved."""
    size = 1 if axes == "data=1" else 8
    mesh = sharding.make_mesh(jax.devices()[:size], sharding.parse_mesh(axes, size))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    state = make_state(mesh, 5)
    state = state.replace(params=jax.device_put({"w": np.full((64, 32), 5, np.float32)}, split))
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    go, real, threads = threading.Event(), async_save._start, []

    def slow(folder, arrays):
        threads.append(threading.current_thread())
        assert go.wait(20), "the save was waited for"
        return real(folder, arrays)

    monkeypatch.setattr(async_save, "_start", slow)
    before = fingerprint.finish(leaf_paths(state), fingerprint.start(leaf_paths(state)))
    with checkpoint.open(tmp_path) as saved:
        saved.save(1, state)
        for _ in range(5):
            state = bump(state)
        jax.block_until_ready(state)
        go.set()
        saved.wait()
        found = saved.latest()
        assert found.manifest["fingerprints"] == before
        assert (np.asarray(saved.restore(found, like(state)).params["w"]) == 5).all()
    assert threads == [t for t in threads if t is not threading.main_thread()] and len(threads) == 1


def test_copies_do_not_share_memory(mesh1):
    """Else JAX would copy it with one thread, in the step that is given the state."""
    arrays = leaf_paths(make_state(mesh1, 1, width=4000))
    copied = async_save._copy(arrays)
    places = [{x.unsafe_buffer_pointer() for x in some.values()} for some in (arrays, copied)]
    assert not places[0] & places[1]


def test_without_copies_orbax_takes_the_values_before_save_returns(tmp_path, mesh1, monkeypatch, compiled):
    """On accelerators, whose memory a copy would fill; the fingerprints' program is there by then."""
    monkeypatch.setattr(async_save, "uses_copies", lambda arrays: False)
    strong = jax.tree.map(np.asarray, make_state(mesh1, 3, width=11))  # as a compiled step's results are
    state = jax.device_put(strong, sharding.replicated(mesh1))
    threads, real = [], async_save._start

    def start(*args):
        threads.append(threading.current_thread())
        return real(*args)

    monkeypatch.setattr(async_save, "_start", start)
    with checkpoint.open(tmp_path) as saved:
        saved.restore_or(lambda: state, like(state))
        saved._compiled.result()
        before = compiled()
        assert sum("fingerprints" in message for message in before) == 1
        saved.save(1, state)
        saved.wait()
        assert compiled() == before and threads == [threading.main_thread()]
        assert float(saved.restore(saved.latest(), like(state)).params["head"]["kernel"][0, 0]) == 3


MLP = """
import dataclasses
from jaxtrain import data, models, optim
from tiny import EXPERIMENT

EXPERIMENT = dataclasses.replace(
    EXPERIMENT, model=models.MLP(widths=(8,), classes=4, dropout=0.1), augment=(), post_update=(),
    save_every=0.5
)
"""


@pytest.mark.full(
    "tests/checkpoint/test_checkpoint.py::test_last_good_with_all_damaged_is_an_error_and_renames_nothing"
)
def test_last_good_resumes_bit_for_bit(tmp_path, capsys):
    """A finished run loses its result and its newest checkpoint, and gets both back."""
    (tmp_path / "mlp.py").write_text(MLP)
    words = ["--experiment", str(tmp_path / "mlp.py"), "--workdir", str(tmp_path := tmp_path / "r")]
    assert run.main(words) == 0
    newest = tmp_path / "checkpoints" / "000013"
    prints = json.loads((newest / "manifest.json").read_text())["fingerprints"]
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").unlink()
    flip(max((newest / "state").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size), 500)
    capsys.readouterr()
    for command, fix in (
        (lambda: run.main(words), "--resume last-good"),
        (
            lambda: commands.main(["evaluate", *words, "--checkpoint", "latest"]),
            "an older one with --weights",
        ),
    ):
        assert command() == 3
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and fix in error
        assert f"checkpoint {newest} is damaged: the file state/" in error
    assert run.main([*words, "--resume", "last-good"]) == 0
    out = capsys.readouterr().out
    assert f"WARNING: checkpoint {newest} is damaged and has been renamed to damaged-000013" in out
    assert "resuming at step 7/13" in out
    assert json.loads((newest / "manifest.json").read_text())["fingerprints"] == prints
    assert json.loads((tmp_path / "result.json").read_text())["test"] == result["test"]
    assert newest.with_name("damaged-000013").is_dir()


def test_swapped_step_folders_are_damage(tmp_path, mesh1):
    save(tmp_path, 1, 2, 3, mesh=mesh1)
    folder = tmp_path / "checkpoints"
    (folder / "000003").rename(folder / "third")
    (folder / "000002").rename(folder / "000003")
    (folder / "third").rename(folder / "000002")
    with (
        checkpoint.open(tmp_path) as saved,
        pytest.raises(RunError, match=r"000002 is damaged: its manifest\.json is of step 3"),
    ):
        saved.latest()
    with checkpoint.open(tmp_path) as saved:
        state, step = saved.restore_or(lambda: pytest.fail("afresh"), like(make_state(mesh1)), "last-good")
    assert step == 1 and float(state.params["head"]["kernel"][0, 0]) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["000001", "damaged-000002", "damaged-000003"]


@pytest.mark.parametrize("resume", ["newest", "last-good"])
def test_a_checkpoint_of_another_run_is_refused(resume, tmp_path, mesh1):
    for name in ("ours", "theirs"):
        with checkpoint.open(tmp_path / name, about={"run": name, "hash": f"{name}-hash"}) as saved:
            saved.save(len(name), make_state(mesh1, 1))
    shutil.copytree(tmp_path / "theirs/checkpoints/000006", tmp_path / "ours/checkpoints/000006")
    with (
        checkpoint.open(tmp_path / "ours", about={"run": "ours"}) as saved,
        pytest.raises(InputError, match=r"000006 was written by another run .*theirs-hash.*--init-from"),
    ):
        saved.restore_or(lambda: pytest.fail("afresh"), like(make_state(mesh1)), resume)


def test_other_folders_are_ignored_and_reported(tmp_path, mesh1):
    save(tmp_path, 1, mesh=mesh1)
    stray = tmp_path / "checkpoints" / "000077"
    stray.mkdir()
    (stray / "notes.txt").write_text("precious")
    lines = []
    with checkpoint.open(tmp_path, log=lines.append) as saved:
        saved.clean()
        assert [s.step for s in saved.steps()] == [1]
    assert (stray / "notes.txt").read_text() == "precious" and "also contains 000077" in lines[0]


def test_a_file_in_place_of_the_checkpoint_folder_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("a")
    with checkpoint.open(tmp_path) as saved, pytest.raises(InputError, match="is a file where the folder"):
        saved.clean()
