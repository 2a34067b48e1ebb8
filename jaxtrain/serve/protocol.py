"""The JSON of the Open Inference Protocol (KServe v2): requests to arrays, and arrays to responses.

https://github.com/kserve/open-inference-protocol, without the extensions for binary data and shared memory: a
request holds its numbers, and never a path or an address.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxtrain.artifact.batch import check_batch
from jaxtrain.artifact.manifest import BATCH, InputSpec, Manifest
from jaxtrain.core.errors import InputError

DATATYPES = {
    "bool": "BOOL",
    **{f"{kind}int{bits}": f"{kind.upper()}INT{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)},
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
}
"""The protocol's names of the dtypes; texts are ``BYTES``."""


class Refused(Exception):
    """A request that gets an error: the HTTP status, and one line for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for predictions.

    Attributes:
      id: given back with the response; None without one.
      arrays: the inputs by name, checked against the manifest; empty for ``texts``.
      texts: of a model of text, what to tokenize.
      outputs: the names of the outputs to return; None: all.
    """

    id: str | None
    arrays: Mapping[str, np.ndarray]
    texts: tuple[str, ...]
    outputs: tuple[str, ...] | None


def read_json(body: bytes) -> dict[str, Any]:
    """Read a JSON object, strictly: UTF-8, no name twice, no NaN, no nesting that exhausts the stack.

    >>> read_json(b'{"a": [1, 2]}')
    {'a': [1, 2]}
    >>> read_json(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
        ...
    jaxtrain.serve.protocol.Refused: the body is not JSON: the name 'a' appears twice
    """
    try:
        data = json.loads(body.decode(), parse_constant=_no_constant, object_pairs_hook=_unique)
    except RecursionError as error:
        raise Refused(400, "the body is not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        why = "a number has too many digits" if "set_int_max_str_digits" in str(error) else str(error)
        raise Refused(400, f"the body is not JSON: {why}"[:300]) from error
    if not isinstance(data, dict):
        raise Refused(400, "the body must be a JSON object")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON: write NaN in floats as null")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)[:40]!r} appears twice")
    return data


def parse(body: bytes, manifest: Manifest, max_batch: int) -> Request:
    """Read an inference request, and check names, datatypes, shapes and values against the manifest.

    Args:
      body: JSON.
      manifest: of the model.
      max_batch: the most examples of one request.

    Raises:
      Refused: 400 for a request that is wrong, 413 for one with too many examples.
    """
    data = _fields(read_json(body), "the request", {"inputs"}, {"id", "parameters", "outputs"})
    _no_binary(data)
    id, inputs, outputs = data.get("id"), data["inputs"], data.get("outputs")
    if id is not None and not (isinstance(id, str) and len(id) <= 200):
        raise Refused(400, "id must be a text of at most 200 characters")
    if not isinstance(inputs, list) or not 1 <= len(inputs) <= len(manifest.inputs):
        raise Refused(400, f"inputs must be a list with the model's inputs: {', '.join(manifest.inputs)}")
    tensors: dict[str, Any] = {}
    for number, one in enumerate(inputs):
        tensor = _fields(one, f"inputs[{number}]", {"name", "shape", "datatype", "data"}, {"parameters"})
        _no_binary(tensor)
        name = tensor["name"]
        if not isinstance(name, str) or name not in manifest.inputs or name in tensors:
            raise Refused(400, f"inputs[{number}]: the model takes each of {', '.join(manifest.inputs)} once")
        tensors[name] = _tensor(name, tensor, manifest, max_batch)
    texts = next((t for t in tensors.values() if isinstance(t, tuple)), ())
    arrays = {} if texts else tensors
    if texts and len(tensors) > 1:
        raise Refused(400, "give a model of text either BYTES or its arrays")
    if arrays:
        try:
            check_batch(manifest, arrays)
        except InputError as error:
            raise Refused(400, str(error)) from error
    return Request(id, arrays, texts, None if outputs is None else _output_names(outputs, manifest))


def _fields(data: Any, what: str, needed: set[str], allowed: set[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise Refused(400, f"{what} must be an object")
    if missing := needed - data.keys():
        raise Refused(400, f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := data.keys() - needed - allowed:
        raise Refused(400, f"{what} has the unknown field {min(unknown)[:40]!r}")
    if not isinstance(data.get("parameters", {}), dict):
        raise Refused(400, f"parameters of {what} must be an object")
    return data


def _no_binary(data: Mapping[str, Any]) -> None:
    for name in data.get("parameters", {}):
        if name.startswith(("binary_data", "shared_memory")):
            raise Refused(
                400, f"{name[:40]}: the extensions of binary data and shared memory are not supported"
            )


def _output_names(outputs: Any, manifest: Manifest) -> tuple[str, ...]:
    if not isinstance(outputs, list):
        raise Refused(400, "outputs must be a list")
    names = []
    for number, one in enumerate(outputs):
        output = _fields(one, f"outputs[{number}]", {"name"}, {"parameters"})
        _no_binary(output)
        names.append(output["name"])
    if not all(isinstance(n, str) and n in manifest.outputs for n in names) or len(set(names)) < len(names):
        raise Refused(400, f"outputs: the model returns {', '.join(manifest.outputs)}, each once")
    return tuple(names)


def _tensor(name: str, tensor: dict[str, Any], manifest: Manifest, max_batch: int) -> Any:
    """Return the array of an input, or a tuple of texts."""
    spec, shape, datatype = manifest.inputs[name], tensor["shape"], tensor["datatype"]
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise Refused(400, f"the shape of {name} must be a list of sizes")
    text = datatype == "BYTES" and manifest.text is not None and len(spec.shape) == 2
    if not text and datatype != DATATYPES[spec.dtype]:
        raise Refused(400, f"{name} has datatype {DATATYPES[spec.dtype]}, not {_short(datatype)}")
    wanted: tuple[int | str, ...] = (BATCH,) if text else spec.shape
    if len(shape) != len(wanted) or any(
        type(w) is int and w != n for w, n in zip(wanted, shape, strict=True)
    ):
        raise Refused(400, f"{name} has shape {_shape(wanted)}, -1 for any size, not {_short(shape)}")
    if not shape[0]:
        raise Refused(400, f"{name} has no example")
    if shape[0] > max_batch:
        raise Refused(413, f"{name} has {shape[0]} examples: at most {max_batch} in one request")
    values = _flatten(name, tensor["data"], shape)
    if text:
        if set(map(type, values)) != {str}:
            raise Refused(400, f"{name} has data that is not text")
        return tuple(values)
    return _array(name, values, spec).reshape(shape)


def _short(value: Any) -> str:
    return repr(value[:20] if isinstance(value, str | list) else type(value).__name__)


def _flatten(name: str, data: Any, shape: list[int]) -> list[Any]:
    """Return the elements of row-major data, flat or nested as the shape says."""
    size, level = math.prod(shape), [data]
    if not isinstance(data, list):
        raise Refused(400, f"{name} must have a list as data")
    if len(data) == size and not any(isinstance(item, list) for item in data[:1]):
        return data
    for length in shape:
        if not all(type(items) is list and len(items) == length for items in level):
            raise Refused(400, f"{name} has data of another size than its shape {shape}: {size} elements")
        level = list(itertools.chain.from_iterable(level))
    return level


def _array(name: str, values: list[Any], spec: InputSpec) -> np.ndarray:
    dtype, kinds = spec.numpy_dtype, set(map(type, values))
    if dtype.kind == "b":
        allowed: set[type] = {bool}
    elif dtype.kind in "iu":
        allowed = {int}
    else:
        allowed = {int, float, type(None)}
    if not kinds <= allowed:
        raise Refused(400, f"{name} has data that is not {DATATYPES[spec.dtype]}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if values and not limits.min <= min(values) <= max(values) <= limits.max:
            raise Refused(400, f"{name} has numbers out of the range of {DATATYPES[spec.dtype]}")
        return np.array(values, dtype)
    if dtype.kind == "b":
        return np.array(values, dtype)
    try:
        exact = np.array(values, np.float64)  # None becomes NaN
    except OverflowError as error:
        raise Refused(400, f"{name} has numbers out of the range of {DATATYPES[spec.dtype]}") from error
    with np.errstate(over="ignore"):
        array = exact.astype(dtype)
    if np.isinf(exact).any() or np.isinf(array).any():  # 1e999, or too large for the datatype
        raise Refused(400, f"{name} has numbers out of the range of {DATATYPES[spec.dtype]}")
    return array


def response(manifest: Manifest, name: str, request: Request, outputs: Mapping[str, np.ndarray]) -> bytes:
    """Return the response, as JSON, with the outputs that the request wants. NaN and infinity are null.

    Args:
      manifest: of the model.
      name: of the model in addresses.
      request: what is answered.
      outputs: by name, with a row for each example.
    """
    wanted = manifest.outputs if request.outputs is None else request.outputs
    tensors = [
        {
            "name": output,
            "shape": list(outputs[output].shape),
            "datatype": DATATYPES[manifest.outputs[output].dtype],
            "data": _numbers(outputs[output]),
        }
        for output in wanted
    ]
    return encode(
        {"model_name": name, **({} if request.id is None else {"id": request.id}), "outputs": tensors}
    )


def _numbers(array: np.ndarray) -> list[Any]:
    """Return the elements in row-major order; JSON has no NaN and no infinity, so they are None.

    >>> _numbers(np.float16([[1, np.nan], [np.inf, 0.5]]))
    [1.0, None, None, 0.5]
    """
    flat = array.ravel()
    if flat.dtype.kind in "biu":
        return list(flat.tolist())
    wide = flat.astype(np.float64)  # bfloat16 too
    finite = np.isfinite(wide)
    values: list[Any] = wide.tolist()
    return values if finite.all() else [v if ok else None for v, ok in zip(values, finite, strict=True)]


def describe_model(manifest: Manifest, name: str, platform: str, kind: str, max_batch: int) -> dict[str, Any]:
    """Return the model's metadata; ``parameters`` has what the protocol has no field for."""
    return {
        "name": name,
        "versions": [str(manifest.step)],
        "platform": platform,
        "inputs": _described(manifest.inputs.items()),
        "outputs": _described(manifest.outputs.items()),
        "parameters": {
            "task": manifest.task,
            "labels": None if manifest.labels is None else list(manifest.labels),
            "takes": kind,
            "max_batch_size": max_batch,
        },
    }


def _described(specs: Iterable[tuple[str, InputSpec]]) -> list[dict[str, Any]]:
    return [{"name": n, "datatype": DATATYPES[spec.dtype], "shape": _shape(spec.shape)} for n, spec in specs]


def _shape(shape: tuple[int | str, ...]) -> list[int]:
    return [n if isinstance(n, int) else -1 for n in shape]


def encode(data: Any) -> bytes:
    """Return ``data`` as JSON, in which every number is finite."""
    return json.dumps(data, allow_nan=False).encode()
