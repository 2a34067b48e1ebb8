"""``python -m jaxtrain explain``: pages, JSON, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxtrain import __main__ as commands
from jaxtrain import run
from jaxtrain.explain import page
from jaxtrain.monitor import pictures

IMAGES = """
import numpy as np
from jaxtrain import Experiment, data, losses, models, optim

rng = np.random.default_rng(0)
label = rng.integers(0, 2, 64).astype(np.int32)
image = rng.integers(0, 90, (64, 8, 8, 3)).astype(np.uint8)
image[label == 1, :4] += 100

class Named(data.Arrays):
    class_names = ("ant", "<b>bee</b>")

fields = Named({"image": image, "label": label})
EXPERIMENT = Experiment(model=models.CNN(widths=(4,), convs=1, classes=2), train=fields, test=fields,
                        loss=losses.CrossEntropy(), optimizer=optim.SGD(lr=0.1), batch=32, epochs=1,
                        preprocess=(data.Normalise(),))
"""
TEXTS = """
from jaxtrain import Experiment, data, losses, models, optim

def text(split):
    return data.LabelledText(length=24, split=split, files=("bad.txt", "good.txt"), words=2)

EXPERIMENT = Experiment(model=models.LSTMClassifier(vocab=258, width=4, embedding=4), train=text("train"),
                        test=text("test"), loss=losses.CrossEntropy(), optimizer=optim.SGD(lr=0.1), batch=8,
                        epochs=1)
"""


NUMBERS = """
import numpy as np
from jaxtrain import Experiment, data, losses, models, optim

fields = data.Arrays({"image": np.ones((8, 4), np.float32), "label": np.arange(8) % 2})
EXPERIMENT = Experiment(model=models.MLP(widths=(3,), classes=2), train=fields, test=fields,
                        loss=losses.CrossEntropy(), optimizer=optim.SGD(lr=0.1), batch=8, epochs=1)
"""


def train(folder: Path, text: str) -> list[str]:
    """Train an experiment; returns the words that name its run."""
    file = folder / f"mine{zlib.crc32(str(folder).encode())}.py"  # modules are loaded once by their name
    file.write_text(text)
    assert run.main(["--experiment", str(file), "--workdir", str(folder / "r"), "--devices", "1"]) == 0
    return ["--workdir", str(folder / "r"), "--experiment", str(file)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return train(tmp_path_factory.mktemp("images"), IMAGES)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    for name in ("bad", "good"):
        (folder / f"{name}.txt").write_text("".join(f"a {name} film {k}\n" for k in range(40)))
    return train(folder, TEXTS)


def refusal(capsys: Any, *words: str) -> str:
    capsys.readouterr()
    try:
        code = commands.main(["explain", *words])
    except SystemExit as end:
        code = int(end.code or 0)
    error: str = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    return error


class Page(HTMLParser):
    """The tags, pictures and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.pictures += [dict(attrs)["src"]] if tag == "img" else []

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_and_json_of_images(images: list[str], capsys: Any, tmp_path: Path) -> None:
    for name, side in (("one", 8), ("two", 24)):
        Image.fromarray(np.full((side, side, 3), 99, np.uint8)).save(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    capsys.readouterr()
    words = [*images, str(tmp_path / "one.png"), str(tmp_path / "two.png"), "--resize", "--json"]
    assert commands.main(["explain", *words, "--out", str(out)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["methods"] == ["integrated_gradients", "smoothgrad", "grad_cam"]
    assert record["layer"] == "stage0_conv0_norm"
    shown = Page(out / page.PAGE)
    names = [file for one in record["examples"] for file in one["files"].values()]
    assert sorted(shown.pictures) == sorted(names) == sorted(path.name for path in out.glob("*.png"))
    for name in names:
        with Image.open(out / name) as picture:
            assert min(picture.size) >= 56 and picture.format == "PNG"
    one = record["examples"][0]
    assert one["prediction"] in ("ant", "<b>bee</b>") and 0.5 <= one["probability"] <= 1
    assert f"{100 * one['probability']:.1f} %" in shown.text and one["prediction"] in shown.text
    assert one["completeness_error"] < 0.01
    assert shown.tags.count("tr") == 3


def test_examples_of_a_split_have_their_labels_and_a_target(images: list[str], capsys: Any) -> None:
    capsys.readouterr()
    words = ["--split", "test", "--count", "2", "--method", "smoothgrad", "--target", "<b>bee</b>", "--json"]
    assert commands.main(["explain", *images, *words]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["id"] for one in record["examples"]] == ["test 0", "test 32"]
    assert {one["target"] for one in record["examples"]} == {"<b>bee</b>"}
    assert all(one["label"] in ("ant", "<b>bee</b>") for one in record["examples"])
    assert all(list(one["files"]) == ["input", "smoothgrad"] for one in record["examples"])
    path = Path(record["page"])
    assert path.parent == Path(images[1]) / "explain" / "000002"
    assert "<b>bee" not in path.read_text() and "&lt;b&gt;bee" in path.read_text()


def test_tokens_of_text_are_escaped_and_add_up(texts: list[str], capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a <script>alert(1)</script> film\nbad café\n")
    capsys.readouterr()
    words = [str(tmp_path / "lines.txt"), "--json", "--out", str(tmp_path)]
    assert commands.main(["explain", *texts, *words]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["methods"] == ["integrated_gradients"]
    shown = Page(tmp_path / page.PAGE)
    assert "script" not in shown.tags and "<script>ale" in shown.text
    source = (tmp_path / page.PAGE).read_text()
    assert ">&lt;</span>" in source and "><</span>" not in source
    for one in record["examples"]:
        pieces = one["tokens"]["integrated_gradients"]
        assert sum(number for _, number in pieces) == pytest.approx(one["value"] - one["baseline"], rel=0.01)
    last = [text for text, _ in record["examples"][1]["tokens"]["integrated_gradients"]]
    assert "".join(last).replace(" ", "") == "badcafé"  # the two bytes of a character are one piece


def test_incomplete_attributions_are_a_line_on_stderr(images: list[str], capsys: Any) -> None:
    capsys.readouterr()
    words = ["--split", "test", "--count", "3", "--method", "integrated_gradients", "--steps", "1"]
    assert commands.main(["explain", *images, *words]) == 0
    out, err = capsys.readouterr()
    assert re.search(
        r"[123] of 3 predictions are more than 1 % from complete, test \d+ by .*--steps 4$", err.strip()
    )
    assert "index.html: 3 predictions" in out


def test_bad_input_is_one_line(images: list[str], texts: list[str], capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    split = ("--split", "test")
    assert "--workdir RUN" in refusal(capsys, "--model", "digits.jaxtrain", "a.png")
    assert "give --workdir RUN" in refusal(capsys, "a.png")
    assert "give at least one INPUT" in refusal(capsys, *images)
    assert "leave out a.png" in refusal(capsys, *images, "a.png", *split)
    assert "there is no such file" in refusal(capsys, *images, "absent.png")
    assert "is text, and the model takes" in refusal(capsys, *images, str(tmp_path / "a.txt"))
    assert "there is no example" in refusal(capsys, *texts, str(tmp_path / "a.txt"))
    assert "--count 0" in refusal(capsys, *images, *split, "--count", "0")
    assert "did you mean ant" in refusal(capsys, *images, *split, "--target", "amt")
    assert "invalid choice" in refusal(capsys, *images, *split, "--method", "lime")
    assert "no valid split" in refusal(capsys, *images, "--split", "valid")
    assert "is a file" in refusal(capsys, *images, *split, "--out", str(tmp_path / "a.txt"))
    assert "does not use" in refusal(capsys, *images, *split, "--method", "rollout")
    assert "there is no such file" in refusal(capsys, *images, "z" * 300)
    assert "--out  is empty" in refusal(capsys, *images, *split, "--out", "")
    for flag in ("--steps", "--samples"):
        assert "give 1 to 100,000" in refusal(capsys, *images, *split, flag, "100001")
    (tmp_path / "index.html").write_text("my page")
    assert "is not a page of explain" in refusal(capsys, *images, *split, "--out", str(tmp_path))
    assert (tmp_path / "index.html").read_text() == "my page"


def test_a_page_replaces_an_older_one_with_its_pictures_and_names_may_be_bytes(
    images: list[str], capsys: Any, tmp_path: Path
) -> None:
    words = ["--split", "test", "--method", "grad_cam", "--out", str(tmp_path / "out")]
    for count in (3, 1):
        assert commands.main(["explain", *images, *words, "--count", str(count)]) == 0
    names = ["000-grad_cam.png", "000-input.png", "index.html"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    odd = os.fsdecode(b"\xff.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / odd, "PNG")
    code = commands.main(["explain", *images, str(tmp_path / odd), *words[2:]])
    assert code == 0 and r"\udcff.png" in (tmp_path / "out" / "index.html").read_text()


def test_what_is_not_finite_has_no_explanation(capsys: Any, tmp_path: Path) -> None:
    run = train(tmp_path, NUMBERS)
    np.save(tmp_path / "x.npy", np.float32([[0, 1, np.nan, 3], [1, 2, 3, 4]]))
    assert "x.npy:0: the input" in refusal(capsys, *run, str(tmp_path / "x.npy"))


def test_colours_and_legend_follow_the_numbers() -> None:
    with_outlier = np.zeros(5000)
    with_outlier[0], with_outlier[1:100] = 100.0, 1.0
    assert pictures.limit(with_outlier) == (1.0, True)
    array = np.array([[0.0, 2.0], [-1.0, 0.0]])
    found = pictures.colour(array, "diverging", 2.0)
    red, blue = pictures.COLOURS["diverging"][-1], pictures.COLOURS["diverging"][0]
    assert tuple(found[0, 1]) == red and found[1, 0, 2] > found[1, 0, 0] and tuple(found[1, 0]) != blue
    assert pictures.heat_map(np.zeros((3, 3)), "sequential")  # all 0: no division by 0


@pytest.mark.full(
    "tests/explain/test_explainer.py::test_integrated_gradients_are_complete_within_one_percent[cnn]"
)
def test_the_digits_are_explained_completely(tmp_path: Path, capsys: Any) -> None:
    words = ["--experiment", "digits_cnn", "--set", "epochs=3", "--devices", "1"]
    assert run.main([*words, "--workdir", str(tmp_path)]) == 0
    capsys.readouterr()
    words = ["--split", "test", "--count", "12", "--method", "integrated_gradients", "--json"]
    assert commands.main(["explain", "--workdir", str(tmp_path), *words]) == 0
    out, err = capsys.readouterr()
    examples = json.loads(out.splitlines()[-1])["examples"]
    assert len(examples) == 12 and all(one["completeness_error"] < 0.01 for one in examples) and not err
