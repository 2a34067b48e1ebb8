"""jaxtrain.experiment.registry: where experiments are found, and which one a name means."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain.core import user_modules
from jaxtrain.core.errors import InputError
from jaxtrain.experiment import Experiment, discover, find
from jaxtrain.program import assemble

TEXT = '''"""{title}

More.
"""

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

EXPERIMENT = Experiment(
    model=models.MLP(widths=(4,)),
    train=data.Synthetic(n=16, shape=(2, 2, 1)),
    test=data.Synthetic(n=8, shape=(2, 2, 1), split="test"),
    loss=losses.CrossEntropy(),
    optimizer=optim.SGD(lr=0.1),
    batch=8,
    epochs=1,
)
'''


def write(path: Path, title: str = "An experiment.", text: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or TEXT.format(title=title))
    return path


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, no folders in the environment, no entry points, nothing loaded."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAXTRAIN_EXPERIMENTS", raising=False)
    install(monkeypatch)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(user_modules.PREFIX):
            del sys.modules[name]


def install(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Entry points, as installed packages declare them."""
    group = "jaxtrain.experiments"
    found = [EntryPoint(name, value, group) for name, value in points.items()]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **kw: found if kw["group"] == group else []
    )


def test_path_is_found_wherever_it_is(empty_folder: Path) -> None:
    path = write(empty_folder / "deep" / "mine.py", "Mine.")
    for name in (str(path), "deep/mine.py", "./deep/mine.py"):
        entry = find(name)
        assert (entry.name, entry.origin) == ("mine", str(path))
    experiment, title = find("deep/mine.py").load()
    assert isinstance(experiment, Experiment) and title == "Mine."


def test_path_comes_before_names(empty_folder: Path) -> None:
    write(empty_folder / "experiments" / "mine.py", "In the folder.")
    write(empty_folder / "mine.py", "By path.")
    assert find("mine.py").load()[1] == "By path."
    assert find("mine").load()[1] == "In the folder."


def test_name_is_found_in_the_current_folder_the_environments_and_among_shipped_ones(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(empty_folder / "experiments" / "here.py")
    folders = [empty_folder / "first", empty_folder / "second"]
    write(folders[0] / "one.py")
    write(folders[1] / "two.py")
    write(folders[1] / "_helper.py")
    monkeypatch.setenv("JAXTRAIN_EXPERIMENTS", os.pathsep.join(["", *map(str, folders), "absent"]))
    names = [entry.name for entry in discover()]
    assert names == sorted(names)
    assert {"here", "one", "two", "digits_cnn", "cifar_cnn"} <= set(names)
    assert "_helper" not in names
    assert find("two").load()[0].batch == 8


@pytest.mark.parametrize("value", ["installed_experiments", "installed_experiments:EXPERIMENT"])
def test_name_is_found_among_the_entry_points(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    write(empty_folder / "site" / "installed_experiments.py", "Installed.")
    monkeypatch.syspath_prepend(empty_folder / "site")
    monkeypatch.delitem(sys.modules, "installed_experiments", raising=False)
    install(monkeypatch, packaged=value)
    entry = find("packaged")
    assert entry.origin == f"packaged = {value}"
    assert "installed_experiments" not in sys.modules, "find() imports nothing"
    experiment, title = entry.load()
    assert experiment.batch == 8
    assert title == "Installed.", "the line of the file, not of the class"


def test_entry_point_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, gone="no_such_package_here:EXPERIMENT")
    with pytest.raises(InputError, match="gone = no_such_package_here:EXPERIMENT cannot be imported: Module"):
        find("gone").load()


def test_two_different_files_of_one_name_are_refused_with_both(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write(empty_folder / "experiments" / "mine.py", "One.")
    two = write(empty_folder / "other" / "mine.py", "Two.")
    monkeypatch.setenv("JAXTRAIN_EXPERIMENTS", str(two.parent))
    with pytest.raises(InputError, match="two different experiments are called mine") as raised:
        find("mine")
    assert str(one) in str(raised.value) and str(two) in str(raised.value)
    assert find(str(two)).load()[1] == "Two."
    assert [entry.name for entry in discover()].count("mine") == 2, "--list shows both"


def test_a_shipped_name_with_another_text_is_refused(empty_folder: Path) -> None:
    mine = write(empty_folder / "experiments" / "digits_cnn.py", "Not the shipped one.")
    with pytest.raises(InputError, match="two different experiments are called digits_cnn") as raised:
        find("digits_cnn")
    assert str(mine) in str(raised.value)


def test_file_and_entry_point_of_one_name_are_refused(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(empty_folder / "experiments" / "mine.py")
    install(monkeypatch, mine="some_package:EXPERIMENT")
    with pytest.raises(InputError, match=r"mine\.py and mine = some_package:EXPERIMENT"):
        find("mine")


@pytest.mark.parametrize("how", ["copy", "link", "the same folder"])
def test_one_file_in_two_places_is_one_experiment(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    one = write(empty_folder / "experiments" / "mine.py")
    folder = empty_folder / "other"
    folder.mkdir()
    if how == "copy":
        write(folder / "mine.py")
    elif how == "link":
        (folder / "mine.py").symlink_to(one)
    monkeypatch.setenv("JAXTRAIN_EXPERIMENTS", str(one.parent if how == "the same folder" else folder))
    assert find("mine").origin == str(one)
    assert [entry.name for entry in discover()].count("mine") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit_cnn", "no experiment is called digit_cnn: did you mean digits_cnn?"),
        ("zzzzzz", "no experiment is called zzzzzz: see python -m jaxtrain.run --list"),
        ("absent.py", "experiment file absent.py does not exist"),
        ("some/where", "experiment file some/where does not exist"),
    ],
)
def test_unknown_name_or_path_is_a_one_line_error(name: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        find(name)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"must define EXPERIMENT = Experiment\(\.\.\.\)"),
        ("EXPERIMENT = {'batch': 8}", "must define EXPERIMENT"),
        ("from jaxtrain.experiment import Experiment as EXPERIMENT", "must define EXPERIMENT"),
        ("import no_such_module_here", "cannot be imported: ModuleNotFoundError"),
    ],
    ids=["none", "a dictionary", "the class", "broken"],
)
def test_file_without_an_experiment_is_refused_by_its_path(
    empty_folder: Path, text: str, message: str
) -> None:
    path = write(empty_folder / "experiments" / "mine.py", text=text)
    with pytest.raises(InputError, match=f"^{path} {message}"):
        find("mine").load()


def test_broken_file_does_not_hide_the_others(empty_folder: Path) -> None:
    write(empty_folder / "experiments" / "broken.py", text="x = 1 +")
    assert find("digits_cnn").load()[0].batch > 0


def test_file_found_twice_is_the_same_module(empty_folder: Path) -> None:
    path = write(empty_folder / "experiments" / "mine.py")
    assert find("mine").load()[0] is find(str(path)).load()[0] is find("experiments/mine.py").load()[0]


OWN = '''"""Its own model, source, loss and step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxtrain import optim
from jaxtrain.experiment import Experiment
from jaxtrain.metrics import Mean
from jaxtrain.step import make_train_step


class Net(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, points: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.tanh(nn.Dense(self.width)(points)))[:, 0]


@dataclasses.dataclass(frozen=True)
class Points:
    n: int = 16
    inner: Points | None = None

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        points = np.stack([indices, indices % 3], axis=1).astype(np.float32) / self.n
        return {"points": points, "target": points.sum(1)}


def loss(outputs, batch):
    error = Mean.of(jnp.abs(outputs - batch["target"]), batch.get("mask"))
    return error.total / error.count, {"accuracy": error}


def factory(model, loss_fn, tx, prepare, post_update):
    step = make_train_step(model, loss_fn, tx, prepare, post_update)

    def counted(state, batch, key):
        state, metrics = step(state, batch, key)
        return state, {**metrics, "mine": Mean.of(jnp.ones(3))}

    return counted


EXPERIMENT = Experiment(
    model=Net(),
    train=Points(),
    test=Points(n=8),
    loss=loss,
    optimizer=optim.SGD(lr=0.1),
    batch=8,
    epochs=2,
    step_factory=factory,
)
'''


def test_file_may_define_its_own_model_source_loss_and_step(empty_folder: Path, mesh8: Any) -> None:
    write(empty_folder / "experiments" / "own.py", text=OWN)
    experiment, title = find("own").load()
    assert title == "Its own model, source, loss and step."
    program = assemble(experiment, mesh8)
    start = program.init()
    before = jax.device_get(start.params)
    state, metrics = program.train_step(start, program.train.batch(0), program.key)
    assert metrics["mine"].compute() == 1 and int(state.step) == 1
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), jax.device_get(state.params), before)
    assert max(jax.tree.leaves(moved)) > 0
