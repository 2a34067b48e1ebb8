"""Bad data and settings for shipped experiments: one line, exit code 2, and no files left behind."""

from __future__ import annotations

from pathlib import Path

import fixtures_data
import numpy as np
import pytest
import test_end_to_end as fake_data
from conftest import ROOT
from test_cli import refused

from jaxtrain import run
from jaxtrain.data import ratings
from jaxtrain.data.prepare import prepare

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of small data sets: images of one size, photographs, and photographs with a mask."""
    root, source = tmp_path_factory.mktemp("tfds"), tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cifar10", "mnist"):
            files = fixtures_data.tiny_files(name)
            fixtures_data.patch_checksums(patch, name, files)
            prepare(name, data_dir=root, source=fixtures_data.write(source / name, files))
    for name, files in (
        ("imagenet2012", fake_data.imagenet(20, 2)),
        ("oxford_iiit_pet", fake_data.pets(10, 2)),
    ):
        prepare(name, data_dir=root, source=fixtures_data.write(source / name, files))
    return root


@pytest.fixture(autouse=True)
def files_in_current_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    Path("a.txt").write_bytes(b"Before we proceed any further, hear me speak.\n" * 200)
    Path("short.txt").write_text("Speak, speak.")
    Path("a.neg").write_text("".join(f"a dull film, {i} of ten\n" for i in range(50)))
    Path("b.pos").write_text("".join(f"a fine film, {i} of ten\n" for i in range(50)))
    Path("blank.pos").write_text(" \n\n")
    rows = (f"{1 + i % 30}\t{1 + 7 * i % 40}\t{1 + i % 5}\t{i}" for i in range(300))
    Path("u.data").write_text("\n".join(rows))
    table("a.csv")
    table("nan.csv", "nan")
    table("gap.csv", "")


def table(path: str, cell: str | None = None) -> None:
    """Write a CSV file of 400 rows and 7 variables, with ``cell`` in column x2 of line 102."""
    values = np.random.default_rng(0).normal(size=(400, 7))
    rows = [[f"{value:.3f}" for value in row] for row in values]
    if cell is not None:
        rows[100][2] = cell
    lines = [
        "date," + ",".join(f"x{i}" for i in range(7)),
        *(f"day {i}," + ",".join(r) for i, r in enumerate(rows)),
    ]
    Path(path).write_text("\n".join(lines))


def command(name: str, settings: tuple[str, ...], *flags: str) -> list[str]:
    overrides = [word for setting in settings for word in ("--set", setting)]
    return ["--experiment", str(ROOT / "experiments" / f"{name}.py"), *overrides, *flags]


def everywhere(*settings: str, splits: tuple[str, ...] = SPLITS) -> tuple[str, ...]:
    return tuple(f"{split}.{setting}" for split in splits for setting in settings)


TEXT = everywhere("file=a.txt")
WORDS = everywhere("files=a.neg,b.pos", splits=("train", "test"))
SERIES = everywhere("rows=none", "window=24", "horizon=6")
CSV = ("model.horizon=6", *SERIES, *everywhere("file=a.csv"))
RATINGS = everywhere("file=u.data", splits=("train", "test"))
CIFAR_AS_MNIST = everywhere("name=mnist", splits=("train", "test"))

# Experiment, settings, and parts of the message: what is wrong, where, and what to do.
CASES = {
    "token outside the vocabulary": (
        "shakespeare_gpt",
        (*TEXT, "model.vocab=100"),
        ("token 101 of example 0", "vocabulary of 100, 0..99", "set model.vocab=122 or more"),
    ),
    "word outside the vocabulary": (
        "sentiment_lstm",
        (*WORDS, "model.vocab=256"),
        ("train: token 2", "of example 0 is outside 0..255", "set model.vocab to at least 3"),
    ),
    "sequence longer than the context": (
        "shakespeare_gpt",
        (*TEXT, "model.context=128"),
        ("sequences of 256 are 128 longer", "GPT's context of 128", "cut them or set model.context=256"),
    ),
    "text too short for a window": (
        "shakespeare_gpt",
        everywhere("file=short.txt"),
        ("11 bytes, too few for one window", "short.txt: its train split", "lower context, or give more"),
    ),
    "no such text": (
        "shakespeare_gpt",
        everywhere("file=gone.txt"),
        ("cannot be read (No such file", "/gone.txt", "correct the path"),
    ),
    "unknown split of a text": (
        "shakespeare_gpt",
        (*TEXT, "valid.split=dev"),
        ("not 'dev'", "TextWindows", "have the splits train, validation, test"),
    ),
    "one class only": (
        "sentiment_lstm",
        everywhere("files=a.neg", splits=("train", "test")),
        ("files is ('a.neg',)", "LabelledText", "give two or more, one for each class"),
    ),
    "a class without texts": (
        "sentiment_lstm",
        everywhere("files=a.neg,blank.pos", splits=("train", "test")),
        ("holds no text", "/blank.pos", "give one text per line"),
    ),
    "column that is not there": (
        "series_gru",
        (*CSV, *everywhere("columns=x0,OT")),
        ("column 'OT' is missing", "/a.csv, row 1", "there are date, x0, x1, x2, x3, x4, x5, x6"),
    ),
    "nan in a table": (
        "series_gru",
        (*CSV, *everywhere("file=nan.csv")),
        ("'nan' is not a finite number", "/nan.csv, row 102, column 'x2'", "fill it in, or remove"),
    ),
    "gap in a table": (
        "series_gru",
        (*CSV, *everywhere("file=gap.csv")),
        ("an empty cell is not a finite number", "/gap.csv, row 102, column 'x2'", "fill it in, or remove"),
    ),
    "no such table": (
        "series_gru",
        (*CSV, *everywhere("file=gone.csv")),
        ("cannot be read (No such file", "/gone.csv", "correct the path"),
    ),
    "fewer rows than asked for": (
        "series_gru",
        (*CSV, *everywhere("rows=14400")),
        ("400 rows, fewer than rows=14400", "/a.csv", "lower rows, or set none for all"),
    ),
    "variables that the model has not": (
        "series_gru",
        (*CSV, *everywhere("columns=x0,x1")),
        ("has 2 variables", "model.variables is 7", "set model.variables=2"),
    ),
    "user outside the model": (
        "ratings_factors",
        (*RATINGS, "model.users=29"),
        ("user 29 of example", "is outside 0..28", "set model.users to at least 30"),
    ),
    "item outside the model": (
        "ratings_factors",
        (*RATINGS, "model.items=30"),
        ("item 3", "is outside 0..29", "set model.items to at least 40"),
    ),
    "reviews of two files to train on and of two others to test on": (
        "sentiment_lstm",
        (*WORDS, "test.files=b.pos,a.neg"),
        ("test.files is ('b.pos', 'a.neg')", "train.files is ('a.neg', 'b.pos')", "both must be the same"),
    ),
    "words of two vocabularies": (
        "sentiment_lstm",
        (*WORDS, "test.words=9"),
        ("test.words is 9", "train.words is 10000", "both must be the same"),
    ),
    "one column to train on and another to test on": (
        "series_gru",
        (*CSV, "train.columns=x0", "valid.columns=x0", "test.columns=x1"),
        ("test.columns is ('x1',)", "train.columns is ('x0',)", "both must be the same"),
    ),
    "rows of a series cut at two places": (
        "series_gru",
        (*CSV, "valid.rows=300"),
        ("valid.rows is 300", "train.rows is None", "both must be the same"),
    ),
    "test ratings that are training ratings": (
        "ratings_factors",
        (*RATINGS, "test.part=0.5"),
        ("test.part is 0.5", "train.part is 0.1", "both must be the same"),
    ),
    "dropout of more than everything": (
        "shakespeare_gpt",
        (*TEXT, "model.dropout=1.5"),
        ("GPT.dropout is 1.5", "it must be in [0, 1)"),
    ),
    "no ratings in a file": (
        "ratings_factors",
        everywhere("file=a.csv", splits=("train", "test")),
        ("1 cells where user, item, rating and time", "/a.csv, line 1", "separated by tabs, are expected"),
    ),
    "unknown split of a data set": (
        "cifar_resnet18",
        ("train.split=dev",),
        ("no split 'dev'", "data set cifar10", "its splits are train, test, and parts of them"),
    ),
    "image of other channels": (
        "cifar_resnet18",
        CIFAR_AS_MNIST,
        ("3 values of mean for images of 1 channels", "image (128, 28, 28, 1)", "Normalise"),
    ),
    "train and test of two kinds": (
        "cifar_resnet18",
        ("train.name=mnist",),
        ("uint8[28, 28, 1] in train and uint8[32, 32, 3] in test", "field 'image'", "need the same fields"),
    ),
    "class outside the model": (
        "cifar_resnet18",
        ("model.classes=9",),
        ("label 9 of example", "the model's 9 classes 0..8", "fix the labels or set the model's classes"),
    ),
    "image that no patch divides": (
        "imagenet_vit_s16",
        ("batch=8", *everywhere("size=40")),
        ("multiples of ViT's patch of 16", "image (8, 40, 40, 3)", "resize the images or set model.patch"),
    ),
    "image that the U-Net cannot halve": (
        "pets_unet",
        ("batch=8", *everywhere("size=36")),
        ("needs sides that are multiples of 8", "image (8, 36, 36, 3)", "pad, crop or resize the images"),
    ),
    "image too small": (
        "imagenet_resnet50",
        ("batch=8", *everywhere("size=16", splits=("train", "test"))),
        ("too small", "image (8, 16, 16, 3)", "needs at least 32 pixels"),
    ),
    "batch on too many devices": (
        "cifar_lenet",
        (),
        ("batch 4 does not divide", "over 8 devices", "use --devices 4 at most, or --set batch=8"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_message_says_what_where_and_what_to_do(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, settings, parts = CASES[case]
    line = refused(capsys, run.main(command(name, settings)))
    for part in parts:
        assert part in line
    assert len(line) < 400 and not Path("runs").exists()


@pytest.mark.parametrize("devices", [-1, 0, 9])
def test_missing_devices_are_refused(devices: int, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, run.main(command("cifar_lenet", (), "--devices", str(devices))))
    assert f"--devices {devices}: give 1 to 8, the number of devices" in line and not Path("runs").exists()


@pytest.mark.full("tests/program/test_parallel.py::test_twenty_float64_steps_equal_one_device")
@pytest.mark.parametrize("devices", [4, 1])
def test_lenet_trains_its_batch_of_4_on_several_devices(devices: int) -> None:
    words = command("cifar_lenet", ("eval_batch=8",), "--devices", str(devices), "--workdir", "r")
    assert run.main(words) == 0
    assert Path("r/result.json").exists()


@pytest.mark.full("tests/cli/test_bad_input.py")
def test_a_refused_run_leaves_the_folder_free(capsys: pytest.CaptureFixture[str]) -> None:
    words = command("ratings_factors", (*RATINGS, "batch=64", "epochs=2"), "--workdir", "r", "--devices", "1")
    refused(capsys, run.main([*words, "--set", "model.users=29"]))
    assert not Path("r").exists()
    assert run.main(words) == 0


@pytest.mark.full("tests/train/test_loop.py::test_streamed_labels_are_checked_on_the_way")
def test_streamed_data_is_checked_while_training(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the first example is checked before; a stopped run resumes after the file is fixed."""
    settings = (*RATINGS, "placement=stream", "model.users=30", "batch=64", "epochs=2")
    words = command("ratings_factors", settings, "--workdir", "r", "--devices", "1")
    good = Path("u.data").read_text()  # line 13 is in the third batch
    Path("u.data").write_text(good.replace("13\t5\t3\t12\n", "31\t5\t3\t12\n"))
    assert "user 30 of example" in refused(capsys, run.main(words), 3) and Path("r").exists()
    Path("u.data").write_text(good)
    ratings._read_file.cache_clear()  # as a new process would
    assert run.main(words) == 0
