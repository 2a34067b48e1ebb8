"""The sharding of every array of every family, on two meshes, against reviewed tables."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest
from conftest import ROOT

from jaxtrain import data, losses, models, optim, sharding
from jaxtrain.core.types import leaf_paths
from jaxtrain.experiment import Experiment
from jaxtrain.program import abstract_state
from jaxtrain.sharding.rules import spec_text

GOLDEN = ROOT / "tests" / "golden" / "shardings"
IMAGE = {"image": (16, 16, 3)}
TOKENS = {"tokens": (32,)}
FAMILIES = {
    "mlp": (models.MLP(widths=(256, 128), classes=10), IMAGE),
    "cnn": (models.CNN(widths=(32, 64)), IMAGE),
    "convnet": (models.ConvNet(widths=(32, 64), hidden=(128,)), IMAGE),
    "resnet": (models.ResNet(stages=(1, 1), width=32, classes=16), IMAGE),
    "airbench": (models.TestTimeViews(models.Airbench(widths=(64, 128))), {"image": (32, 32, 3)}),
    "unet": (models.UNet(widths=(32, 64)), IMAGE),
    "vit": (models.ViT(patch=4, width=64, depth=1, heads=4, classes=10), IMAGE),
    "gpt": (models.GPT(vocab=256, context=32, width=64, depth=1, heads=4, positions="learned"), TOKENS),
    "factors": (models.Factors(users=1000, items=2000, hidden=(64, 64)), {"user": (), "item": ()}),
    "lstm": (models.LSTMClassifier(), {**TOKENS, "length": ()}),
    "gru": (models.GRUForecaster(variables=8), {"series": (24, 8)}),
}
MESHES = ("fsdp=8", "data=2,fsdp=2,model=2")


def table(name: str) -> str:
    """A line for each array: path, shape, and what its dimensions are split over on each mesh."""
    model, fields = FAMILIES[name]
    integers = {"tokens", "length", "user", "item"}
    example = {k: np.zeros((1, *v), np.int32 if k in integers else np.float32) for k, v in fields.items()}
    train = data.Arrays(example)
    experiment = Experiment(
        model=model,
        train=train,
        test=train,
        loss=losses.CrossEntropy(),
        optimizer=optim.AdamW(),
        post_update=(optim.EMA(),),
        batch=8,
        epochs=1,
    )
    columns, shapes = [], {}
    for text in MESHES if getattr(model, "logical_axes", None) else MESHES[:1]:
        on = sharding.make_mesh(jax.devices(), sharding.parse_mesh(text, 8))
        leaves = leaf_paths(abstract_state(experiment, on, example))
        shapes = {path: list(leaf.shape) for path, leaf in leaves.items()}
        columns.append({path: spec_text(leaf.sharding) or "replicated" for path, leaf in leaves.items()})
    lines = [f"{'path':<54} {'shape':<17} {'   '.join(MESHES[: len(columns)])}"]
    for path, shape in shapes.items():
        cells = "".join(f"{column[path]:<18}" for column in columns)
        lines.append(f"{path:<54} {str(shape).replace(' ', ''):<17} {cells}".rstrip())
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", FAMILIES)
def test_sharding_of_every_array_is_golden(name):
    """A changed line moves an array: look whether it should, and whether it still fits and is still fast.

    When it should, run ``JAXTRAIN_UPDATE_GOLDEN=1 scripts/test tests/program/test_golden_shardings.py``.
    """
    text, path = table(name), GOLDEN / f"{name}.txt"
    if os.environ.get("JAXTRAIN_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, test_sharding_of_every_array_is_golden.__doc__


def test_every_golden_table_has_a_family():
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == sorted(FAMILIES)
