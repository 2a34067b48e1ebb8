"""compress.Prune: exact counts, the masks of a NumPy sort, zeros that stay zeros, on any mesh."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from tiny import EXPERIMENT

import jaxtrain
from jaxtrain import checkpoint, losses, models, monitor, optim, sharding
from jaxtrain.compress import Prune, sparsity
from jaxtrain.core.errors import InputError
from jaxtrain.core.signals import Stopped
from jaxtrain.core.types import State, leaf_paths
from jaxtrain.experiment import Experiment
from jaxtrain.program import assemble
from jaxtrain.sharding import rules
from jaxtrain.step import make_init, make_train_step
from jaxtrain.train.dispatch import Dispatch
from jaxtrain.train.loop import fit

MODEL = models.MLP(widths=(24,), classes=4)
BATCH = {
    "image": np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32),
    "label": np.arange(16, dtype=np.int32) % 4,
}


def zeros(tree: Any) -> dict[str, int]:
    return {path: int((np.asarray(x) == 0).sum()) for path, x in leaf_paths(tree).items() if x.ndim == 2}


def state_of(**arrays: Any) -> State:
    return State(jnp.int32(0), {name: jnp.asarray(x) for name, x in arrays.items()}, {}, ())


def masks_after(stage: Any, state: State) -> dict[str, np.ndarray]:
    """Return the masks after the last round."""
    state = stage(stage.init(state).replace(step=jnp.int32(stage.ends[-1])))
    return {path: np.asarray(mask) for path, mask in state.extra["masks"]["params"].items()}


def numpy_mask(weights: np.ndarray, count: int) -> np.ndarray:
    mask = np.ones(weights.size, bool)
    mask[np.argsort(np.abs(weights).ravel(), kind="stable")[:count]] = False
    return mask.reshape(weights.shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("part", [0.29, 0.5, 0.9, 0.001])
def test_masks_are_those_of_a_stable_sort(part: float, dtype: str) -> None:
    """Small integers, so there are many ties: the first in row-major order is pruned."""
    weights = np.random.default_rng(3).integers(-4, 5, (10, 30)).astype(np.float32)
    mask = masks_after(Prune(sparsity=part, include="w").build(100), state_of(w=jnp.asarray(weights, dtype)))
    want = numpy_mask(weights, math.floor(Fraction(str(part)) * 300))
    np.testing.assert_array_equal(mask["w"], want)


def test_a_pattern_prunes_the_smallest_of_each_group_of_inputs() -> None:
    rng = np.random.default_rng(4)
    dense, conv = rng.normal(size=(8, 5)), rng.normal(size=(3, 3, 4, 6))
    state = state_of(dense=dense, conv=conv, first=rng.normal(size=(3, 3, 1, 6)), bias=rng.normal(size=8))
    masks = masks_after(Prune(pattern="2:4", include="").build(100), state)
    assert masks.keys() == {"dense", "conv"}  # the others have no axis -2 that is a multiple of 4
    for name, weights in (("dense", dense), ("conv", conv)):
        rows = np.moveaxis(weights, -2, -1).reshape(-1, 4)
        want = np.stack([numpy_mask(row, 2) for row in rows])
        np.testing.assert_array_equal(np.moveaxis(masks[name], -2, -1).reshape(-1, 4), want)


def test_the_schedule_is_the_cubic_one() -> None:
    config = Prune(sparsity=0.8, start=0.1, end=0.5, rounds=4)
    assert config.build(200).ends == (40, 60, 80, 100)
    want = [0.8 * (1 - (1 - r / 4) ** 3) for r in range(5)]
    assert config.counts(10_000) == pytest.approx([10_000 * part for part in want], abs=1)
    assert config.counts(10_000)[-1] == 8_000


@pytest.mark.full("[prune-momentum]")
@pytest.mark.parametrize("tx", [optax.adamw(0.05), optax.sgd(0.1, momentum=0.9)], ids=["adamw", "momentum"])
@pytest.mark.parametrize("first", ["prune", "ema"])
def test_pruned_weights_stay_zero_after_every_update(tx: Any, first: str) -> None:
    """With momentum, weight decay, an EMA before or after, and Lookahead."""
    stages: list[Any] = [
        Prune(sparsity=0.8, rounds=3).build(20),
        optim.EMA(0.9),
        optim.Lookahead(3).build(20),
    ]
    stages = stages if first == "prune" else stages[::-1]
    state = make_init(MODEL, tx, post_update=stages)(jax.random.key(0), BATCH)
    step = jax.jit(make_train_step(MODEL, losses.CrossEntropy(), tx, post_update=stages))
    before = np.ones((12, 24), bool)
    for _ in range(20):
        state, _ = step(state, BATCH, jax.random.key(1))
        masks = state.extra["masks"]["params"]
        for tree in (state.params, state.extra["ema"]["params"], state.extra["lookahead"]["params"]):
            for path, leaf in leaf_paths(tree).items():
                if path in masks:
                    np.testing.assert_array_equal(np.asarray(leaf)[~np.asarray(masks[path])], 0)
        (mask, *_) = (np.asarray(m) for m in masks.values() if m.shape == before.shape)
        assert not (mask & ~before).any()  # what is pruned stays pruned
        before = mask
    kernels = {path: math.floor(0.8 * m.size) for path, m in masks.items()}
    assert zeros(state.params) == kernels and len(kernels) == 2
    parts = {path: count / masks[path].size for path, count in kernels.items()}
    total = sum(kernels.values()) / sum(mask.size for mask in masks.values())
    assert sparsity(state) == pytest.approx({**parts, "total": total})


def test_an_update_cannot_bring_a_pruned_weight_back() -> None:
    """Not even one that makes it the largest; the next round counts it as pruned."""
    stage = Prune(sparsity=0.5, include="w", start=0, end=1, rounds=2).build(2)  # 3, then 4 of 8 zeros
    state = stage.init(state_of(w=np.arange(1.0, 9.0, dtype=np.float32))).replace(step=jnp.int32(1))
    state = stage(state)
    assert state.params["w"].tolist() == [0, 0, 0, 4, 5, 6, 7, 8]
    state = stage(state.replace(step=jnp.int32(2), params={"w": jnp.full(8, 100.0) - jnp.arange(8)}))
    assert state.params["w"].tolist() == [0, 0, 0, 97, 96, 95, 94, 0]


@pytest.mark.full("tests/compress/test_prune.py::test_an_update_cannot_bring_a_pruned_weight_back")
def test_a_skipped_round_is_made_up_for() -> None:
    """The guard skips the update of the only round; the next one prunes."""
    tx, stage = optax.sgd(0.1), Prune(sparsity=0.5, start=0.2, end=0.2, rounds=1).build(10)
    state = make_init(MODEL, tx, post_update=[stage])(jax.random.key(0), BATCH)
    step = jax.jit(make_train_step(MODEL, losses.CrossEntropy(), tx, post_update=[stage], guard="skip"))
    bad = {**BATCH, "image": BATCH["image"] * np.nan}
    pruned = []
    for batch in (BATCH, bad, BATCH, bad):
        state, _ = step(state, batch, jax.random.key(1))
        pruned.append(sum(zeros(state.params).values()))
    assert pruned == [0, 0, 192, 192] and int(state.step) == 4


def test_masks_are_the_same_on_eight_devices(mesh8: Mesh) -> None:
    """Weights that are split over devices, with ties, give the masks of one device."""
    weights = np.random.default_rng(5).integers(-9, 10, (64, 32)).astype(np.float32)
    stage = Prune(sparsity=0.7, include="w").build(10)
    split = jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec("data"))
    state = stage.init(state_of(w=weights)).replace(step=jnp.int32(9))
    shardings = jax.tree.map(lambda x: split if x.shape == (64, 32) else split.update(spec=()), state)
    compiled = jax.jit(stage, in_shardings=(shardings,), out_shardings=shardings).lower(state).compile()
    found = compiled(jax.device_put(state, shardings)).extra["masks"]["params"]["w"]
    np.testing.assert_array_equal(np.asarray(found), masks_after(stage, state_of(w=weights))["w"])
    assert "all-gather" not in compiled.as_text()  # counts are communicated, and no weights


CASES = {
    "sparsity": ({"sparsity": 1.0}, r"prune.sparsity is 1.0: it must be in \(0, 1\)"),
    "order": ({"start": 0.6, "end": 0.5}, "0 <= start <= end <= 1"),
    "rounds": ({"rounds": 0}, "at least 1"),
    "expression": ({"include": "("}, "not a regular expression"),
    "pattern": ({"pattern": "4:2"}, '"n:m" with 0 < n < m'),
    "its sparsity": ({"pattern": "1:4"}, "set prune.sparsity=0.75"),
}


@pytest.mark.parametrize("name", CASES)
def test_settings_are_checked(name: str) -> None:
    settings, message = CASES[name]
    with pytest.raises(InputError, match=message):
        Prune(**settings)


def test_a_path_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="matches no parameter; there are w"):
        Prune().build(10).init(state_of(w=np.ones(3)))
    with pytest.raises(InputError, match="axis -2 that is a multiple of 4"):
        Prune(pattern="2:4", include="w").build(10).init(state_of(w=np.ones((3, 4))))


def pruned(**changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "model": models.MLP(widths=(16,), classes=4),
        "augment": (),
        "post_update": (Prune(sparsity=0.75, start=0.0, end=0.5, rounds=3), optim.EMA(0.9)),
    }
    return dataclasses.replace(EXPERIMENT, **(settings | changes))


@pytest.mark.full("tests/compress/test_prune.py::test_pruned_weights_stay_zero_after_every_update")
def test_a_run_reports_its_sparsity_and_hands_its_masks_on(tmp_path: Path, mesh1: Mesh) -> None:
    """result.json and the records have the sparsity; a run that starts from it keeps the zeros."""
    lines: list[str] = []
    console = monitor.make_console()
    note, console.note = console.note, lambda line, *a, **k: (lines.append(line), note(line, *a, **k))
    result = jaxtrain.fit(pruned(), folder=tmp_path / "one", mesh=mesh1, console=console)
    sizes = {"dense0/kernel": 64 * 16, "head/kernel": 16 * 4}
    found = result["sparsity"]
    assert found == {**{path: math.floor(0.75 * n) / n for path, n in sizes.items()}, "total": 0.75}
    assert "sparsity of head/kernel: 75.00 %" in lines and "sparsity of all pruned arrays: 75.00 %" in lines
    records = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert any(record.get("sparsity/total") == 0.75 for record in records)
    arrays = checkpoint.arrays(tmp_path / "one")
    later = pruned(post_update=(Prune(sparsity=0.75, start=0, end=0, rounds=1),))
    jaxtrain.fit(later, folder=tmp_path / "two", mesh=mesh1, init_from=tmp_path / "one")
    for path, mask in checkpoint.arrays(tmp_path / "two").items():
        if path.startswith("extra/masks/params/"):
            np.testing.assert_array_equal(mask, arrays[path])
            assert mask.mean() == 0.25


@pytest.mark.full("tests/compress/test_prune.py::test_pruned_weights_stay_zero_after_every_update")
@pytest.mark.parametrize("mesh", ["data=1", "fsdp=4,data=2"])
def test_a_resumed_run_is_bitwise_the_straight_one(
    mesh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two rounds: masks, weights and averages of the end are the same bits."""
    monkeypatch.setattr(rules, "SMALLEST", 32)
    devices = jax.devices()[: 1 if mesh == "data=1" else 8]
    made = sharding.make_mesh(devices, sharding.parse_mesh(mesh, len(devices)))
    console = monitor.make_console()
    fit(assemble(pruned(), made), tmp_path / "straight", console)
    with monkeypatch.context() as patch:
        real = Dispatch.__call__

        def call(self: Any, state: Any, step: int, count: int) -> Any:
            if step + count == 4:  # rounds are due after updates 2, 4 and 6
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, state, step, count)

        patch.setattr(Dispatch, "__call__", call)
        with pytest.raises(Stopped):
            fit(assemble(pruned(), made), tmp_path / "cut", console)
    assert fit(assemble(pruned(), made), tmp_path / "cut", console)["resumed_from"] == 4
    one, other = checkpoint.arrays(tmp_path / "straight"), checkpoint.arrays(tmp_path / "cut")
    assert one.keys() == other.keys() and "extra/masks/params/head/kernel" in one
    for path, array in one.items():
        np.testing.assert_array_equal(array, other[path])
    assert (one["params/dense0/kernel"] == 0).sum() == math.floor(0.75 * 64 * 16)
