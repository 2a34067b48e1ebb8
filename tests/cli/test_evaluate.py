"""``python -m jaxtrain evaluate`` reports what the experiment says, and all of it is strict JSON."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk
from tiny import EXPERIMENT

from jaxtrain import __main__ as commands
from jaxtrain import metrics, run
from jaxtrain.program import check_fields

HEAD = """
import jax.numpy as jnp, numpy as np, optax
from jaxtrain import Experiment, data, losses, metrics, optim

rng = np.random.default_rng(0)
x = rng.normal(size=(60, 3)).astype(np.float32)
label = (x[:, 0] + 0.5 * rng.normal(size=60) > 0.3).astype(np.int32)

def linear(outputs, heads=lambda z: z):
    return (lambda key, batch: ({"w": 0.1 * jnp.ones((3, outputs))}, {}),
            lambda params, extra, batch, **mode: (heads(batch["x"] @ params["w"]), extra))

def experiment(model, loss, **fields):
    source = data.Arrays({"x": x, "label": label})
    return Experiment(model=model, train=source, test=source, loss=loss, optimizer=optim.SGD(lr=0.5),
                      batch=16, epochs=0.5, **fields)
"""
BINARY = """
def bce(outputs, batch):
    each = optax.sigmoid_binary_cross_entropy(outputs[:, 0], batch["label"].astype(jnp.float32))
    loss = metrics.Mean.of(each, batch.get("mask"))
    hit = (outputs[:, 0] > 0) == (batch["label"] > 0)
    return loss.total / loss.count, {"loss": loss, "accuracy": metrics.Mean.of(hit, batch.get("mask"))}

EXPERIMENT = experiment(linear(1), bce)
"""


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def strict(text: str) -> Any:
    """Parse JSON as a parser does that knows no NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def user_file(text: str) -> str:
    """Write an experiment; a file of another text has another name, since modules are loaded once."""
    path = Path(f"mine{zlib.crc32(text.encode())}.py")
    path.write_text(HEAD + text)
    return str(path)


def train(text: str, *words: str) -> int:
    return run.main(["--experiment", user_file(text), "--workdir", "r", "--devices", "1", *words])


def evaluate(capsys: Any, text: str, *words: str) -> str:
    capsys.readouterr()
    words = ("--workdir", "r", "--experiment", user_file(text), "--devices", "1", *words)
    assert commands.main(["evaluate", *words]) == 0
    return capsys.readouterr().out


def one_line(capsys: Any, code: int) -> str:
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    return error


@pytest.mark.full(
    "tests/cli/test_evaluate.py::test_tables_and_nan_among_the_metrics_are_stored_as_strict_json"
)
def test_nothing_is_guessed_for_a_loss_of_ones_own_and_a_report_may_be_named_later(capsys: Any) -> None:
    assert train(BINARY) == 0
    out = evaluate(capsys, BINARY)
    assert "the loss names no task" in out and "class" not in out.replace("Classification", "")
    own = strict(evaluate(capsys, BINARY, "--json"))
    assert set(own) == {"name", "step", "split", "examples", "loss", "accuracy"}
    reported = BINARY.replace("bce)\n", "bce, report=metrics.Binary())\n")
    out = evaluate(capsys, reported)
    assert "Binary" in out and "precision" in out and "by class" not in out
    found = strict(evaluate(capsys, reported, "--json"))
    counts = {name: found[f"{name}s"] for name in ("true_positive", "false_positive", "false_negative")}
    truth = np.repeat([1, 0, 1, 0], [*counts.values(), found["true_negatives"]])
    guess = np.repeat([1, 1, 0, 0], [*counts.values(), found["true_negatives"]])
    assert len(truth) == 60 and found["accuracy"] == sk.accuracy_score(truth, guess)
    assert found["f1"] == pytest.approx(sk.f1_score(truth, guess)) and "report_accuracy" not in found


SEVERAL = """
def loss(outputs, batch):
    return losses.CrossEntropy(output="main")(outputs, batch)

EXPERIMENT = experiment(linear(2, lambda z: {"main": z, "aux": -z}), loss, report=metrics.Classification())
"""


@pytest.mark.full(
    "tests/cli/test_evaluate.py::test_tables_and_nan_among_the_metrics_are_stored_as_strict_json"
)
def test_a_report_that_does_not_fit_is_refused_before_the_training(capsys: Any) -> None:
    error = one_line(capsys, train(SEVERAL))
    assert "the model returns 2 outputs (aux, main): name one of them, report.output='aux'" in error
    assert not Path("r").exists()
    error = one_line(capsys, train(SEVERAL.replace("Classification()", "Classification(output='logits')")))
    assert "report.output is 'logits': the model's outputs are aux, main" in error
    error = one_line(capsys, train(SEVERAL.replace("Classification()", "Classification")))
    assert "it must be a task report, such as metrics.Classification()" in error
    named = SEVERAL.replace("Classification()", "Classification(output='main')")
    assert train(named) == 0
    out = evaluate(capsys, named)
    assert "by class" in out and "averages over classes" in out
    found = strict(evaluate(capsys, named, "--json"))
    assert np.sum(found["confusion"]) == 60 and len(found["recall"]) == 2
    assert found["accuracy"] == pytest.approx(np.trace(found["confusion"]) / 60)


TABLES = """
def loss(outputs, batch):
    value, found = losses.CrossEntropy()(outputs, batch)
    matrix = metrics.ConfusionMatrix.of(outputs, batch["label"], batch.get("mask"))
    nothing = metrics.Mean.of(outputs.sum(-1), jnp.zeros(len(outputs), bool))
    return value, {**found, "matrix": matrix, "nothing": nothing}

EXPERIMENT = experiment(linear(2), loss, holdout=0.2, select="nothing", log_every=1)
"""


def test_tables_and_nan_among_the_metrics_are_stored_as_strict_json(capsys: Any) -> None:
    error = one_line(capsys, train(TABLES, "--set", "select=matrix"))
    assert "select=matrix is a table, not a number: select one of" in error and not Path("r").exists()
    assert train(TABLES) == 0
    out = capsys.readouterr().out
    assert "there is no best checkpoint: nothing was not finite in any evaluation on valid" in out
    assert out.count("written as null in metrics.jsonl") == 1
    assert "test.nothing is not finite: written as null in result.json" in out
    records = [strict(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert all("train/matrix" not in record for record in records)
    assert [r["train/nothing"] for r in records if "train/loss" in r] == [None] * len(
        [r for r in records if "train/loss" in r]
    )
    result = strict(Path("r/result.json").read_text())
    assert result["test"]["nothing"] is None and np.sum(result["tables"]["matrix"]) == 60
    assert "matrix" not in result["test"] and "best" not in result
    for manifest in Path("r/checkpoints").glob("*/manifest.json"):
        strict(manifest.read_text())
    assert train(TABLES) == 0  # reads the result of the finished run
    assert "nothing nan" in capsys.readouterr().out
    found = strict(evaluate(capsys, TABLES, "--json", "--split", "valid"))
    assert found["nothing"] is None and found["examples"] == 12
    assert found["accuracy"] == pytest.approx(np.trace(found["matrix"]) / 12)


def test_the_evaluated_loss_has_no_smoothing_and_select_uses_it(capsys: Any) -> None:
    text = (
        "EXPERIMENT = experiment(linear(2), losses.CrossEntropy(smoothing=0.3), select='-loss', holdout=0.2)"
    )
    assert train(text) == 0
    best = strict(Path("r/result.json").read_text())["best"]
    found = strict(evaluate(capsys, text, "--json", "--split", "valid"))
    assert found["loss"] == -best["valid"] < found["smoothed_loss"]


OWN = """
class Loss(losses.CrossEntropy):
    report = REPORT
    def __call__(self, outputs, batch):
        return losses.CrossEntropy()(outputs, batch)

EXPERIMENT = experiment(linear(2), Loss())
"""


def test_the_report_of_a_loss_is_checked_before_the_training_too(capsys: Any) -> None:
    error = one_line(capsys, train(OWN.replace("REPORT", "metrics.Classification(output='logits')")))
    assert "report.output is 'logits'" in error and not Path("r").exists()


def test_a_method_or_a_class_of_a_loss_is_no_report() -> None:
    def found(named: Any, **fields: Any) -> Any:
        loss: Any = lambda outputs, batch: None  # noqa: E731
        loss.report = named
        return check_fields.find_report(dataclasses.replace(EXPERIMENT, loss=loss, **fields))

    def own(outputs: Any, batch: Any) -> Any:
        return {}

    assert found(own) is own and found(metrics.Binary()) == metrics.Binary()
    assert found(Path("r").exists) is None and found(metrics.Binary) is None and found("text") is None
    assert found(own, report=metrics.Binary()) == metrics.Binary()


@pytest.mark.full("tests/program/test_check_contract.py")
def test_a_report_of_ones_own_that_counts_padding_is_refused(capsys: Any) -> None:
    """60 examples in batches of 16: the last batch has 4 padding rows."""
    report = """
def hits(outputs, batch):
    return {"hit": metrics.Mean.of((outputs[:, 0] > 0) == (batch["label"] > 0)MASK)}

EXPERIMENT = dataclasses.replace(EXPERIMENT, report=hits)
"""
    masked = BINARY + "import dataclasses\n" + report.replace("MASK", ', batch.get("mask")')
    assert train(masked) == 0
    assert strict(evaluate(capsys, masked, "--json"))["examples"] == 60
    file = user_file(BINARY + "import dataclasses\n" + report.replace("MASK", ""))
    code = commands.main(["evaluate", "--workdir", "r", "--experiment", file, "--devices", "1"])
    error = capsys.readouterr().err
    assert code == 2 and "depends on its padding rows" in error and "Traceback" not in error
