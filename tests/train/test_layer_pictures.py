"""``--monitor-layers``: pictures of layers in TensorBoard, and a training that is bitwise the same."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from jaxtrain import data, losses, models, optim, run, sharding
from jaxtrain.core.errors import InputError
from jaxtrain.experiment import Experiment
from jaxtrain.monitor import pictures
from jaxtrain.program import assemble
from jaxtrain.train.layer_pictures import LayerPictures


def events(folder: Path) -> list[tuple[int, str, bytes]]:
    """Return step, tag and PNG of each picture in a run's TensorBoard files."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        text, at = path.read_bytes(), 0
        while at < len(text):
            (size,) = struct.unpack("<Q", text[at : at + 8])
            event = Event.FromString(text[at + 12 : at + 12 + size])
            found += [
                (event.step, value.tag, value.image.encoded_image_string)
                for value in event.summary.value
                if value.HasField("image")
            ]
            at += 16 + size
    return found


def test_pictures_are_written_and_the_training_stays_the_same(tmp_path: Path) -> None:
    words = ["--experiment", str(ROOT / "tests" / "tiny.py"), "--set", "save_every=0.5", "--devices", "1"]
    for name, more in (("plain", []), ("pictures", ["--monitor-layers"])):
        assert run.main([*words, "--workdir", str(tmp_path / name), *more]) == 0
    sums = [
        json.loads((tmp_path / name / "checkpoints" / "000013" / "manifest.json").read_text())["fingerprints"]
        for name in ("plain", "pictures")
    ]
    assert sums[0] == sums[1] and len(sums[0]) > 10
    assert events(tmp_path / "plain") == []
    found = events(tmp_path / "pictures")
    names = ["activations/stage0_conv0", "activations/stage0_conv0_norm", "activations/Dropout_0"]
    names += ["activations/head", "kernels/stage0_conv0"]
    assert [(step, tag) for step, tag, _ in found] == [(step, tag) for step in (7, 13) for tag in names]
    for _, _, png in found:
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.format == "PNG" and min(picture.size) > 8


def program_of(model: Any, fields: dict[str, np.ndarray]) -> Any:
    exp = Experiment(
        model=model,
        train=data.Arrays(fields),
        test=data.Arrays(fields),
        loss=losses.CrossEntropy(),
        optimizer=optim.SGD(lr=0.1),
        batch=4,
        epochs=1,
    )
    return assemble(exp, sharding.make_mesh(jax.devices()[:1]))


def test_the_picture_is_the_activation_of_the_first_test_example() -> None:
    image = np.random.default_rng(0).normal(size=(4, 3, 3, 1)).astype(np.float32)
    program = program_of(models.MLP(widths=(6,), classes=2), {"image": image, "label": np.zeros(4, np.int32)})
    state, draw = program.init(), LayerPictures(program)
    drawn = draw(state)
    dense = state.params["dense0"]
    expected = image[0].reshape(-1) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    strip = pictures.colour(expected, "diverging", float(np.abs(expected).max()))
    with Image.open(io.BytesIO(drawn["activations/dense0"])) as picture:
        shown = np.asarray(picture)
    each = shown.shape[1] // 6
    np.testing.assert_allclose(shown[0, ::each].astype(int), strip.astype(int), atol=1)
    with Image.open(io.BytesIO(drawn["kernels/dense0"])) as picture:
        sheet = np.asarray(picture)  # six kernels of 3 × 3 pixels in three columns
    assert sheet.shape[0] * 11 == sheet.shape[1] * 7


def test_recurrent_models_are_drawn_without_the_inside_of_the_scan() -> None:
    tokens = np.ones((4, 5), np.uint8)
    fields = {"tokens": tokens, "length": np.full(4, 5, np.int32), "label": np.zeros(4, np.int32)}
    program = program_of(models.LSTMClassifier(width=4, embedding=3), fields)
    names = [name for name in LayerPictures(program)(program.init()) if "Dropout" not in name]
    assert names == [*("activations/embedding", "activations/RNN_0", "activations/head", "kernels/head")]


def test_models_without_layers_are_refused() -> None:
    program = program_of(
        (lambda key, batch: ({"w": np.zeros((1, 2), np.float32)}, {}), _linear),
        {"image": np.ones((4, 1), np.float32), "label": np.zeros(4, np.int32)},
    )
    with pytest.raises(InputError, match="--monitor-layers: the model has no Flax layers"):
        LayerPictures(program)


def _linear(params: Any, extra: Any, batch: Any, *, train: bool, key: Any) -> Any:
    return batch["image"] @ params["w"], extra
