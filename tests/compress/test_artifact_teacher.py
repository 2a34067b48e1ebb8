"""A teacher from an artifact: the losses of its run, on any mesh, without its experiment's code."""

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
from artifact_cases import make_trained
from interrupt import interrupted
from jax.sharding import Mesh
from tiny import EXPERIMENT

import jaxtrain
from jaxtrain import checkpoint, data, losses, models, sharding
from jaxtrain.cli import export as export_command
from jaxtrain.compress import Distil
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import leaf_paths
from jaxtrain.experiment import Experiment
from jaxtrain.export import quantized, write
from jaxtrain.program import assemble
from jaxtrain.program.memory import abstract_args

WITNESS = (
    "tests/compress/test_artifact_teacher.py::"
    "test_the_teacher_gets_the_augmented_batch_and_prepares_it_itself"
)
MLP = models.MLP(widths=(24,), classes=4)
TAUGHT = dataclasses.replace(EXPERIMENT, model=MLP, post_update=())
FILE = """
import dataclasses
from tiny import EXPERIMENT as BASE
from jaxtrain import models
EXPERIMENT = dataclasses.replace(BASE, model=models.MLP(widths=(24,), classes=4), post_update=())
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with random weights, of an experiment that is defined nowhere."""
    path = tmp_path_factory.mktemp("artifact") / "model.jaxtrain"
    write.write("jaxtrain", path, make_trained(TAUGHT))
    return path


def student(teacher: Path | str, loss: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    settings = {"model": models.MLP(widths=(8,), classes=4), "post_update": ()}
    settings["loss"] = Distil(teacher=str(teacher), **(loss or {}))
    return dataclasses.replace(EXPERIMENT, **(settings | changes))


def train(experiment: Experiment, mesh: Mesh, updates: int = 4) -> tuple[Any, np.ndarray]:
    """Return the last state, and loss, distil_loss and grad_norm of each update."""
    program = assemble(experiment, mesh)
    state, found = program.init(), []
    for step in range(updates):
        state, metrics = program.train_step(state, program.train.batch(step), program.key)
        found.append([metrics[name].compute() for name in ("loss", "distil_loss", "grad_norm")])
    return state, np.array(found)


def test_the_teacher_gets_the_augmented_batch_and_prepares_it_itself(artifact: Path, mesh1: Mesh) -> None:
    """The student has another preprocessing, which the teacher's inputs do not see."""
    preprocess = (data.Normalise(mean=(0.5,), std=(0.2,)),)
    experiment = student(artifact, {"match": "mse"}, augment=(flip,), preprocess=preprocess)
    program = assemble(experiment, mesh1)
    state, raw = program.init(), flip(program.raw_batch(1), None)

    def outputs(model: Any, params: Any, stages: Any) -> Any:
        batch = data.compose(*stages)(raw, None)
        return models.as_model(model).apply(params, {}, batch, train=False, key=None)[0]

    trained = make_trained(TAUGHT)
    theirs = outputs(MLP, trained.state.params, EXPERIMENT.preprocess)
    ours = outputs(experiment.model, state.params, preprocess)
    _, metrics = program.train_step(state, program.train.batch(0), program.key)
    expected = float(jnp.mean((theirs - ours) ** 2))
    assert metrics["distil_loss"].compute() == pytest.approx(expected, rel=1e-5)


def flip(batch: Any, key: Any) -> Any:
    return {**batch, "image": batch["image"][:, ::-1]}


@pytest.mark.full(WITNESS)
def test_the_losses_are_those_of_the_run(mesh1: Mesh, tmp_path: Path, capsys: Any) -> None:
    """The teacher sees the augmented batch, prepared by its own preprocessing."""
    file = tmp_path / "teacher.py"
    file.write_text(FILE)
    fields: dict[str, Any] = {}
    exec(compile(FILE, str(file), "exec"), fields)
    run, path = tmp_path / "run", tmp_path / "model.jaxtrain"
    jaxtrain.fit(fields["EXPERIMENT"], folder=run, mesh=mesh1, name="teacher")
    words = ["--workdir", str(run), "--experiment", str(file), "--out", str(path)]
    assert export_command.main(words) == 0
    capsys.readouterr()
    _, want = train(student(run, {"teacher_experiment": str(file)}), mesh1)
    state, found = train(student(path), mesh1)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    saved = checkpoint.arrays(run)
    for name, array in state.extra["teacher"]["params"].items():
        np.testing.assert_array_equal(np.asarray(array), saved[name])


def test_what_does_not_fit_is_one_line(artifact: Path, mesh1: Mesh, tmp_path: Path) -> None:
    """No artifact, a damaged one, and one of other classes, shapes, dtypes or fields."""
    rng = np.random.default_rng(0)

    def arrays(name: str, size: int, dtype: Any = np.uint8) -> dict[str, Any]:
        image = rng.integers(0, 9, (40, size, size, 1)).astype(dtype)
        source = data.Arrays({name: image, "label": np.arange(40) % 4})
        return {"train": source, "test": source}

    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged.jaxtrain").write_bytes(content)
    (tmp_path / "cut.jaxtrain").write_bytes(content[:-100])
    (tmp_path / "model.onnx").write_bytes(b"\x08\x09jaxtrain" * 9)
    mlp = models.as_model(MLP)
    field = (
        lambda key, batch: mlp.init(key, {"image": batch["other"]}),
        lambda params, extra, batch, **mode: mlp.apply(params, extra, {"image": batch["other"]}, **mode),
    )
    cases: dict[str, tuple[Experiment, str]] = {
        "missing": (student(tmp_path / "no.jaxtrain"), "there is no such file"),
        "onnx": (student(tmp_path / "model.onnx"), "is not an artifact: give a file that python -m jaxtrain"),
        "damaged": (student(tmp_path / "damaged.jaxtrain"), "damaged|has changed since it was exported"),
        "cut": (student(tmp_path / "cut.jaxtrain"), "is damaged or cut off"),
        "experiment": (
            student(artifact, {"teacher_experiment": "x.py"}),
            "leave loss.teacher_experiment out",
        ),
        "classes": (
            student(artifact, model=models.MLP(widths=(8,), classes=5)),
            "the teacher has 4 classes and the student 5: give a teacher of the same classes",
        ),
        "shape": (
            student(artifact, **arrays("image", 4)),
            r"image must be uint8 \[batch, 8, 8, 1\], and is uint8 \[16, 4, 4, 1\] after augment",
        ),
        "dtype": (
            student(artifact, **arrays("image", 8, np.float32)),
            r"image must be uint8 \[batch, 8, 8, 1\], and is float32 \[16, 8, 8, 1\] after augment",
        ),
        "field": (
            student(artifact, model=field, augment=(), preprocess=(), **arrays("other", 8, np.float32)),
            "it takes image, and the data has no field image",
        ),
    }
    for name, (experiment, message) in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            assemble(experiment, mesh1)
        assert str(caught.value).startswith("loss.teacher=") or name == "experiment", name
        assert "\n" not in str(caught.value), name


@pytest.mark.full(WITNESS)
def test_a_mesh_gives_the_same(artifact: Path, mesh1: Mesh) -> None:
    """Its arrays are replicated arguments of the step; microbatches give the same losses too."""
    _, want = train(student(artifact), mesh1)
    for text in ("data=8", "fsdp=4,data=2", "model=2,data=4"):
        mesh = sharding.make_mesh(jax.devices(), sharding.parse_mesh(text, 8))
        state, found = train(student(artifact, accumulate=2), mesh)
        np.testing.assert_allclose(found, want, rtol=2e-5)
        for array in jax.tree.leaves(state.extra["teacher"]):
            assert array.sharding.is_fully_replicated and len(array.sharding.device_set) == 8
    program = assemble(student(artifact), mesh1)
    text = program.train_step.lower(*abstract_args(program)).as_text()  # type: ignore[attr-defined]
    constants = re.findall(r"constant dense<([^>]*)> : (tensor<[^>]*>)", text)
    assert "tensor<64x24xf32>" in text and max(len(values) for values, _ in constants) < 100


@pytest.mark.full(WITNESS)
def test_a_run_resumes_and_refuses_another_file(artifact: Path, mesh1: Mesh, tmp_path: Path) -> None:
    path = shutil.copy(artifact, tmp_path / "model.jaxtrain")
    experiment = student(path, steps_per_execution=2)
    straight = jaxtrain.fit(experiment, folder=tmp_path / "straight", mesh=mesh1)
    interrupted(experiment, tmp_path / "cut", mesh1, 5)
    record = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert record["teacher_checkpoint"].startswith("step 7, sha256 ")

    program = assemble(experiment, mesh1)
    other = make_trained(TAUGHT, name="another")
    write.write("jaxtrain", path, other, force=True)
    with pytest.raises(InputError, match="was replaced after the run started"):
        program.init()
    with pytest.raises(InputError, match="has changed since this run started"):
        jaxtrain.fit(experiment, folder=tmp_path / "cut", mesh=mesh1)
    shutil.copy(artifact, path)
    resumed = jaxtrain.fit(experiment, folder=tmp_path / "cut", mesh=mesh1)
    assert resumed["resumed_from"] > 0 and resumed["test"] == straight["test"]
    one, cut = checkpoint.arrays(tmp_path / "straight"), checkpoint.arrays(tmp_path / "cut")
    assert one.keys() == cut.keys() and not any("teacher" in name for name in one)
    for name, array in one.items():
        np.testing.assert_array_equal(array, cut[name])


@dataclasses.dataclass(frozen=True)
class Two:
    """Outputs by name: the logits of an MLP and their double."""

    mlp: Any = MLP

    def init(self, key: Any, batch: Any) -> Any:
        return models.as_model(self.mlp).init(key, batch)

    def apply(self, params: Any, extra: Any, batch: Any, **mode: Any) -> Any:
        outputs, extra = models.as_model(self.mlp).apply(params, extra, batch, **mode)
        return {"logits": outputs, "double": 2 * outputs}, extra


@pytest.mark.full(WITNESS)
@pytest.mark.parametrize("kind", ["int8", "binary", "regression", "several"])
def test_the_compared_outputs_are_the_artifacts(kind: str, mesh1: Mesh, tmp_path: Path) -> None:
    """int8, logits [batch, 1] of a binary task, values, and one output of several."""
    base = dataclasses.replace(TAUGHT, augment=())
    if kind in ("binary", "regression"):
        image = base.train.gather(np.arange(40))["image"]
        name, target = ("label", np.arange(40) % 2) if kind == "binary" else ("target", np.ones((40, 1)))
        source = data.Arrays({"image": image, name: target.astype(np.float32)})
        loss: Any = losses.BinaryCrossEntropy() if kind == "binary" else losses.MSE()
        model = models.MLP(widths=(24,), classes=1)
        base = dataclasses.replace(base, model=model, train=source, test=source, loss=loss)
    if kind == "several":
        pair = (Two().init, Two().apply)
        base = dataclasses.replace(base, model=pair, loss=losses.CrossEntropy(output="logits"))
    trained = make_trained(base)
    exported = quantized.quantize_trained(trained, 16) if kind == "int8" else trained
    write.write("jaxtrain", path := tmp_path / "m.jaxtrain", exported)
    program = assemble(dataclasses.replace(base, loss=Distil(base.loss, str(path), match="mse")), mesh1)
    state = program.init()
    batch = {**program.raw_batch(1)}
    want = models.as_model(base.model).apply(
        trained.state.params, {}, data.compose(*base.preprocess)(batch, None), train=False, key=None
    )[0]
    ours = models.as_model(base.model).apply(
        state.params, {}, data.compose(*base.preprocess)(batch, None), train=False, key=None
    )[0]
    if kind == "several":
        want, ours = want["logits"], ours["logits"]
    _, metrics = program.train_step(state, program.train.batch(0), program.key)
    expected = float(jnp.mean((want - ours) ** 2))
    tolerance = 0.1 if kind == "int8" else 1e-5
    assert metrics["distil_loss"].compute() == pytest.approx(expected, rel=tolerance)
    dtypes = {x.dtype.name for x in leaf_paths(program.abstract_state.extra["teacher"]).values()}
    assert ("int8" in dtypes) == (kind == "int8")
