"""compress.Distil: the loss against NumPy, a teacher that is read, sharded, checked and never saved."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupt import interrupted
from jax.sharding import Mesh
from tiny import EXPERIMENT

import jaxtrain
from jaxtrain import checkpoint, data, losses, models, optim, sharding
from jaxtrain.checkpoint import CorruptCheckpointError
from jaxtrain.cli import evaluate as evaluate_command
from jaxtrain.compress import Distil, DistilOutputs, Prune
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.types import leaf_paths
from jaxtrain.experiment import Experiment
from jaxtrain.program import assemble
from jaxtrain.program.memory import abstract_args
from jaxtrain.sharding import rules

WIDTH = 48
FILE = f"""
import dataclasses
from tiny import EXPERIMENT as BASE
from jaxtrain import models
EXPERIMENT = dataclasses.replace(
    BASE, model=models.MLP(widths=({WIDTH},), classes=CLASSES), augment=(), post_update=())
"""


def softmax(x: np.ndarray) -> np.ndarray:
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def logits(*shape: int) -> DistilOutputs:
    rng = np.random.default_rng(0)
    return DistilOutputs(*(jnp.asarray(rng.normal(size=shape) * 3, jnp.float32) for _ in range(2)))


def test_the_loss_is_that_of_the_definition() -> None:
    """Hinton et al.: T² times the divergence of the softened distributions, over labels that count."""
    outputs, label = logits(6, 5, 4), np.arange(30).reshape(6, 5) % 4
    label[0] = label[3, 2] = -1
    mask = np.arange(6) != 5
    counts = (label != -1) & mask[:, None]
    inner = losses.CrossEntropy(ignore=-1)
    batch = {"label": jnp.asarray(label), "mask": jnp.asarray(mask)}
    loss, metrics = Distil(inner, temperature=3.0, alpha=0.3)(outputs, batch)
    student, teacher = (softmax(np.float64(one) / 3) for one in outputs)
    divergence = (teacher * np.log(teacher / student)).sum(-1)[counts].mean()
    hard = -np.log(np.take_along_axis(softmax(np.float64(outputs.student)), label[..., None] % 4, -1))
    hard = hard[..., 0][counts].mean()
    assert float(loss) == pytest.approx(0.7 * hard + 0.3 * 9 * divergence, rel=1e-5)
    assert metrics["loss"].compute() == pytest.approx(float(loss), rel=1e-6)
    assert metrics["loss"].count == counts.sum() == metrics["distil_loss"].count
    assert metrics["distil_loss"].compute() == pytest.approx(9 * divergence, rel=1e-5)
    assert metrics["hard_loss"].compute() == pytest.approx(hard, rel=1e-5) and "accuracy" in metrics


def test_regression_compares_the_outputs() -> None:
    outputs, target = logits(6, 2), np.ones((6, 2), np.float32)
    loss, _ = Distil(losses.MSE(), match="mse", alpha=0.25)(outputs, {"target": jnp.asarray(target)})
    student, teacher = (np.float64(one) for one in outputs)
    want = 0.75 * ((student - target) ** 2).mean() + 0.25 * ((student - teacher) ** 2).mean()
    assert float(loss) == pytest.approx(want, rel=1e-5)


CASES = {
    "temperature": ({"temperature": 0.0}, "temperature is 0.0: it must be above 0"),
    "alpha": ({"alpha": 1.5}, r"alpha is 1.5: it must be in \[0, 1\]"),
    "match": ({"match": "cosine"}, "must be one of kl, mse"),
    "kind": ({"loss": losses.MSE()}, "use match='mse'"),
}


@pytest.mark.parametrize("name", CASES)
def test_settings_are_checked(name: str) -> None:
    settings, message = CASES[name]
    with pytest.raises(InputError, match=message):
        Distil(**settings)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, mesh1: Mesh) -> Path:
    """The folder of a trained run, beside the file of its experiment."""
    return trained(tmp_path_factory.mktemp("teacher"), mesh1, 4, seed=0)


def trained(folder: Path, mesh: Mesh, classes: int, seed: int) -> Path:
    file = folder / "teacher.py"
    file.write_text(FILE.replace("CLASSES", str(classes)))
    fields: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), fields)
    jaxtrain.fit(fields["EXPERIMENT"], folder=folder / "run", mesh=mesh, name="teacher")
    return folder / "run"


def student(teacher: Path | str, loss: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    file = str(Path(teacher).parent / "teacher.py")
    distil = Distil(teacher=str(teacher), **({"teacher_experiment": file} | (loss or {})))
    settings: dict[str, Any] = {
        "model": models.MLP(widths=(8,), classes=4),
        "augment": (),
        "post_update": (),
        "loss": distil,
    }
    return dataclasses.replace(EXPERIMENT, **(settings | changes))


@pytest.mark.full("tests/compress/test_distil.py::test_the_loss_is_that_of_the_definition")
def test_the_teacher_is_an_argument_and_is_not_trained(teacher: Path, mesh1: Mesh) -> None:
    """No constant of the program has the shape of a teacher's array; its values decide the loss."""
    program = assemble(student(teacher), mesh1)
    state, saved = program.init(), checkpoint.arrays(teacher)
    for path, array in leaf_paths(state.extra["teacher"]).items():
        np.testing.assert_array_equal(np.asarray(array), saved[path])
    text = program.train_step.lower(*abstract_args(program)).as_text()  # type: ignore[attr-defined]
    constants = re.findall(r"constant dense<([^>]*)> : (tensor<[^>]*>)", text)
    assert f"tensor<64x{WIDTH}xf32>" in text and constants
    assert max(len(values) for values, _ in constants) < 100  # a splat, such as 0.0, or a few numbers
    batch, other = program.train.batch(0), program.init()
    changed = jax.tree.map(lambda x: x + x.ndim, other.extra["teacher"])
    _, others = program.train_step(other.replace(extra={"teacher": changed}), batch, program.key)
    after, metrics = program.train_step(state, batch, program.key)
    assert metrics["hard_loss"].compute() == others["hard_loss"].compute()
    assert metrics["distil_loss"].compute() != pytest.approx(others["distil_loss"].compute())
    for path, array in leaf_paths(after.extra["teacher"]).items():
        np.testing.assert_array_equal(np.asarray(array), saved[path])


@pytest.mark.full("tests/compress/test_distil.py::test_the_loss_is_that_of_the_definition")
def test_a_run_learns_resumes_and_is_evaluated(
    teacher: Path, mesh1: Mesh, tmp_path: Path, capsys: Any
) -> None:
    """The teacher is in no checkpoint; one that has changed is refused; evaluation needs none."""
    own = tmp_path / "copy"
    shutil.copytree(teacher, own / "run")
    shutil.copy(teacher.parent / "teacher.py", own)
    experiment = student(own / "run")
    straight = jaxtrain.fit(experiment, folder=tmp_path / "straight", mesh=mesh1)
    interrupted(experiment, tmp_path / "cut", mesh1, 5)
    record = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert record["teacher_checkpoint"].startswith("step 13, sha256 ")

    (manifest,) = (own / "run").glob("checkpoints/*/manifest.json")
    text = manifest.read_text()
    with checkpoint.open(own / "run") as saved:  # another checkpoint becomes the newest
        state = assemble(student(teacher), mesh1).init()
        saved.save(14, state.replace(params=state.extra["teacher"]["params"], extra={}))
    with pytest.raises(InputError, match=r"has changed since this run started \(step 13, .*; now step 14, "):
        jaxtrain.fit(experiment, folder=tmp_path / "cut", mesh=mesh1)
    shutil.rmtree(own / "run" / "checkpoints" / "000014")
    assert manifest.read_text() == text

    resumed = jaxtrain.fit(experiment, folder=tmp_path / "cut", mesh=mesh1)
    assert resumed["resumed_from"] == 5 and resumed["test"] == straight["test"]
    one, other = checkpoint.arrays(tmp_path / "straight"), checkpoint.arrays(tmp_path / "cut")
    assert one.keys() == other.keys() and not any("teacher" in path for path in one)
    for path, array in one.items():
        np.testing.assert_array_equal(array, other[path])

    shutil.rmtree(own / "run")  # evaluation does without
    file = tmp_path / "student.py"
    file.write_text(
        f"""
import dataclasses
from tiny import EXPERIMENT as BASE
from jaxtrain import models
from jaxtrain.compress import Distil
EXPERIMENT = dataclasses.replace(
    BASE, model=models.MLP(widths=(8,), classes=4), augment=(), post_update=(),
    loss=Distil(teacher={str(own / "run")!r}, teacher_experiment={str(own / "teacher.py")!r}))
"""
    )
    words = ["--workdir", str(tmp_path / "cut"), "--experiment", str(file), "--devices", "1", "--json"]
    assert evaluate_command.main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["accuracy"] == pytest.approx(straight["test"]["accuracy"]) and "distil_loss" not in found


def test_what_does_not_fit_is_one_line(teacher: Path, mesh1: Mesh, tmp_path: Path) -> None:
    """A teacher that is missing, is no run, or has other preprocessing, inputs, code or classes."""
    rng = np.random.default_rng(0)
    small = data.Arrays(
        {"image": rng.integers(0, 9, (40, 4, 4, 1)).astype(np.uint8), "label": np.arange(40) % 4}
    )
    other = tmp_path / "teacher.py"
    other.write_text((teacher.parent / "teacher.py").read_text().replace(str(WIDTH), "16"))
    cases: dict[str, tuple[Experiment, str]] = {
        "none": (
            student("", {"teacher_experiment": None}),
            "the loss has no teacher: --set loss.teacher=RUN",
        ),
        "missing": (student(tmp_path / "nowhere"), "nowhere holds no run"),
        "not a run": (student(tmp_path), "holds no run"),
        "no such step": (student(f"{teacher}:7"), "there is no step 7: give one of 13"),
        "not listed": (student(teacher, {"teacher_experiment": None}), "set loss.teacher_experiment=FILE"),
        "changed": (
            student(teacher, {"teacher_experiment": str(other)}),
            r"model.widths is .*48.* in its run",
        ),
        "classes": (
            student(teacher, model=models.MLP(widths=(8,), classes=5)),
            "the teacher has 4 classes and the student 5: give a teacher of the same classes",
        ),
        "preprocess": (
            student(teacher, preprocess=(data.Normalise(mean=(0.5,), std=(0.1,)), data.Normalise())),
            r"preprocess.0.mean is \(0\) in its run and \(0.5\) here, preprocess.0.std is \(1\) in its run "
            r"and \(0.1\) here, preprocess.1 is absent in its run and Normalise here: make them the same",
        ),
        "shape": (student(teacher, train=small, test=small), r"dense0/kernel is float32\[64, 48\] there"),
    }
    for name, (experiment, message) in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            assemble(experiment, mesh1)
        assert "\n" not in str(caught.value), name


@pytest.mark.full("tests/compress/test_distil.py::test_what_does_not_fit_is_one_line")
def test_a_damaged_teacher_is_one_line(teacher: Path, mesh1: Mesh, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "run")
    shutil.copy(teacher.parent / "teacher.py", tmp_path)
    program = assemble(student(tmp_path / "run"), mesh1)
    victim = max(
        (tmp_path / "run").glob("checkpoints/*/state/**/*"), key=lambda p: p.stat().st_size * p.is_file()
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="is damaged") as caught:
        program.init()
    assert "\n" not in str(caught.value)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"loss.teacher=.*config.json cannot be read"):
        assemble(student(tmp_path / "run"), mesh1)


@pytest.mark.full("tests/compress/test_distil.py::test_the_loss_is_that_of_the_definition")
@pytest.mark.parametrize("text", ["data=8", "fsdp=4,data=2", "model=2,data=4"])
def test_a_mesh_gives_the_same_and_shards_the_teacher(
    text: str, teacher: Path, mesh1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With microbatches, too: the teacher is split by its own rules, and the losses are the same."""
    monkeypatch.setattr(rules, "SMALLEST", 32)
    seen = []
    for mesh in (mesh1, sharding.make_mesh(jax.devices(), sharding.parse_mesh(text, 8))):
        program = assemble(student(teacher, accumulate=2), mesh)
        state, found = program.init(), []
        for step in range(5):
            state, metrics = program.train_step(state, program.train.batch(step), program.key)
            found.append([metrics[name].compute() for name in ("loss", "distil_loss", "grad_norm")])
        seen.append(found)
    np.testing.assert_allclose(seen[0], seen[1], rtol=2e-5)
    kernel = state.extra["teacher"]["params"]["dense0"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (text == "data=8")


@pytest.mark.full("tests/compress/test_prune.py::test_pruned_weights_stay_zero_after_every_update")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_distillation_and_pruning_compose(precision: str, teacher: Path, mesh1: Mesh, tmp_path: Path) -> None:
    """In half precision with an EMA: the teacher computes in it, and the result is pruned."""
    stages = (Prune(sparsity=0.5, start=0, end=0.5, rounds=2), optim.EMA(0.9))
    experiment = student(teacher, post_update=stages, precision=precision, epochs=2, holdout=40)
    result = jaxtrain.fit(experiment, folder=tmp_path / "run", mesh=mesh1)
    assert result["sparsity"]["total"] == 0.5 and result["best"]["valid"] > 0
    text = assemble(experiment, mesh1).train_step.lower(*abstract_args(assemble(experiment, mesh1))).as_text()
    assert f"tensor<64x{WIDTH}x{'bf16' if precision == 'bfloat16' else 'f16'}>" in text
