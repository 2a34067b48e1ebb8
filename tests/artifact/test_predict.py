"""``predict``: inputs of every kind, batches, lines, and one line for input that cannot work."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from artifact_cases import make_trained
from PIL import Image

from jaxtrain import InputError, artifact
from jaxtrain.artifact import bench, engines, examples, images, lines
from jaxtrain.artifact.manifest import InputSpec, Manifest
from jaxtrain.cli import predict
from jaxtrain.export import write


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("predict") / "model.jaxtrain"
    write.write("jaxtrain", path, make_trained(tiny.EXPERIMENT))
    return path


@pytest.fixture(scope="module")
def loaded(model: Path) -> artifact.Artifact:
    return artifact.load(model)


PIXELS = tiny.split(7, 3).fields["image"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images in two folders, whose names are not in the order in which they are written."""
    root = tmp_path / "images"
    (root / "b").mkdir(parents=True)
    for number in (6, 2, 0, 4, 1, 5, 3):
        place = root / "b" if number > 3 else root
        Image.fromarray(PIXELS[number, ..., 0]).save(place / f"{number}.png")
    (root / "notes.md").write_text("no image")
    return root


@pytest.fixture
def run(model: Path, capsys: Any) -> Any:
    def call(*args: Any, model: Path = model) -> tuple[int, str, str]:
        code = predict.main(["--model", str(model), *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_folder_gives_a_line_for_each_image_in_the_order_of_names(run, folder, loaded):
    code, out, err = run(folder, "--batch", "4")
    rows = [json.loads(line) for line in out.splitlines()]
    names = [f"{n}.png" for n in (0, 1, 2, 3)] + [f"b/{n}.png" for n in (4, 5, 6)]
    assert code == 0 and [row["id"] for row in rows] == [str(folder / name) for name in names]
    outputs = {name: np.asarray(array) for name, array in loaded(PIXELS).items()}
    assert [row["label"] for row in rows] == outputs["label"].tolist()
    np.testing.assert_allclose(
        [row["probability"] for row in rows], outputs["probability"].max(-1), rtol=1e-5, atol=1e-6
    )
    assert err == "1 files in folders are no images and no .npy arrays: skipped\n"


def test_csv_and_raw_outputs(run, folder, loaded):
    code, out, _ = run(folder / "0.png", folder / "b", "--raw", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and list(rows[0]) == ["id", "label", "logits", "probability"] and len(rows) == 4
    found = [json.loads(row["logits"]) for row in rows]
    np.testing.assert_allclose(
        found, np.asarray(loaded(PIXELS)["logits"])[[0, 4, 5, 6]], rtol=1e-5, atol=1e-6
    )


def test_arrays_are_one_example_or_many(run, tmp_path, loaded):
    np.save(tmp_path / "many.npy", np.asfortranarray(PIXELS))
    np.save(tmp_path / "one.npy", PIXELS[2])
    _, out, _ = run(tmp_path / "many.npy", tmp_path / "one.npy", "--batch", "3")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["id"] for row in rows[:2]] == [f"{tmp_path}/many.npy:0", f"{tmp_path}/many.npy:1"]
    assert rows[-1]["id"] == f"{tmp_path}/one.npy" and rows[-1]["label"] == rows[2]["label"]
    assert [row["label"] for row in rows[:7]] == np.asarray(loaded(PIXELS)["label"]).tolist()


def test_batches_have_one_shape_after_the_first_full_one_and_hold_no_more_than_asked():
    shapes, read = [], []

    def engine(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shapes.append(inputs["x"].shape)
        return {"y": inputs["x"] * 2}

    def rows() -> Any:
        for number in range(7):
            read.append(number)
            yield examples.Example(number, {"x": np.float32(number)})

    results = engines.predict(engine, rows(), 3)
    assert next(results).outputs["y"] == 0 and read == [0, 1, 2]
    rest = [(row.example.id, row.outputs["y"]) for row in results]
    assert rest == [(n, 2 * n) for n in range(1, 7)] and shapes == [(3,), (3,), (3,)]
    assert [len(list(engines.predict(engine, rows(), 32)))] == [7] and shapes[-1] == (7,)


def test_images_of_another_kind_and_size_are_converted(tmp_path):
    """Resizing and conversion are Pillow's, with the crop that evaluation makes (data.Images)."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    photo.convert("L").save(tmp_path / "grey.png")
    read = images.read_image
    exact = read(tmp_path / "photo.png", (20, 30), 3, None, False)
    np.testing.assert_array_equal(exact, photo)
    np.testing.assert_array_equal(read(tmp_path / "alpha.png", (20, 30), 3, None, False), photo)
    np.testing.assert_array_equal(
        read(tmp_path / "photo.png", (20, 30), 1, None, False)[..., 0], photo.convert("L")
    )
    grey = np.asarray(photo.convert("L").convert("RGB"))
    np.testing.assert_array_equal(read(tmp_path / "grey.png", (20, 30), 3, None, False), grey)
    expected = photo.resize((8, 8), Image.Resampling.BILINEAR, box=(0.0, 5.0, 20.0, 25.0))
    np.testing.assert_array_equal(read(tmp_path / "photo.png", (8, 8), 3, None, True), expected)
    expected = photo.resize((8, 8), Image.Resampling.BILINEAR, box=(5.0, 10.0, 15.0, 20.0))
    np.testing.assert_array_equal(read(tmp_path / "photo.png", (8, 8), 3, 0.5, True), expected)


def test_white_is_that_of_the_data():
    spec = InputSpec("uint8", ("batch", 1, 3, 1), white=16.0)
    pixels = np.array([0, 128, 255], np.uint8).reshape(1, 3, 1)
    assert images.scale_pixels(pixels, spec).ravel().tolist() == [0, 8, 16]
    floats = images.scale_pixels(pixels, InputSpec("float32", ("batch", 1, 3, 1), white=1.0))
    assert floats.dtype == np.float32 and floats.ravel().tolist() == [0, np.float32(128 / 255), 1]


def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, model):
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no image")
    header = b"BM", 54, 0, 0, 54, 40, 20_000, 20_000, 1, 24, 0, 0, 0, 0, 0, 0
    (tmp_path / "huge.bmp").write_bytes(struct.pack("<2sIHHIIiiHHIIiiII", *header))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\1\0")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(b"cposix\nmkdir\n(V" + str(tmp_path / "made").encode() + b"\ntR.")
    np.save(tmp_path / "floats.npy", np.zeros((2, 8, 8, 1)))
    np.savez(tmp_path / "archive.npz", PIXELS)
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "table.csv").write_text("image\n1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.onnx").write_text("no model")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "nowhere.png").symlink_to("away.png")
    cases = [
        ([], "give at least one INPUT"),
        (["absent.png"], "absent.png: there is no such file or folder"),
        ([tmp_path / "large.png"], "has 8 × 9 pixels, and the model takes 8 × 8: add --resize"),
        ([tmp_path / "text.png"], "cannot be decoded (it is none of BMP, GIF, JPEG, PNG, TIFF, WEBP)"),
        ([tmp_path / "huge.bmp"], "huge.bmp has more than 67,108,864 pixels, and is not decoded"),
        ([tmp_path / "cut.npy"], "is not an array that can be read"),
        ([tmp_path / "pickle.npy"], "is not an array that can be read"),
        ([tmp_path / "archive.npy"], "is not an array that can be read"),
        ([tmp_path / "objects.npy"], "is not an array that can be read"),
        (
            [tmp_path / "floats.npy"],
            "must be uint8 [batch, 8, 8, 1], or one example without the batch axis, and is",
        ),
        ([tmp_path / "table.csv"], "which a table cannot hold: give .npy"),
        ([tmp_path / "empty"], "has no image"),
        ([model], "give an image"),
        ([tmp_path / "pipe.png"], "pipe.png is not a file"),
        ([tmp_path / "nowhere.png"], "nowhere.png cannot be read (No such file or directory)"),
        (["-"], "stdin is text, and the model takes image: uint8 [batch, 8, 8, 1]"),
        (["x", "--batch", "0"], "--batch 0: give at least 1"),
        (["x", "--bench"], "leave out INPUT"),
        (["x", "--json"], "--json is for --bench"),
        (["x", "--engine", "onnxruntime"], "--engine onnxruntime needs an .onnx file"),
    ]
    for args, message in cases:
        code, out, err = run(*args)
        assert code == 2 and out == "" and message in err and err.count("\n") == 1, (args, err)
    assert not (tmp_path / "made").exists(), "a pickle was run"
    code, _, err = run("x", model=tmp_path / "text.png")
    assert code == 2 and "is not an artifact" in err and err.count("\n") == 1
    code, _, err = run("x", "--engine", "jax", model=tmp_path / "model.onnx")
    assert code == 2 and "--engine jax needs an artifact" in err
    monkeypatch.setattr(images, "MAX_PIXELS", 71)
    code, _, err = run(tmp_path / "large.png", "--resize")
    assert code == 2 and "has 8 × 9 pixels: at most 71 are decoded" in err


def test_examples_before_bad_input_are_written(run, folder):
    (folder / "b" / "5.png").write_text("no image")
    code, out, err = run(folder)
    assert code == 2 and "5.png cannot be decoded" in err
    assert [Path(json.loads(line)["id"]).stem for line in out.splitlines()] == ["0", "1", "2", "3", "4"]


def test_a_folder_that_cannot_be_read_is_not_skipped(run, folder, monkeypatch):
    walk = os.scandir

    def scandir(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return walk(path)

    monkeypatch.setattr(os, "scandir", scandir)
    code, _, err = run(folder)
    assert code == 2 and f"{folder / 'b'} cannot be read (Permission denied)" in err


def test_a_closed_stdin_matters_only_where_it_is_read(run, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert run(folder / "0.png")[0] == 0
    code, _, err = run("-")
    assert code == 2 and "-: stdin is closed" in err and err.count("\n") == 1


def test_nan_is_told_of_on_stderr(tmp_path, monkeypatch, capsys):
    class Model:
        manifest = manifest("regression", {"x": InputSpec("float32", ("batch",))})
        words = None

        def __call__(self, inputs: Any) -> Any:
            return {"value": np.where(inputs["x"] > 2, np.inf, inputs["x"])}

    monkeypatch.setattr(engines, "open_model", lambda path, engine: Model())
    (tmp_path / "a.csv").write_text("x\n1\nnan\n3\n")
    assert predict.main(["--model", "any", str(tmp_path / "a.csv"), "--format", "csv"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[2] == f"{tmp_path}/a.csv:1,nan"
    assert captured.err.splitlines() == [
        f"1 examples hold NaN or infinity, the first {tmp_path}/a.csv:1",
        f"2 predictions hold NaN or infinity, the first {tmp_path}/a.csv:1",
    ]


def manifest(task: str, inputs: dict[str, InputSpec], **more: Any) -> Manifest:
    empty: dict[str, Any] = {"metrics": {}, "config": {}, "versions": {}}
    fields = {"labels": None, "text": None, "sizes": {}, **empty, **more}
    return Manifest("example", 1, task, inputs, {}, platforms=("cpu",), **fields)


def test_tables_have_a_column_for_each_number(tmp_path):
    inputs = {"user": InputSpec("int32", ("batch",), 0, 9), "x": InputSpec("float32", ("batch", 2))}
    about = manifest("regression", inputs)
    (tmp_path / "a.csv").write_text("x.1,user,x.0,note\n0.5,3,-1e2,hello\n\n2,4,5,\n")
    rows = list(examples.Reader(about).read([str(tmp_path / "a.csv")], io.BytesIO()))
    assert [row.id for row in rows] == [f"{tmp_path}/a.csv:0", f"{tmp_path}/a.csv:1"]
    assert rows[0].inputs["user"] == 3 and rows[0].inputs["x"].tolist() == [-100, 0.5]
    assert rows[1].inputs["user"].dtype == np.int32 and rows[1].inputs["x"].dtype == np.float32
    for text, message in [
        ("user,x.0\n1,2\n", "column 'x.1' is missing"),
        ("user,x.0,x.1\n1.5,2,3\n", "row 2, column user: '1.5' is not a number for int32"),
        ("user,x.0,x.1\n1,2\n", "row 2: 2 cells for 3 columns"),
        ('user,x.0,x.1\n"1\n', "is not a csv file"),
        ("", "column 'user' is missing"),
        ("user;x.0;x.1\n1;2;3\n", "column 'user' is missing .* 'user;x.0;x.1'"),
        ("user,x.0,x.1\n1_0,2,3\n", "'1_0' is not a number for int32"),
        ("user,x.0,x.1\n1,2,٣\n", "is not a number for float32"),
        ("user,x.0,x.1\n1,2,1e39\n", "row 2, column x.1: '1e39' is not a number for float32"),
        ("user,x.0,x.1\n1,2,3\n12,2,3\n", "a.csv:1: user has values from 12 to 12: the model takes 0 to 9"),
    ]:
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            list(examples.Reader(about).read([str(tmp_path / "a.csv")], io.BytesIO()))


def test_a_table_may_hold_truth_values(tmp_path):
    about = manifest("regression", {"flag": InputSpec("bool", ("batch",))})
    (tmp_path / "a.csv").write_text("flag\n0\n1\nFalse\ntrue\n")
    rows = list(examples.Reader(about).read([str(tmp_path / "a.csv")], io.BytesIO()))
    assert [row.inputs["flag"].tolist() for row in rows] == [False, True, False, True]


def test_text_becomes_the_tokens_of_the_data_source():
    specs = {"tokens": InputSpec("int32", ("batch", 6)), "length": InputSpec("int32", ("batch",))}
    about = manifest("classification", specs, text={"tokens": "words"})
    rows = list(
        examples.Reader(about, b"the\ncat\n").read(["-"], io.BytesIO(b"The cat!\r\nan\n\nthe " + b"x" * 9))
    )
    assert [row.id for row in rows] == [0, 1, 2, 3]
    assert rows[0].inputs["tokens"].tolist() == [256, 257, 33, 0, 0, 0] and rows[0].inputs["length"] == 3
    assert rows[1].inputs["tokens"].tolist() == [97, 110, 0, 0, 0, 0] and rows[2].inputs["length"] == 0
    assert rows[3].inputs["tokens"].tolist() == [256, *b"xxxxx"]
    free = {"tokens": InputSpec("uint8", ("batch", "length"), 0, 127)}
    about = manifest("language_model", free, text={"tokens": "bytes"}, sizes={"length": 4})
    rows = list(examples.Reader(about).read(["-"], io.BytesIO(b"ab\nabcdef\n")))
    assert [row.inputs["tokens"].tobytes() for row in rows] == [b"ab", b"cdef"]
    rows = list(examples.Reader(about).read(["-"], io.BytesIO(codecs.BOM_UTF8 + b"ab\n")))
    assert [row.inputs["tokens"].tobytes() for row in rows] == [b"ab"]
    with pytest.raises(InputError, match="stdin is UTF-16: convert it to UTF-8"):
        list(examples.Reader(about).read(["-"], io.BytesIO("ab\n".encode("utf-16"))))
    with pytest.raises(InputError, match="stdin, line 1 is empty"):
        list(examples.Reader(about).read(["-"], io.BytesIO(b"\n")))
    with pytest.raises(InputError, match="line 1 is longer than"):
        list(examples.Reader(about).read(["-"], io.BytesIO(b"a" * (examples.MAX_LINE + 1))))


def summary(task: str, outputs: dict[str, Any], tokens: int | None = None, **more: Any) -> dict[str, Any]:
    arrays = {name: np.asarray(value) for name, value in outputs.items()}
    return lines.summarize(
        manifest(task, {}, **more), engines.Prediction(examples.Example(0, {}, tokens), arrays)
    )


def test_a_line_says_what_the_outputs_mean():
    both = {"logits": [1.0, 3.0], "probability": [0.25, 0.75], "label": 1}
    assert summary("classification", both, labels=("cat", "dog")) == {
        "id": 0,
        "label": "dog",
        "probability": 0.75,
    }
    assert summary("classification", both) == {"id": 0, "label": 1, "probability": 0.75}
    assert summary("binary", {"logits": 1.0, "probability": 0.75, "label": 1}) == {
        "id": 0,
        "label": 1,
        "probability": 0.75,
    }
    nan = float("nan")
    unknown = {"id": 0, "label": None, "probability": pytest.approx(nan, nan_ok=True)}
    assert summary("classification", {**both, "probability": [nan, nan]}, labels=("cat", "dog")) == unknown
    assert summary("binary", {"logits": nan, "probability": nan, "label": 0}) == unknown
    assert summary("segmentation", {"logits": [[[1.0]]], "probability": [[[1.0]]], "label": [[2]]}) == {
        "id": 0,
        "label": [[2]],
    }
    assert summary("regression", {"value": 2.5}) == {"id": 0, "value": 2.5}
    logits = np.zeros((3, 128), np.float32)
    logits[1, ord("e")] = np.log(127)
    text = {"tokens": "bytes"}
    found = summary("language_model", {"logits": logits}, 2, text=text)
    assert found.pop("probability") == pytest.approx(0.5) and found == {"id": 0, "next": 101, "text": "e"}


def test_bench_times_every_batch_size(loaded, run):
    rows = list(bench.measure(loaded, loaded.manifest, seconds=0.0, batches=(1, 2)))
    assert [row["batch"] for row in rows] == [1, 2] and all(row["calls"] == bench.MIN_CALLS for row in rows)
    assert all(0 < row["p50_ms"] <= row["p99_ms"] and row["examples_per_second"] > 0 for row in rows)
    inputs = bench.random_inputs(loaded.manifest, 3)["image"]
    assert inputs.shape == (3, 8, 8, 1) and inputs.dtype == np.uint8 and inputs.max() > 128


@pytest.mark.full("tests/artifact/test_predict.py::test_bench_times_every_batch_size")
def test_bench_prints_a_table_or_json(run, monkeypatch):
    monkeypatch.setattr(bench.measure, "__defaults__", (0.0, (1, 2)))
    code, out, _ = run("--bench", "--json")
    assert code == 0 and [row["batch"] for row in json.loads(out)["batches"]] == [1, 2]
    code, out, _ = run("--bench")
    assert code == 0 and out.splitlines()[1].split() == [
        "batch",
        "p50",
        "ms",
        "p99",
        "ms",
        "examples/s",
        "calls",
    ]
