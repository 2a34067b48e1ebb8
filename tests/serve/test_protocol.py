"""Open Inference Protocol: what a request may be, how numbers travel, and one line for all others."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_cases import IMAGE, manifest, numbers, request, texts

from jaxtrain.artifact.manifest import InputSpec
from jaxtrain.serve import protocol
from jaxtrain.serve.protocol import Refused


def parse(data: Any, about: Any = IMAGE) -> protocol.Request:
    return protocol.parse(json.dumps(data).encode(), about, max_batch=4)


def tensor(dtype: str, values: Any, shape: tuple[int, ...] = (1, 2)) -> np.ndarray:
    about = numbers(dtype).manifest
    one = {"name": "x", "shape": list(shape), "datatype": protocol.DATATYPES[dtype], "data": values}
    return np.asarray(parse({"inputs": [one]}, about).arrays["x"])


def test_flat_and_nested_data_are_the_same_array():
    expected = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    for data in (list(range(8)), expected.tolist()):
        found = parse({**request(data, (2, 2, 2, 1)), "id": "a"})
        np.testing.assert_array_equal(found.arrays["image"], expected)
        assert found.arrays["image"].dtype == np.uint8 and found.id == "a" and found.outputs is None


@pytest.mark.parametrize("dtype", ["uint8", "int64", "uint64", "bool"])
def test_integers_and_booleans_are_exact(dtype):
    limits = [False, True] if dtype == "bool" else [int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)]
    found = tensor(dtype, limits)
    assert found.dtype == dtype and found.ravel().tolist() == limits


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_null_is_nan_in_floats_and_numbers_are_rounded_to_the_datatype(dtype):
    found = tensor(dtype, [0.1, None])
    assert found.dtype.name == dtype and np.isnan(found[0, 1])
    np.testing.assert_array_equal(found[0, 0], np.float64(0.1).astype(found.dtype))


@pytest.mark.parametrize(
    ("dtype", "values", "message"),
    [
        ("uint8", [1, 256], "out of the range of UINT8"),
        ("uint8", [1, -1], "out of the range of UINT8"),
        ("uint8", [1, 10**30], "out of the range of UINT8"),
        ("uint8", [1, 1.0], "not UINT8"),
        ("uint8", [1, True], "not UINT8"),
        ("uint8", [1, None], "not UINT8"),
        ("bool", [True, 1], "not BOOL"),
        ("float32", [1, "2"], "not FP32"),
        ("float32", [1, {}], "not FP32"),
        ("float32", [1, 1e39], "out of the range of FP32"),
        ("float16", [1, 70000], "out of the range of FP16"),
        ("bfloat16", [1, 3.5e38], "out of the range of BF16"),
        ("float64", [1, 10**400], "out of the range of FP64"),
        ("float32", [[1], 2], "another size"),
        ("float32", [1, [2]], "not FP32"),
        ("float32", [[1, [2]]], "not FP32"),
        ("float32", [[[1, 2]]], "another size"),
        ("float32", [1, 2, 3], "another size"),
        ("float32", [], "another size"),
        ("float32", 1, "a list as data"),
    ],
)
def test_data_that_is_no_such_tensor_is_refused(dtype, values, message):
    with pytest.raises(Refused, match=message) as error:
        tensor(dtype, values)
    assert error.value.status == 400


def test_infinity_written_as_a_large_number_is_refused():
    about = numbers("float64").manifest
    body = b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP64", "data": [1, 1e999]}]}'
    with pytest.raises(Refused, match="out of the range of FP64"):
        protocol.parse(body, about, 4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b'{"a": -Infinity}', "Infinity is not a number"),
        (b'{"a": 1, "a": 2}', "the name 'a' appears twice"),
        (b"[1]", "must be a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not JSON"),
    ],
)
def test_json_is_read_strictly(body, message):
    with pytest.raises(Refused, match=message) as error:
        protocol.read_json(body)
    assert error.value.status == 400 and "\n" not in str(error.value) and len(str(error.value)) <= 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "must be a list with the model's inputs: image"),
        ({"inputs": 1}, "must be a list"),
        ({"inputs": [1]}, r"inputs\[0\] must be an object"),
        ({"inputs": [{}]}, "lacks data, datatype, name, shape"),
        ({"output": []}, "unknown field 'output'"),
        ({"id": 1}, "id must be a text"),
        ({"parameters": 1}, "parameters of the request must be an object"),
        ({"parameters": {"binary_data_output": True}}, "not supported"),
        ({"outputs": [{"name": "labels"}]}, "the model returns label, logits, probability"),
        ({"outputs": [{"name": "label"}] * 2}, "each once"),
        ({"outputs": {}}, "outputs must be a list"),
        (request([0] * 4, name="picture"), "takes each of image once"),
        (request([0] * 4, name=["image"]), "takes each of image once"),
        (request([0] * 4, datatype="FP32"), "has datatype UINT8, not 'FP32'"),
        (request([0] * 4, datatype="BYTES"), "has datatype UINT8, not 'BYTES'"),
        (request([0] * 4, datatype={}), "has datatype UINT8, not 'dict'"),
        (request([0] * 4, (1, 4)), r"has shape \[-1, 2, 2, 1\]"),
        (request([0] * 4, (1, 2, 1, 2)), r"has shape \[-1, 2, 2, 1\]"),
        (request([0] * 4, shape="1"), "must be a list of sizes"),
        (request([0] * 4, shape=[-1, 2, 2, 1]), "must be a list of sizes"),
        (request([0] * 4, shape=[True, 2, 2, 1]), "must be a list of sizes"),
        (request([], (0, 2, 2, 1)), "has no example"),
        (request([0] * 8), "another size"),
        (request([0] * 4, shared_memory_region="/dev/shm/x"), "unknown field 'shared_memory_region'"),
        (request([0] * 4, parameters={"shared_memory_region": "x"}), "not supported"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(change, message):
    with pytest.raises(Refused, match=message) as error:
        parse({**request([0] * 4), **change})
    assert error.value.status == 400


def test_too_many_examples_are_413():
    with pytest.raises(Refused, match="has 5 examples: at most 4 in one request") as error:
        parse(request([0] * 20, (5, 2, 2, 1)))
    assert error.value.status == 413


def test_values_are_checked_against_the_manifest_before_they_join_a_batch():
    one = {"name": "text", "shape": [1, 2], "datatype": "INT32", "data": [1, 256]}
    with pytest.raises(Refused, match="text has values from 1 to 256: the model takes 0 to 255"):
        parse({"inputs": [one]}, texts().manifest)
    long = {**one, "shape": [1, 101], "data": [1] * 101}
    with pytest.raises(Refused, match="length is from 1 to 100"):
        parse({"inputs": [long]}, texts().manifest)


def test_every_input_has_the_same_number_of_examples():
    spec = InputSpec("int32", ("batch",), 0, 9)
    about = manifest("regression", {"user": spec, "item": spec}, {"value": InputSpec("float32", ("batch",))})
    both = [
        {"name": "user", "shape": [2], "datatype": "INT32", "data": [1, 2]},
        {"name": "item", "shape": [1], "datatype": "INT32", "data": [3]},
    ]
    with pytest.raises(Refused, match="as many in every input"):
        parse({"inputs": both}, about)
    with pytest.raises(Refused, match="takes user, item, and the batch has user"):
        parse({"inputs": both[:1]}, about)


def test_texts_are_bytes():
    one = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["ab", "/etc/passwd"]}
    assert parse({"inputs": [one]}, texts().manifest).texts == ("ab", "/etc/passwd")
    with pytest.raises(Refused, match="not text"):
        parse({"inputs": [{**one, "data": ["ab", 1]}]}, texts().manifest)


def test_outputs_are_written_with_null_for_nan_and_only_those_asked_for():
    outputs = {
        "label": np.int32([1]),
        "logits": np.float32([[0.1, np.nan, -np.inf]]),
        "probability": np.float32([[1, 0, 0]]),
    }
    wanted = parse({**request([0] * 4), "id": "7", "outputs": [{"name": "logits"}, {"name": "label"}]})
    found = json.loads(protocol.response(IMAGE, "example", wanted, outputs))
    assert found == {
        "model_name": "example",
        "id": "7",
        "outputs": [
            {
                "name": "logits",
                "shape": [1, 3],
                "datatype": "FP32",
                "data": [float(np.float32(0.1)), None, None],
            },
            {"name": "label", "shape": [1], "datatype": "INT32", "data": [1]},
        ],
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("name", "shape", "datatype", "data", "parameters")


@given(
    JSON | st.dictionaries(st.sampled_from(("inputs", "id", "outputs")), JSON),
    st.dictionaries(st.sampled_from(FIELDS), JSON),
)
def test_any_json_is_an_array_or_refused(data, fields):
    [one] = request([0] * 4)["inputs"]
    for body in (data, {"inputs": [{**one, **fields}]}):
        try:
            found = parse(body)
        except Refused as error:
            assert error.status in (400, 413)
        else:
            assert found.arrays["image"].shape[1:] == (2, 2, 1)
