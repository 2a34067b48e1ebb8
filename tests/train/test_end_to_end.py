"""The shipped experiments on small data in the original layouts: prepare, read, train, resume, evaluate.

Every archive is made up as its publisher lays it out (the text and the series are the real ones), goes
through ``jaxtrain prepare --from``, and is learnable, so that a run whose labels got mixed up fails.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from fixtures_data import real_data
from PIL import Image
from test_cli import leaves, same
from test_data_collections import SYNSETS, tar, write
from test_loop import stopping

from jaxtrain import run
from jaxtrain.cli import evaluate, prepare

COLOURS = ((200, 40, 40), (40, 160, 60), 90)  # of the three synsets: the last one's files are grey
RESNET = ("model.stages=1,1", "model.width=8", "train.size=32", "test.size=32", "optimizer.lr.peak=0.05")
VIT = ("model.width=32", "model.depth=1", "model.heads=2", "train.size=32", "valid.size=32", "test.size=32")
UNET = ("model.widths=8,16", "train.size=32", "valid.size=32", "test.size=32")
SHORT_SERIES = [f"{s}.{f}" for s in ("train", "valid", "test") for f in ("window=24", "horizon=6")]
SHORT_TEXT = [f"{part}.context=32" for part in ("model", "train", "valid", "test")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all data sets of this file."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(autouse=True)
def in_empty_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))


# The archives.


def encoded(pixels: np.ndarray, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()


def photograph(kind: int, seed: int) -> bytes:
    """A noisy JPEG of 40 × 48 pixels or so in the colour of its class."""
    rng = np.random.default_rng((kind, seed))
    shape = (40 + seed % 3, 48 - seed % 5, *np.shape(COLOURS[kind]))
    return encoded(np.clip(COLOURS[kind] + rng.integers(-30, 31, shape), 0, 255))


def imagenet(train: int = 32, valid: int = 8) -> dict[str, bytes]:
    """The two archives with ``train`` and ``valid`` photographs of each of three synsets."""
    import tensorflow_datasets as tfds

    # Validation images are labelled by their number alone.
    shipped = Path(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")).read_text().split()
    synsets, files = {}, {}
    for kind, synset in enumerate(SYNSETS):
        synsets[f"{synset}.tar"] = tar({f"{synset}_{i}.JPEG": photograph(kind, i) for i in range(train)})
        numbers = [number for number, name in enumerate(shipped, 1) if name == synset][:valid]
        files |= {f"ILSVRC2012_val_{n:08d}.JPEG": photograph(kind, 1000 + n) for n in numbers}
    return {"ILSVRC2012_img_train.tar": tar(synsets), "ILSVRC2012_img_val.tar": tar(files)}


def pets(train: int = 40, test: int = 8) -> dict[str, bytes]:
    """The two archives; a pet (1) is an orange box with a grey border (3) on green (2)."""
    images, notes = {}, {}
    names = [f"{'Abyssinian' if i % 2 else 'beagle'}_{i}" for i in range(train + test)]
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        trimap = np.full((40, 48), 2)
        top, left = rng.integers(4, 12, 2)
        trimap[top : top + 24, left : left + 26] = 3
        trimap[top + 4 : top + 20, left + 4 : left + 22] = 1
        colours = np.array([[230, 120, 20], [30, 150, 40], [120, 120, 120]])
        images[f"images/{name}.jpg"] = encoded(colours[trimap - 1] + rng.integers(-20, 21, (40, 48, 3)))
        notes[f"annotations/trimaps/{name}.png"] = encoded(trimap, "PNG")
    lines = [f"{name} {1 if name[0] == 'A' else 5} {1 if name[0] == 'A' else 2} 1" for name in names]
    notes["annotations/trainval.txt"] = "\n".join(lines[:train]).encode()
    notes["annotations/test.txt"] = "\n".join(lines[train:]).encode()
    return {"images.tar.gz": tar(images, "w:gz"), "annotations.tar.gz": tar(notes, "w:gz")}


def imdb() -> dict[str, bytes]:
    """Reviews of common words among which two tell the class."""
    rng, files = np.random.default_rng(0), {"aclImdb/train/unsup/0_0.txt": b"nobody has labelled this"}
    for split, kind, n in [
        ("train", "neg", 40),
        ("train", "pos", 40),
        ("test", "neg", 12),
        ("test", "pos", 12),
    ]:
        telling = {"neg": ["dreadful", "boring"], "pos": ["splendid", "moving"]}[kind]
        for i in range(n):
            words = [*rng.choice(["a", "film", "about", "the", "sea", "and", "people"], 8), *telling]
            text = " ".join(rng.permutation(words)).capitalize() + ".<br />"
            files[f"aclImdb/{split}/{kind}/{i}_{3 if kind == 'neg' else 8}.txt"] = text.encode()
    return {"aclImdb_v1.tar.gz": tar(files, "w:gz")}


def movielens() -> dict[str, bytes]:
    """Ratings that are mostly the user's mood and the film's worth; ids reach the last of the original."""
    rng = np.random.default_rng(0)
    users, items = [*range(1, 20), 943], [*range(1, 30), 1682]
    mood, worth = rng.choice([-1, 0, 1], len(users)), rng.choice([-1, 0, 1], len(items))
    lines = [
        f"{user}\t{item}\t{3 + mood[a] + worth[b]}\t{880_000_000 + a}"
        for a, user in enumerate(users)
        for b, item in enumerate(items)
        if rng.random() < 0.6
    ]
    flags = "|".join(["0"] * 18 + ["1"])
    files = {
        "ml-100k/u.data": "\n".join(lines),
        "ml-100k/u.item": "\n".join(f"{i}|Film {i} (1990)|01-Jan-1990||http://a|{flags}" for i in items),
        "ml-100k/u.user": "\n".join(f"{i}|33|F|writer|12345" for i in users),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text + "\n")
    return {"ml-100k.zip": buffer.getvalue()}


def ready(name: str, files: dict[str, bytes] | Path) -> None:
    """Prepares data set ``name`` from a folder of its originals, as a user would."""
    folder = files if isinstance(files, Path) else write(Path("originals"), files)
    assert prepare.main([name, "--from", str(folder)]) == 0


# Runs.


def train(name: str, *settings: str, devices: int = 1, workdir: str = "r", code: int = 0) -> dict[str, Any]:
    """Runs a shipped experiment; its ``result.json``, once it has one."""
    overrides = [word for setting in settings for word in ("--set", setting)]
    experiment = str(ROOT / "experiments" / f"{name}.py")
    words = ["--experiment", experiment, "--workdir", workdir, "--devices", str(devices), *overrides]
    assert run.main(words) == code
    result = Path(workdir, "result.json")
    return json.loads(result.read_text()) if result.exists() else {}


def losses(workdir: str = "r") -> list[float]:
    """The training loss of each logged window."""
    records = [json.loads(line) for line in Path(workdir, "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def finite(found: dict[str, float], *names: str) -> dict[str, float]:
    assert set(found) == set(names) and all(math.isfinite(value) for value in found.values()), found
    return found


@pytest.mark.full("tests/program/test_contracts.py::test_overfits_32_examples")
def test_imagenet_resnet50_learns_and_resumes_bit_for_bit_whatever_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random crops are a function of seed, epoch and example: neither workers nor a stop can change them."""
    ready("imagenet2012", imagenet())
    settings = (*RESNET, "batch=8", "epochs=2", "eval_every=none", "log_every=6")
    straight = train("imagenet_resnet50", *settings, "workers=0", workdir="straight")
    with monkeypatch.context() as patch:
        stopping(7, patch)  # in mid-epoch: one has 12 steps
        assert train("imagenet_resnet50", *settings, "workers=2", workdir="cut", code=130) == {}
    cut = train("imagenet_resnet50", *settings, "workers=2", workdir="cut")
    assert cut["resumed_from"] == 7 and cut["steps"] == 24
    test = finite(straight["test"], "loss", "smoothed_loss", "accuracy", "top5")
    assert test["accuracy"] > 0.9 and test["top5"] >= test["accuracy"]
    assert losses("straight")[-1] < losses("straight")[0] / 2
    same(leaves("cut"), leaves("straight"))
    assert cut["test"] == test


@pytest.mark.full("tests/program/test_contracts.py::test_overfits_32_examples")
def test_imagenet_vit_s16_learns() -> None:
    """RandAugment on the host, Mixup on the device, and a hundredth of the training set to validate on.

    Colours are what RandAugment changes, so all that 22 steps show is which three labels of 1,000 occur.
    """
    ready("imagenet2012", imagenet())
    settings = (
        "batch=8",
        "epochs=2",
        "workers=0",
        "eval_every=none",
        "log_every=5",
        "optimizer.lr.peak=0.01",
    )
    result = train("imagenet_vit_s16", *VIT, *settings)
    finite(result["test"], "loss", "accuracy", "top5")
    assert result["best"]["test"] == result["test"] and result["steps"] == 22
    assert result["test"]["top5"] > 0.9 and losses()[-1] < losses()[0] / 1.5


@pytest.mark.full("tests/program/test_contracts.py::test_overfits_32_examples")
def test_pets_unet_learns(capsys: pytest.CaptureFixture[str]) -> None:
    ready("oxford_iiit_pet", pets())
    result = train("pets_unet", *UNET, "batch=8", "epochs=6", "workers=0", "log_every=5", "eval_every=6")
    finite(result["test"], "loss", "accuracy", "mean_iou")
    best = finite(result["best"]["test"], "loss", "accuracy", "mean_iou")
    assert best["mean_iou"] > 0.6 and losses()[-1] < losses()[0] / 2
    capsys.readouterr()
    assert evaluate.main(["--workdir", "r", "--devices", "1", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["mean_iou"] == pytest.approx(best["mean_iou"]) and again["examples"] == 8
    assert len(again["iou"]) == 3 and np.mean(again["iou"]) == pytest.approx(best["mean_iou"])


@pytest.mark.full("tests/program/test_contracts.py::test_overfits_32_examples")
def test_sentiment_lstm_learns() -> None:
    ready("imdb_reviews", imdb())
    words = ("train.words=30", "test.words=30", "train.length=24", "test.length=24", "model.vocab=286")
    small = ("model.width=16", "model.embedding=16", "optimizer.lr.peak=0.01", "batch=8", "epochs=4")
    result = train("sentiment_lstm", *words, *small, "log_every=9")
    finite(result["test"], "loss", "accuracy")
    best = finite(result["best"]["test"], "loss", "accuracy")
    assert best["accuracy"] > 0.9 and losses()[-1] < losses()[0] / 1.5


@pytest.mark.full("tests/program/test_contracts.py::test_overfits_32_examples")
def test_ratings_factors_learns() -> None:
    """The model as it is shipped: the first and the last user and item of the original have a place in it."""
    ready("movielens/100k-ratings", movielens())
    result = train("ratings_factors", "batch=16", "optimizer.lr.peak=0.05", "log_every=50")
    finite(result["test"], "loss", "mae", "rmse")
    best = finite(result["best"]["test"], "loss", "mae", "rmse")
    assert best["rmse"] == pytest.approx(best["loss"] ** 0.5)
    assert best["rmse"] < 0.8 and losses()[-1] < losses()[0] / 2  # guessing 3.5 is off by 1.1 or so


@pytest.mark.full("tests/program/test_contracts.py::test_overfits_32_examples")
def test_shakespeare_gpt_learns() -> None:
    """The real text; 5.5 is a guess among 256 bytes, 3.3 the entropy of single letters in English prose."""
    ready("tiny_shakespeare", real_data("text"))
    small = ("model.width=32", "model.depth=1", "model.heads=2", "optimizer.lr.peak=0.01", "epochs=0.1")
    result = train("shakespeare_gpt", *small, *SHORT_TEXT, "log_every=20")
    finite(result["test"], "loss", "accuracy")
    assert finite(result["best"]["test"], "loss", "accuracy")["loss"] < 3.3
    assert losses()[0] > 3.5


@pytest.mark.full("tests/program/test_contracts.py::test_overfits_32_examples")
def test_series_gru_learns() -> None:
    """The real series."""
    ready("etth1", real_data("series"))
    small = ("model.width=16", "model.horizon=6", "optimizer.lr.peak=0.01", "epochs=0.5", *SHORT_SERIES)
    result = train("series_gru", *small, "log_every=10")
    names = ("loss", "mae", "repeat_last_mse", "repeat_last_mae")
    finite(result["test"], *names)
    finite(result["best"]["test"], *names)
    assert result["best"]["test"]["mae"] < result["best"]["test"]["repeat_last_mae"]
    assert losses()[-1] < losses()[0]
