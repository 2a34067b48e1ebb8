"""The public names of jaxtrain: what user code may import, in a file where a change is seen."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

from conftest import ROOT

import jaxtrain

GOLDEN = ROOT / "tests" / "golden" / "public_names.txt"
ROOMS = (
    "artifact",
    "checkpoint",
    "compress",
    "data",
    "explain",
    "losses",
    "metrics",
    "models",
    "optim",
    "report",
    "sharding",
    "step",
    "sweep",
)


def _home(value: object) -> str:
    return getattr(value, "__module__", "")


def public_names() -> list[str]:
    names = [f"jaxtrain.{name}" for name in jaxtrain.__all__]
    for room in ROOMS:
        module = importlib.import_module(f"jaxtrain.{room}")
        defined = (name for name, value in vars(module).items() if _home(value) == module.__name__)
        own = getattr(module, "__all__", None) or list(defined)
        names += [f"jaxtrain.{room}.{name}" for name in own if not name.startswith("_")]
    return sorted(names)


def test_public_names_are_those_of_the_golden_file():
    """A name that disappears breaks code of users; a new one is a promise.

    When the change is meant, run ``JAXTRAIN_UPDATE_GOLDEN=1 scripts/test tests/test_public_names.py`` and add
    a line to CHANGELOG.md.
    """
    names = public_names()
    if os.environ.get("JAXTRAIN_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text("\n".join(names) + "\n")
    assert names == GOLDEN.read_text().splitlines()


def test_every_public_name_can_be_imported_from_the_face():
    for name in jaxtrain.__all__:
        assert getattr(jaxtrain, name) is not None
    assert set(dir(jaxtrain)) == {*jaxtrain.__all__, "__version__"}
    from jaxtrain import Experiment, assemble, fit  # noqa: F401
    from jaxtrain.models import CNN  # noqa: F401
    from jaxtrain.step import make_train_step  # noqa: F401


def test_import_jaxtrain_is_light_and_its_parts_load_nothing_heavy():
    code = (
        "import sys, jaxtrain\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)\n"
        "jaxtrain.Experiment, jaxtrain.State, jaxtrain.step, jaxtrain.models, jaxtrain.fit\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'grain', 'wandb', 'matplotlib', 'optuna', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
