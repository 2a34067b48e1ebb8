"""Artifacts: what is written is what the model computes, and what is not an artifact is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from artifact_cases import RUNS_ALONE, make_trained
from conftest import ROOT

from jaxtrain import InputError, artifact
from jaxtrain.artifact import parts, program, tensors
from jaxtrain.artifact.manifest import InputSpec, parse
from jaxtrain.core.errors import RunError
from jaxtrain.core.types import Model
from jaxtrain.export import write
from jaxtrain.export.trained import Trained
from jaxtrain.step.factories import eval_state


@pytest.fixture(scope="module")
def trained() -> Trained:
    return make_trained(tiny.EXPERIMENT)


@pytest.fixture(scope="module")
def file(trained: Trained, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.jaxtrain"
    assert "largest difference" in write.write("jaxtrain", path, trained)
    return path


@pytest.fixture(scope="module")
def loaded(file: Path) -> artifact.Artifact:
    return artifact.load(file)


def reference(trained: Trained, image: np.ndarray) -> np.ndarray:
    """The probabilities by NumPy, from the logits of the Linen module with the averaged weights."""
    params, extra = eval_state(trained.state)
    variables = {"params": params, "batch_stats": extra["batch_stats"]}
    pixels = image.astype(np.float32) / np.float32(255)
    logits = np.asarray(trained.experiment.model.apply(variables, pixels, train=False), np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def test_outputs_are_those_of_the_model_with_the_averaged_weights_and_its_preprocessing(trained, loaded):
    image = tiny.split(5, 3).fields["image"]
    outputs = loaded(image)
    expected = reference(trained, image)
    np.testing.assert_allclose(outputs["probability"], expected, rtol=1e-4, atol=1e-6)
    assert outputs["label"].tolist() == expected.argmax(-1).tolist()
    assert not np.allclose(expected[0], expected[1], atol=1e-3), "the weights tell the examples apart"


def test_any_batch_size_runs_and_the_manifest_says_what_the_model_takes(loaded):
    image = tiny.split(5, 3).fields["image"]
    many, one = loaded(image)["logits"], loaded({"image": image[:1]})["logits"]
    np.testing.assert_allclose(many[:1], one, rtol=1e-5, atol=1e-6)
    manifest = loaded.manifest
    assert dict(manifest.inputs) == {"image": InputSpec("uint8", ("batch", 8, 8, 1), white=255.0)}
    assert manifest.outputs["logits"].text == "float32 [batch, 4]"
    assert (manifest.task, manifest.name, manifest.step) == ("classification", "example", 7)
    assert manifest.platforms == ("cpu", "cuda") and manifest.metrics == {"test": {"accuracy": 0.5}}
    assert {"jax", "jaxtrain"} <= set(manifest.versions) and manifest.config == {"batch": "8"}


def test_the_same_model_gives_the_same_bytes_which_name_no_source_file(trained, file, tmp_path):
    write.write("jaxtrain", tmp_path / "again", make_trained(tiny.EXPERIMENT))
    data = file.read_bytes()
    assert (tmp_path / "again").read_bytes() == data
    assert b".py" not in data and str(ROOT).encode() not in data


def test_it_runs_with_jax_alone_on_another_number_of_devices(file, loaded, python, tmp_path):
    image = tiny.split(5, 3).fields["image"]
    np.save(tmp_path / "in.npy", image)
    done = python("-c", RUNS_ALONE, file, tmp_path / "in.npy", tmp_path / "out.npy", devices=3)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), loaded(image)["logits"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((2, 8, 8, 1)), "image must be uint8 [batch, 8, 8, 1], and is float64 [2, 8, 8, 1]"),
        (np.zeros((8, 8, 1), np.uint8), "image must be uint8 [batch, 8, 8, 1], and is uint8 [8, 8, 1]"),
        (np.zeros((2, 8, 9, 1), np.uint8), "is uint8 [2, 8, 9, 1]"),
        (np.zeros((0, 8, 8, 1), np.uint8), "at least one example"),
        ({"picture": 0}, "example takes image, and the batch has picture"),
        ({}, "the batch has nothing"),
        ([[1], [1, 2]], "is a list of unequal lists"),
    ],
)
def test_a_wrong_input_says_what_is_expected(inputs, message, loaded):
    with pytest.raises(InputError) as error:
        loaded(inputs)
    assert message in str(error.value) and "\n" not in str(error.value)


def rewrite(file: Path, target: Path, **changes: bytes) -> Path:
    """Write the parts of ``file`` again, some changed; the zip file itself is right."""
    contents = {
        **parts.read(file),
        **{name.replace("_json", ".json"): data for name, data in changes.items()},
    }
    target.unlink(missing_ok=True)
    parts.write(target, contents)
    return target


def test_a_changed_part_is_refused_before_it_is_read(file, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "load_program", lambda *_: pytest.fail("the program was read"))
    monkeypatch.setattr(tensors, "decode", lambda *_: pytest.fail("the weights were read"))
    contents = parts.read(file)
    for name in (parts.PROGRAM, parts.WEIGHTS):
        flipped = bytearray(contents[name])
        flipped[100] ^= 1
        for changed in (contents[name][:-5], bytes(flipped)):
            path = rewrite(file, tmp_path / "changed", **{name: changed})
            with pytest.raises(InputError, match=f"{name} has changed since it was exported"):
                artifact.load(path)


def test_every_cut_and_any_changed_byte_is_an_input_error_or_harmless(file, tmp_path):
    """zipfile's own fields of a part, such as its time, may change; what is computed may not."""
    data = file.read_bytes()
    path, rng = tmp_path / "damaged", np.random.default_rng(0)
    for length in [0, 1, 21, 22, 100, *rng.integers(100, len(data) - 1, 20).tolist(), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            artifact.load(path)
    places = [*range(60), *range(len(data) - 300, len(data)), *rng.integers(0, len(data), 60).tolist()]
    refused = 0
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            contents = parts.read(path)
            parse(contents[parts.MANIFEST], "it").check_parts(contents, "it")
            assert contents == parts.read(file)
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > len(places) / 2


def zip_of(path: Path, *entries: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_other_zip_files_are_refused_before_their_parts_are_read(tmp_path, monkeypatch):
    needed = [(parts.PROGRAM, b"p"), (parts.WEIGHTS, b"w")]
    manifest = (parts.MANIFEST, b"{}")
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("a part was read"))
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 70_000, 70_000, 100, 0)
    locator, end = (
        struct.pack("<4sIQI", b"PK\6\7", 0, 4, 1),
        struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, 9, 0, 0),
    )
    (tmp_path / "large").write_bytes(b"PK\3\4" + end64 + locator + end)
    cases = {
        "a part '../evil'": zip_of(tmp_path / "1", manifest, *needed, ("../evil", b"x")),
        "a part 'manifest.json'": zip_of(tmp_path / "2", manifest, manifest, *needed),
        "has no weights.safetensors": zip_of(tmp_path / "3", manifest, needed[0]),
        "compressed or encrypted": zip_of(
            tmp_path / "4",
            manifest,
            (parts.PROGRAM, b"0" * 10**6),
            needed[1],
            compression=zipfile.ZIP_DEFLATED,
        ),
        "has 5000 parts": zip_of(tmp_path / "5", *((str(n), b"") for n in range(5000))),
        "has 70000 parts": tmp_path / "large",
        "is not an artifact": zip_of(tmp_path / "7"),
    }
    for message, path in cases.items():
        with pytest.raises(InputError, match=message):
            parts.read(path)
    with pytest.raises(InputError, match="no such file"):
        parts.read(tmp_path / "absent")
    (tmp_path / "text").write_text("no zip file, but longer than the end of one")
    with pytest.raises(InputError, match="is not an artifact"):
        parts.read(tmp_path / "text")


def test_a_part_that_says_it_is_larger_than_the_file_is_refused(file, tmp_path):
    data = bytearray(file.read_bytes())
    place = data.rindex(b"PK\1\2")  # the last part of the directory
    for offset in (20, 24):
        data[place + offset : place + offset + 4] = struct.pack("<I", 2**31)
    (tmp_path / "large").write_bytes(data)
    with pytest.raises(InputError, match="limit"):
        parts.read(tmp_path / "large")


def test_a_newer_format_and_a_wrong_manifest_are_refused(file, tmp_path):
    body = json.loads(parts.read(file)[parts.MANIFEST])
    for changes, message in [
        ({"format_version": 2}, "has format 2, and this jaxtrain reads up to 1: upgrade it"),
        ({"format": "other"}, "is not an artifact"),
        ({"inputs": {"image": {"dtype": "object", "shape": ["batch"]}}}, "wrong field"),
        ({"inputs": {"image": {"dtype": "uint8", "shape": [8, 8, 1]}}}, "wrong field"),
        ({"inputs": {"other": {"dtype": "uint8", "shape": ["batch", 8, 8, 1]}}}, "do not fit together"),
        ({"inputs": {"image": {"dtype": "int8", "shape": ["batch", 8, 8, 1]}}}, "do not fit together"),
        ({"inputs": {"image": {"dtype": "uint8", "shape": ["batch", 8, 9, 1]}}}, "do not fit together"),
        ({"labels": [1]}, "wrong field"),
        ({"step": float("inf")}, "wrong field"),
        ({"parts": {}}, "its manifest names the parts"),
    ]:
        path = rewrite(file, tmp_path / "other", manifest_json=json.dumps({**body, **changes}).encode())
        with pytest.raises(InputError, match=message.replace("(", "\\(")):
            artifact.load(path)


def test_weights_of_another_model_are_refused(file, tmp_path):
    contents = parts.read(file)
    arrays = tensors.decode(contents[parts.WEIGHTS], "it")
    first = next(iter(arrays))
    contents[parts.WEIGHTS] = tensors.encode({**arrays, first: arrays[first].astype(np.float64)})
    body = json.loads(contents.pop(parts.MANIFEST))
    body["parts"][parts.WEIGHTS]["sha256"] = parts.sha256(contents[parts.WEIGHTS])
    path = tmp_path / "other"
    parts.write(path, {parts.MANIFEST: json.dumps(body).encode(), **contents})
    with pytest.raises(InputError, match="do not fit together"):
        artifact.load(path)


def test_calls_of_code_outside_are_refused_on_export_and_on_load():
    spec = jax.ShapeDtypeStruct((2,), jnp.float32)

    def apply(weights: Any, inputs: Any) -> Any:
        return {"y": jax.ffi.ffi_call("start_a_shell", spec)(inputs["x"])}

    checks = [jax.export.DisabledSafetyCheck.custom_call("start_a_shell")]
    exported = jax.export.export(jax.jit(apply), platforms=("cpu",), disabled_checks=checks)({}, {"x": spec})
    with pytest.raises(InputError, match="calls start_a_shell, code outside its program"):
        program.serialize(exported)
    with pytest.raises(InputError, match="calls start_a_shell, code outside its program"):
        program.load_program(bytes(exported.serialize()), "it")
    text = exported.mlir_module().replace("@start_a_shell", '@"a shell"')
    assert "a shell" in program.outside_calls(text)
    general = '%1 = "stablehlo.custom_call"(%0) <{call_target_name = "evil"}> : (tensor<i32>) -> tensor<i32>'
    assert program.outside_calls(general) == {"evil"}
    assert program.outside_calls('"stablehlo.custom_call"(%0)') == {"an unnamed target"}


def test_a_model_that_calls_python_cannot_be_exported():
    def apply(params: Any, extra: Any, batch: Any, **mode: Any) -> Any:
        shape = jax.ShapeDtypeStruct((*batch["image"].shape[:1], 4), jnp.float32)
        return jax.pure_callback(lambda x: np.zeros(shape.shape, np.float32), shape, batch["image"]), extra

    model = Model(lambda key, batch: ({"w": jnp.zeros(())}, {}), apply)
    experiment = dataclasses.replace(tiny.EXPERIMENT, model=model, post_update=())
    with pytest.raises(InputError, match="cannot be exported"):
        make_trained(experiment)


def test_nothing_is_written_where_the_outputs_differ_or_a_file_exists(trained, file, tmp_path, monkeypatch):
    before = file.read_bytes()
    with pytest.raises(InputError, match="exists: add --force"):
        write.write("jaxtrain", file, trained)
    with pytest.raises(InputError, match="does not exist: make it first"):
        write.write("jaxtrain", tmp_path / "no" / "model", trained)
    real = tensors.decode

    def wrong(data: bytes, where: str) -> Any:
        return {name: array * np.float32(1.1) for name, array in real(data, where).items()}

    monkeypatch.setattr(tensors, "decode", wrong)
    with pytest.raises(RunError, match="gives other outputs than the model"):
        write.write("jaxtrain", tmp_path / "model", trained)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError, match="gives other outputs"):
        write.write("jaxtrain", file, trained, force=True)
    assert file.read_bytes() == before


@pytest.mark.full(
    "tests/artifact/test_artifact.py::test_outputs_are_those_of_the_model_with_the_averaged_weights_and_its_preprocessing"
)
def test_a_class_that_the_model_masks_out_is_compared_and_nan_is_not_exported(tmp_path):
    class Masked(nn.Module):
        never: float

        @nn.compact
        def __call__(self, image: jax.Array) -> jax.Array:
            logits = nn.Dense(3)(image.reshape(image.shape[0], -1).astype(jnp.float32))
            return jnp.where(jnp.arange(3) == 2, self.never, logits)

    trained = make_trained(dataclasses.replace(tiny.EXPERIMENT, model=Masked(-np.inf)))
    write.write("jaxtrain", tmp_path / "masked", trained)
    logits = artifact.load(tmp_path / "masked")(trained.examples["image"])["logits"]
    assert np.isneginf(np.asarray(logits)[:, 2]).all()
    trained = make_trained(dataclasses.replace(tiny.EXPERIMENT, model=Masked(np.nan)))
    with pytest.raises(
        RunError, match="output logits is NaN on test examples: export another with --weights"
    ):
        write.write("jaxtrain", tmp_path / "nan", trained)


def test_an_output_without_a_row_for_each_example_is_refused_in_every_format():
    class Scale(nn.Module):
        @nn.compact
        def __call__(self, image: jax.Array) -> Any:
            return {"mean": image.astype(jnp.float32).mean()}

    def loss(outputs: Any, batch: Any) -> Any:
        return outputs["mean"], {}

    with pytest.raises(InputError, match=r"output mean has shape \[\]: it needs a row for each example"):
        make_trained(dataclasses.replace(tiny.EXPERIMENT, model=Scale(), loss=loss))


def test_a_pipe_or_device_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a device or a pipe"):
        parts.check_new(tmp_path / "pipe", force=True)


@pytest.mark.full(
    "tests/artifact/test_artifact.py::test_outputs_are_those_of_the_model_with_the_averaged_weights_and_its_preprocessing"
)
def test_export_uses_no_cudnn_attention_whatever_the_model_says():
    from jaxtrain.models.attention import attend
    from jaxtrain.models.plain_operators import plain_operators

    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(InputError, match="cuDNN refuses"):
        attend(q, q, q, causal=True, attention="cudnn")
    with plain_operators():
        assert attend(q, q, q, causal=True, attention="cudnn").shape == q.shape


GOLDEN = ROOT / "tests" / "golden" / "artifacts"


def test_the_committed_artifact_of_format_1_loads_and_gives_its_recorded_outputs():
    """One that an earlier version wrote (tests/artifact/make_format_1.py) must load in every later one."""
    path = GOLDEN / "format1.jaxtrain"
    assert path.stat().st_size < 50_000
    recorded = json.loads((GOLDEN / "format1.json").read_text())
    model = artifact.load(path)
    outputs = model(np.array(recorded["image"], np.uint8))
    np.testing.assert_allclose(outputs["probability"], recorded["probability"], rtol=1e-4, atol=1e-6)
    assert outputs["label"].tolist() == recorded["label"]
    assert model.manifest.labels is None and model.manifest.step == 7
