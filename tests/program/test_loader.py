"""jaxtrain.program.loader: any batch by its number, the same from memory, from threads and from processes."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import EXPERIMENT

from jaxtrain import sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.data import Arrays, Order, Sequential, Subset, Synthetic, in_memory
from jaxtrain.models import MLP
from jaxtrain.monitor import make_console
from jaxtrain.program import assemble
from jaxtrain.program.loader import Resident, Streamed
from jaxtrain.step.packing import PackedMetrics
from jaxtrain.train.loop import fit

N, BATCH = 50, 16
SOURCE = in_memory(Synthetic(n=N, shape=(4, 3, 2)), 10**9)
assert SOURCE is not None
SOURCE = Arrays({**SOURCE.fields, "id": np.arange(N)})
ORDERS = {
    "wrap": Order(3, N, BATCH),
    "drop": Order(3, N, BATCH, True),
    "eval": Sequential(N, BATCH),
}


@pytest.fixture(params=["mesh1", "mesh8"])
def mesh(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def loaded(loader: Any, steps: Any) -> list[dict[str, np.ndarray]]:
    """What a step would see of each batch."""
    fetch = sharding.compile(loader.fetch, args=(loader.shardings,), out=None)
    return [jax.device_get(fetch(loader.batch(step))) for step in steps]


def expected(order: Any, step: int) -> dict[str, np.ndarray]:
    if isinstance(order, Order):
        ids, epochs = order.ids_and_epochs(step)
        return {**SOURCE.gather(ids), "example_id": ids, "epoch": epochs}
    ids, mask = order.rows(step)
    return {**SOURCE.gather(ids), "mask": mask, "example_id": ids}


@pytest.mark.parametrize("kind", [Resident, Streamed])
@pytest.mark.parametrize("name", ORDERS)
def test_batch_k_has_the_examples_of_the_order_in_any_call_order(kind: Any, name: str, mesh: Any) -> None:
    order = ORDERS[name]
    steps = [3, 1, 2, 3, 0] if name == "eval" else [7, 3, 4, 5, 0, 1000]
    for step, found in zip(steps, loaded(kind(SOURCE, order, mesh), steps), strict=True):
        wanted = expected(order, step)
        assert found.keys() == wanted.keys()
        for field, array in wanted.items():
            np.testing.assert_array_equal(found[field], array)
        assert found["image"].dtype == np.uint8


@pytest.mark.parametrize("kind", [Resident, Streamed])
def test_evaluation_masks_count_every_example_once(kind: Any, mesh: Any) -> None:
    batches = loaded(kind(SOURCE, ORDERS["eval"], mesh), range(4))
    masks = np.concatenate([b["mask"] for b in batches])
    ids = np.concatenate([b["id"] for b in batches])
    np.testing.assert_array_equal(ids[masks], np.arange(N))
    assert len(masks) == 4 * BATCH and masks.dtype == bool


@pytest.mark.parametrize("kind", [Resident, Streamed])
@pytest.mark.parametrize("name", ["wrap", "eval"])
def test_batches_are_sharded_over_devices(kind: Any, name: str, mesh: Any) -> None:
    loader = kind(SOURCE, ORDERS[name], mesh)
    split = sharding.batch_split(mesh)
    fetch = sharding.compile(loader.fetch, args=(loader.shardings,), out=split)
    for field, array in fetch(loader.batch(1)).items():
        assert array.sharding.is_equivalent_to(split, array.ndim), field
        shards = array.addressable_shards
        assert len({s.device for s in shards}) == mesh.size
        assert {s.data.shape[0] for s in shards} == {BATCH // mesh.size}


def test_streamed_batches_are_sharded_and_resident_data_replicated(mesh8: Any) -> None:
    for array in Streamed(SOURCE, ORDERS["wrap"], mesh8).batch(0).values():
        assert array.sharding.is_equivalent_to(sharding.batch_split(mesh8), array.ndim)
    batch = Resident(SOURCE, ORDERS["wrap"], mesh8).batch(0)
    assert all(array.sharding.is_fully_replicated for array in batch["data"].values())
    assert isinstance(batch["rows"], np.ndarray) and batch["rows"].nbytes == 2 * 4 * BATCH


def test_resident_data_is_an_argument_and_the_step_compiles_once(mesh8: Any) -> None:
    loader = Resident(SOURCE, ORDERS["wrap"], mesh8)

    def step(total: Any, batch: Any) -> Any:
        return total + loader.fetch(batch)["image"].astype(jnp.float32).sum()

    replicated = sharding.replicated(mesh8)
    compiled = sharding.compile(step, args=(replicated, loader.shardings), out=replicated, donate=(0,))
    total = jax.device_put(jnp.float32(0), replicated)
    for number in range(5):
        total = compiled(total, loader.batch(number))
    assert compiled._cache_size() == 1
    wanted = sum(int(expected(ORDERS["wrap"], k)["image"].sum(dtype=int)) for k in range(5))
    assert float(total) == wanted
    assert loader.batch(0)["data"]["image"] is loader.batch(9)["data"]["image"]


@pytest.mark.parametrize("name", ["wrap", "eval"])
def test_check_sees_every_raw_streamed_batch_with_ids(name: str, mesh1: Any) -> None:
    seen: list[Any] = []

    def check(batch: Any, ids: np.ndarray) -> None:
        assert all(isinstance(array, np.ndarray) for array in batch.values())
        seen.append((ids.tolist(), batch["id"].tolist(), sorted(batch)))

    loader = Streamed(SOURCE, ORDERS[name], mesh1, check=check)
    for step in (0, 1, 3):
        loader.batch(step)
    wanted = [expected(ORDERS[name], step) for step in (0, 1, 3)]
    assert seen == [(w["id"].tolist(), w["id"].tolist(), sorted(w)) for w in wanted]


def test_error_of_the_check_stops_the_batch(mesh1: Any) -> None:
    def check(batch: Any, ids: np.ndarray) -> None:
        raise InputError(f"example {ids[0]} is bad")

    loader = Streamed(SOURCE, ORDERS["eval"], mesh1, check=check)
    with pytest.raises(InputError, match="example 16 is bad"):
        loader.batch(1)


def test_failing_source_ends_the_run_with_one_line_and_its_cause(mesh1: Any) -> None:
    class Broken:
        def __len__(self) -> int:
            return N

        def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            raise OSError("disk is gone")

    line = r"^Broken\.gather failed at batch 4: OSError: disk is gone; earlier checkpoints are kept: fix"
    with pytest.raises(RunError, match=line) as error:
        Streamed(Broken(), ORDERS["wrap"], mesh1).batch(3)
    assert isinstance(error.value.__cause__, OSError) and "\n" not in str(error.value)


USER_FILE = """
from __future__ import annotations

import dataclasses
import os

import numpy as np


@dataclasses.dataclass(frozen=True)
class Squares:
    n: int = 50

    def __len__(self) -> int:
        return self.n

    def gather(self, indices):
        process = np.full(len(indices), os.getpid())
        return {"square": np.asarray(indices) ** 2, "process": process}
"""

PROGRAM = """
import os
import sys

import jax
import numpy as np

from jaxtrain import sharding
from jaxtrain.core import user_modules
from jaxtrain.data import Digits, Order, Sequential
from jaxtrain.program.loader import Streamed


def main():
    mesh = sharding.make_mesh()
    users = user_modules.load(sys.argv[1]).Squares()
    steps = [7, 8, 9, 3]
    for source in (users, Digits()):
        order = Order(1, len(source), 8)
        many = Streamed(source, order, mesh, workers=2)
        none = Streamed(source, order, mesh)
        processes = set()
        for step in steps if source is users else steps[:2]:
            theirs, ours = jax.device_get((many.batch(step), none.batch(step)))
            assert theirs.keys() == ours.keys()
            processes |= set(theirs.pop("process", np.array([])).tolist())
            ours.pop("process", None)
            for name, array in ours.items():
                np.testing.assert_array_equal(array, theirs[name])
                assert array.dtype == theirs[name].dtype
        if source is users:
            assert os.getpid() not in processes, "gathered in this process after all"
            assert len(processes) >= 2, "one worker did everything"
    print("the same")


if __name__ == "__main__":
    main()
"""


@pytest.mark.full("tests/program/test_loader.py::test_training_batches_are_drawn_by_seed_epoch_and_example")
def test_worker_processes_load_the_same_batches_of_shipped_and_user_sources(
    python: Any, tmp_path: Any
) -> None:
    (tmp_path / "my_source.py").write_text(textwrap.dedent(USER_FILE))
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    done = python(tmp_path / "program.py", tmp_path / "my_source.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the same"


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A source whose training examples say what they were drawn from."""

    n: int = N

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": np.stack([indices, 0 * indices - 1, 0 * indices], axis=1)}

    def draw(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        return {"x": np.stack([indices, epochs, 0 * indices + seed], axis=1)}


@pytest.mark.full("[wrap-0]", "[drop-0]")
@pytest.mark.parametrize(
    ("name", "workers"),
    [("wrap", 0), ("wrap", 2), ("drop", 0), ("drop", 2)],
)
def test_training_batches_are_drawn_by_seed_epoch_and_example(name: str, workers: int, mesh1: Any) -> None:
    order = ORDERS[name]
    loader = Streamed(Drawn(), order, mesh1, workers)
    for step in (4, 5, 1):
        ids, epochs = order.ids_and_epochs(step)
        wanted = np.stack([ids, epochs, np.full(BATCH, order.seed)], axis=1)
        np.testing.assert_array_equal(loader.batch(step)["x"], wanted)
    loader.close()


def test_evaluation_of_a_drawing_source_gathers_and_it_is_never_resident(mesh1: Any) -> None:
    loader = Streamed(Drawn(), ORDERS["eval"], mesh1)
    np.testing.assert_array_equal(loader.batch(0)["x"][:, 1], -1)
    assert in_memory(Drawn(), 2**40) is None


def test_a_subset_draws_when_its_source_does() -> None:
    subset = Subset(Drawn(), np.array([5, 9, 2]))
    found = subset.draw(np.array([2, 0]), np.array([1, 4]), 7)["x"]
    np.testing.assert_array_equal(found, [[2, 1, 7], [5, 4, 7]])
    assert in_memory(subset, 2**40) is None
    assert not hasattr(Subset(SOURCE, np.array([1])), "draw")


@pytest.mark.full("tests/program/test_loader.py")
def test_streamed_batch_is_copied_while_earlier_steps_compute(
    tmp_path: Any, mesh1: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    put, wait = Streamed.batch, PackedMetrics.rows

    def batch(self: Streamed, step: int) -> Any:
        events.append("put")
        return put(self, step)

    def rows(self: PackedMetrics) -> Any:
        events.append("wait")
        return wait(self)

    exp = dataclasses.replace(
        EXPERIMENT, model=MLP(widths=(), classes=4), post_update=(), augment=(), placement="stream"
    )
    program = assemble(dataclasses.replace(exp, eval_every=None, steps_per_execution=1), mesh1)
    monkeypatch.setattr(Streamed, "batch", batch)
    monkeypatch.setattr(PackedMetrics, "rows", rows)
    fit(program, tmp_path, make_console())
    assert program.steps == 13 and exp.max_in_flight == 2
    assert events[: 2 + 2 * 11] == ["put", "put", *["put", "wait"] * 11]
