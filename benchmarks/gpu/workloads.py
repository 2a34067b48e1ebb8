"""What ``scripts/gpu_check.py`` trains: experiments on made-up data, and CIFAR-10 without TFDS.

``tiny`` experiments are for trying the script out on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from jaxtrain import data, losses, models, optim
from jaxtrain.data.prepare.archives import load_members
from jaxtrain.data.prepare.originals import ORIGINALS
from jaxtrain.experiment import Experiment, find
from jaxtrain.models import attention

AT_ONCE = 28  # updates of a scanned dispatch of airbench: 476 are 17 of them
ENDLESS = 10**6  # updates of a schedule whose end is never reached
NORMALISE = data.Normalise(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def gpt(batch: int, tiny: bool = False, attention: attention.Attention = "auto") -> Experiment:
    """GPT-2 small (Radford et al. 2019): 124 M parameters, context 1,024, vocabulary rounded up to 50,304."""
    sizes: dict[str, Any] = {"vocab": 50_304, "context": 1024, "width": 768, "depth": 12, "heads": 12}
    if tiny:
        sizes = {"vocab": 512, "context": 64, "width": 128, "depth": 2, "heads": 2}
    tokens = np.random.default_rng(0).integers(0, sizes["vocab"], (4 * batch, sizes["context"] + 1), np.int32)
    return _endless(
        model=models.GPT(**sizes, dropout=0.0, positions="learned", attention=attention),
        train=data.Arrays({"tokens": tokens[:, :-1], "label": tokens[:, 1:]}),
        loss=losses.CrossEntropy(),
        optimizer=optim.AdamW(lr=3e-4, b2=0.95, weight_decay=0.1),
        batch=batch,
        precision="bfloat16",
    )


def resnet50(batch: int, tiny: bool = False) -> Experiment:
    """ResNet-50 v1.5 on 224×224 pixels, as ``experiments/imagenet_resnet50.py``."""
    side, stages, width = (32, (1,), 8) if tiny else (224, (3, 4, 6, 3), 64)
    rng = np.random.default_rng(0)
    fields = {
        "image": rng.integers(0, 256, (2 * batch, side, side, 3), np.uint8),
        "label": rng.integers(0, 1000, 2 * batch, np.int32),
    }
    return _endless(
        model=models.ResNet(stages=stages, width=width, block="bottleneck", classes=1000),
        train=data.Arrays(fields),
        loss=losses.CrossEntropy(smoothing=0.1),
        optimizer=optim.SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
        preprocess=(data.Normalise(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),),
        batch=batch,
        precision="bfloat16",
    )


def airbench(train: dict[str, np.ndarray], test: dict[str, np.ndarray], tiny: bool = False) -> Experiment:
    """``cifar_airbench94`` on arrays, with no evaluation or checkpoint on the way."""
    exp = find("cifar_airbench94").load()[0]
    exp = dataclasses.replace(
        exp, train=data.Arrays(train), test=data.Arrays(test), eval_every=None, save_every=exp.epochs
    )
    if not tiny:
        return exp
    net = models.TestTimeViews(models.Airbench(widths=(8, 16, 16), classes=10))
    init = models.Whiten(examples=256)
    return dataclasses.replace(exp, model=net, data_init=init, batch=128, epochs=1.0)


def digits(tiny: bool = False) -> Experiment:
    """The network of ``digits_cnn`` on made-up images of its shape."""
    return _endless(
        model=models.CNN(widths=(8,) if tiny else (32, 64), convs=2, classes=10),
        train=_images(1437, (8, 8, 1)),
        loss=losses.CrossEntropy(smoothing=0.1),
        optimizer=optim.SGD(lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4),
        augment=(data.Crop(pad=1),),
        preprocess=(data.Normalise(),),
        batch=32 if tiny else 128,
    )


def mlp(tiny: bool = False) -> Experiment:
    """A dense network whose step is mostly the starting of it."""
    return _endless(
        model=models.MLP(widths=(32,) if tiny else (512, 512), classes=10),
        train=_images(4096, (28, 28, 1)),
        loss=losses.CrossEntropy(),
        optimizer=optim.SGD(lr=0.01, momentum=0.9),
        preprocess=(data.Normalise(),),
        batch=128,
    )


def cifar(placement: Any, tiny: bool = False) -> Experiment:
    """The network of ``cifar_cnn`` at batch 512 in bfloat16, its data resident or streamed."""
    return _endless(
        model=models.CNN(widths=(8, 8) if tiny else (32, 96, 192), convs=2, classes=10),
        train=_images(2048 if tiny else 50_000, (32, 32, 3)),
        loss=losses.CrossEntropy(smoothing=0.1),
        optimizer=optim.SGD(lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4),
        augment=(data.Flip(), data.Crop(pad=2, mode="reflect")),
        preprocess=(NORMALISE,),
        batch=64 if tiny else 512,
        precision="bfloat16",
        placement=placement,
    )


def cifar10(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The training and the test set: ``image: uint8 [n, 32, 32, 3]``, ``label: int32 [n]``.

    Args:
      folder: a folder that ``jaxtrain prepare`` has written, or the original files (binary version), packed
        or not. Reading the originals needs NumPy only.

    Raises:
      InputError: it holds no such files.
    """
    if folder.is_dir() and any(folder.glob("cifar10/*/dataset_info.json")):
        for split in ("train", "test"):
            source = data.TFDS("cifar10", split, str(folder))
            yield source.gather(np.arange(len(source)))
        return
    files = load_members(ORIGINALS["cifar10"], folder)
    for names in ([f"data_batch_{k}.bin" for k in range(1, 6)], ["test_batch.bin"]):
        parts = [files[name] for name in names]
        rows = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 3073)
        image = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        yield {"image": np.ascontiguousarray(image), "label": rows[:, 0].astype(np.int32)}


def made_up_cifar10() -> list[dict[str, np.ndarray]]:
    """Random bytes in the shapes of both sets."""
    return [common.cifar_like(50_000), common.cifar_like(10_000, seed=1)]


def _images(n: int, shape: tuple[int, ...]) -> data.Arrays:
    rng = np.random.default_rng(0)
    fields = {"image": rng.integers(0, 256, (n, *shape), np.uint8), "label": rng.integers(0, 10, n, np.int32)}
    return data.Arrays(fields)


def _endless(*, train: data.Arrays, batch: int, **settings: Any) -> Experiment:
    """Evaluated on a part of the training set, after the last update only."""
    test = data.Arrays({name: array[:batch] for name, array in train.fields.items()})
    epochs = ENDLESS * batch / len(train)
    every = {"eval_every": None, "save_every": epochs}
    return Experiment(train=train, test=test, batch=batch, epochs=epochs, **every, **settings)
