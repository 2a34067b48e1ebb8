"""``python -m jaxtrain evaluate``: the report from the command line, its files, and what it refuses."""

from __future__ import annotations

import csv
import html
import importlib.util
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from jaxtrain import __main__ as commands
from jaxtrain import data, run
from jaxtrain.cli import command_line, experiments
from jaxtrain.cli.command_line import parse_weights
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import State
from jaxtrain.data.order import holdout
from jaxtrain.evaluation import Report, files, plots
from jaxtrain.evaluation.class_figures import ClassFigures
from jaxtrain.evaluation.text import confusion_of, number_text
from jaxtrain.metrics import Classification
from jaxtrain.optim import EMA
from jaxtrain.step.factories import eval_state, without_average

FILE = """
import jax.numpy as jnp, numpy as np
from jaxtrain import Experiment, data, losses, optim

rng = np.random.default_rng(0)
label = rng.integers(0, 3, 70).astype(np.int32)
image = rng.integers(0, 90, (70, 2, 3, 1)).astype(np.uint8)
image[np.arange(70), 0, label] += 60
fields = {"image": image, "label": label, "group": (np.arange(70) % 4 == 0).astype(np.uint8)}

class Named(data.Arrays):
    class_names = ("ant", "bee", "cow")

class Other(data.Arrays):
    class_names = ("ant", "bee", "dog")

def init(key, batch):
    return {"w": 0.01 * jnp.ones((6, 3))}, {}

def apply(params, extra, batch, **mode):
    return batch["image"].reshape(-1, 6).astype(jnp.float32) / 50 @ params["w"], extra

SHIFT = Named({**fields, "image": 150 - image})
WIDE = Named({**fields, "image": image[:, :, :2]})
OTHER = Other(fields)
EXPERIMENT = Experiment(model=(init, apply), train=Named(fields), test=Named(fields),
                        loss=losses.CrossEntropy(), optimizer=optim.SGD(lr=0.5), batch=16, epochs=2,
                        holdout=0.3, post_update=(optim.EMA(decay=0.9),))
"""
PLOTS = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``mine.py`` and its run in ``r``; the name differs, because modules are loaded once."""
    folder = tmp_path_factory.mktemp("report")
    (folder / f"mine{zlib.crc32(str(folder).encode())}.py").write_text(FILE)
    file = next(folder.glob("mine*.py"))
    assert run.main(["--experiment", str(file), "--workdir", str(folder / "r"), "--devices", "1"]) == 0
    return file


def call(trained: Path, *words: str, devices: int = 1) -> int:
    own = ["--workdir", str(trained.parent / "r"), "--experiment", str(trained), "--devices", str(devices)]
    return commands.main(["evaluate", *own, *words])


def result(trained: Path, capsys: Any, *words: str, devices: int = 1) -> Any:
    capsys.readouterr()
    assert call(trained, "--json", *words, devices=devices) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refusal(trained: Path, capsys: Any, *words: str) -> str:
    capsys.readouterr()
    try:
        code = call(trained, *words)
    except SystemExit as end:
        code = int(end.code or 0)
    error: str = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    return error


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_eight_devices_report_the_same_and_the_csv_has_every_example_once(trained, capsys, tmp_path) -> None:
    words = ("--ci", "20", "--by", "group", "--csv", "--out", str(tmp_path))
    one = result(trained, capsys, *words)
    eight = result(trained, capsys, *words, devices=8)
    assert jax.tree.structure(one) == jax.tree.structure(eight)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        assert a == b if isinstance(a, str) else a == pytest.approx(b, rel=1e-5)
    rows = rows_of(tmp_path / "examples.csv")
    assert [int(row["id"]) for row in rows] == list(range(70))
    label, guess = ([int(row[name]) for row in rows] for name in ("label", "prediction"))
    names = ("ant", "bee", "cow")
    assert [row["label_name"] for row in rows] == [names[k] for k in label]
    assert one["accuracy"] == sk.accuracy_score(label, guess)
    assert one["weighted_f1"] == pytest.approx(sk.f1_score(label, guess, average="weighted"))
    low, high = one["bootstrap"]["intervals"]["accuracy"]
    assert low <= one["accuracy"] <= high and one["bootstrap"]["resamples"] == 20
    groups = one["groups"]["by_value"]
    for value, group in groups.items():
        ids = [k for k in range(70) if (k % 4 == 0) == (value == "1")]
        expected = sk.accuracy_score(np.array(label)[ids], np.array(guess)[ids])
        assert group["accuracy"] == pytest.approx(expected) and group["examples"] == len(ids)
    gap = abs(groups["0"]["accuracy"] - groups["1"]["accuracy"])
    assert one["groups"]["largest_gaps"]["accuracy"]["size"] == pytest.approx(gap)
    assert "loss" in groups["0"] and "log_loss" not in one


def test_the_tables_show_averages_intervals_groups_and_gaps(trained, capsys) -> None:
    assert call(trained, "--ci", "10", "--by", "group") == 0
    out = capsys.readouterr().out
    for text in ("averages over classes", "by class", "confusion matrix", "reliability", "by group"):
        assert text in out
    assert "2 cow" in out and "largest gaps between values of group" in out
    assert "[low, high]: 95 % interval of 10 bootstrap resamples of the examples, seed 0" in out


@pytest.mark.full(
    "tests/cli/test_evaluate_report.py::test_eight_devices_report_the_same_and_the_csv_has_every_example_once"
)
def test_splits_name_examples_by_their_number_in_the_source(trained, capsys, tmp_path) -> None:
    train, valid = holdout(70, 0.3)
    for split, ids in (("valid", valid), ("train", train)):
        found = result(trained, capsys, "--split", split, "--csv", "--out", str(tmp_path))
        assert found["split"] == split and found["examples"] == len(ids)
        assert [int(row["id"]) for row in rows_of(tmp_path / "examples.csv")] == ids.tolist()


@pytest.mark.full(
    "tests/cli/test_evaluate_report.py::test_eight_devices_report_the_same_and_the_csv_has_every_example_once"
)
def test_another_source_is_evaluated_if_its_fields_and_classes_are_those_of_the_run(trained, capsys) -> None:
    own, name = result(trained, capsys), str(trained)
    shifted = result(trained, capsys, "--source", f"{name}:SHIFT")
    assert shifted["split"] == f"{name}:SHIFT" and shifted["accuracy"] < own["accuracy"] - 0.3
    same = result(trained, capsys, "--source", name)
    assert {**same, "split": "test"} == own
    error = refusal(trained, capsys, "--source", f"{name}:WIDE")
    assert "field 'image' is uint8[2, 3, 1] in train and uint8[2, 2, 1] in --source" in error
    error = refusal(trained, capsys, "--source", f"{name}:OTHER")
    assert "its class names, ant, bee, dog, differ from the run's, ant, bee, cow" in error
    assert "has no source 'init': give one of train, valid, test, OTHER, SHIFT, WIDE" in refusal(
        trained, capsys, "--source", f"{name}:init"
    )


@pytest.mark.full(
    "tests/cli/test_evaluate_report.py::test_eight_devices_report_the_same_and_the_csv_has_every_example_once"
)
def test_weights_choose_the_average_or_the_parameters(trained, capsys) -> None:
    average, own = (result(trained, capsys, "--weights", kind) for kind in ("ema", "best,params"))
    assert result(trained, capsys) == average
    assert own["step"] == average["step"] and own["loss"] < average["loss"]
    assert result(trained, capsys, "--checkpoint", str(own["step"])) == average
    assert "--weights 1: give best, latest or a saved step" in refusal(trained, capsys, "--weights", "1")
    with pytest.raises(InputError, match="one of best, latest or a step, and one of ema or params"):
        parse_weights("best,latest")
    for kind in ("ema", "params"):  # the second does not replace the files of the first
        result(trained, capsys, "--weights", kind, "--csv")
        assert list((trained.parent / "r" / "evaluation").glob(f"*-{kind}/examples.csv"))


def test_without_average_evaluation_uses_the_parameters_in_their_dtype() -> None:
    ema = EMA(0.5)
    state = ema.init(
        State(jnp.int32(0), {"w": jnp.ones(2, jnp.bfloat16)}, {"batch_stats": {"m": jnp.ones(1)}}, ())
    )
    state = ema(state.replace(params={"w": jnp.full(2, 3, jnp.bfloat16)}, extra={**state.extra}))
    params, extra = eval_state(without_average(state))
    assert params["w"].dtype == jnp.bfloat16 and params["w"].tolist() == [3.0, 3.0]
    assert eval_state(state)[0]["w"].tolist() != [3.0, 3.0]
    changed = without_average(state)
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, state)
    assert extra["batch_stats"]["m"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--by", "age"), "--by age: the examples have the fields group, image, label"),
        (("--by", "image"), "--by image: it has the shape [2, 3, 1] in each example"),
        (("--ci", "0"), "--ci 0: give a number of resamples in 1..1,000,000"),
        (("--csv", "--out", __file__), "is a file: give a folder"),
        (("--out", "x"), "--out: no file is asked for: add --csv, --png or --mistakes"),
        (("--source", "nowhere"), "no experiment is called nowhere"),
        (("--split", "valid", "--source", "digits_cnn"), "not allowed with argument"),
    ],
)
def test_bad_input_is_one_line(trained, capsys, words: tuple[str, ...], message: str) -> None:
    assert message in refusal(trained, capsys, *words)


@pytest.mark.full(
    "tests/cli/test_evaluate_report.py::test_eight_devices_report_the_same_and_the_csv_has_every_example_once"
)
@pytest.mark.skipif(not PLOTS, reason="needs matplotlib")
def test_pictures_are_written_into_the_run(trained, capsys) -> None:
    found = result(trained, capsys, "--png", "--mistakes")
    folder = trained.parent / "r" / "evaluation" / f"{found['step']:06d}-test"
    names = ("confusion.png", "reliability.png", "mistakes.png")
    assert found["files"] == [str(folder / name) for name in names]
    for name in names:
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_matplotlib_the_line_has_the_pip_command(trained, capsys, monkeypatch) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert "--png needs matplotlib: pip install 'jaxtrain[plot]'" in refusal(trained, capsys, "--png")


def report_of(label: list[int], prediction: list[int], probability: list[float]) -> Report:
    """Return the report of these predictions, as far as files need it."""
    n = len(label)
    rows = {
        "label": np.array(label),
        "prediction": np.array(prediction),
        "probability": np.array(probability),
    }
    rows |= {"rank": np.zeros(n), "label_logp": np.zeros(n)}
    return Report({}, {}, ids=np.arange(n), examples=ClassFigures(Classification(), rows))


def test_mistakes_in_texts_are_a_page_with_the_most_confident_first(tmp_path) -> None:
    texts = [b"right", b"<b>bold</b>", b"sure", b"uncounted"]
    tokens = np.array([np.frombuffer(text.ljust(12, b"\0"), np.uint8) for text in texts])
    source = data.Arrays({"tokens": tokens, "label": np.array([0, 0, 1, 0], np.int32)})
    report = report_of([0, 0, 1, -1], [0, 1, 0, 1], [0.9, 0.6, 0.8, 1.0])
    wanted = files.Wanted(mistakes=True)
    files.check_wanted(wanted, Classification(), source)
    about = {"step": 5, "split": "test", "examples": 4}
    written = files.write_files(wanted, report, source, tmp_path / "new", "t", ("no", "yes & more"), about)
    page = Path(written[0]).read_text()
    assert page.index("sure") < page.index(html.escape("<b>bold</b>")) and "<b>" not in page
    assert "yes &amp; more" in page and "right" not in page and "uncounted" not in page
    assert "all 2 mistakes" in page
    body = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert (body["step"], body["split"], body["class_names"]) == (5, "test", ["no", "yes & more"])
    assert [one["text"] for one in body["mistakes"]] == ["sure", "<b>bold</b>"]
    assert [one["prediction"] for one in body["mistakes"]] == ["no", "yes & more"]


def test_examples_without_image_or_text_have_no_contact_sheet() -> None:
    source = data.Arrays({"x": np.zeros((5, 3), np.float32), "label": np.zeros(5, np.int32)})
    with pytest.raises(InputError, match=r"no image or text to show \(their fields: x \[3\], label \[\]\)"):
        files.check_wanted(files.Wanted(mistakes=True), Classification(), source)


def test_a_source_that_knows_where_an_example_is_stored_names_it(tmp_path) -> None:
    class Stored(data.Arrays):
        def locate(self, index: int) -> str:
            return f"image{index}.png"

    source = data.Subset(Stored({"label": np.arange(9, dtype=np.int32)}), np.array([8, 2]))
    files.write_files(
        files.Wanted(csv=True), report_of([0, -1], [1, 1], [0.5, 0.25]), source, tmp_path, "t", None, {}
    )
    rows = rows_of(tmp_path / "examples.csv")
    assert [row["location"] for row in rows] == ["image8.png", "image2.png"]
    assert [row["label"] for row in rows] == ["0", ""] and rows[1]["id"] == "2"


def test_numbers_as_text() -> None:
    assert number_text("macro_f1", 0.5) == "50.00 %" and number_text("macro_auroc", 0.5) == "0.5000"
    counts = {"true_negatives": 4, "false_positives": 3, "false_negatives": 2, "true_positives": 1}
    assert (confusion_of(counts) == np.array([[4, 3], [2, 1]])).all()


def test_json_is_alone_on_stdout_where_data_are_downloaded_first(trained, monkeypatch, capsys) -> None:
    noted = []

    def ensure(experiment: Any, console: Any, note: Any = None) -> None:
        noted.append(note)

    monkeypatch.setattr(experiments, "ensure_prepared", ensure)
    assert result(trained, capsys)["examples"] > 0 and noted[0] is command_line.warn
