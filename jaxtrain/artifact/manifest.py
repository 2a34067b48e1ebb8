"""``manifest.json`` of an artifact: what the model takes and returns, and checksums of the other parts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain.artifact import parts, tensors
from jaxtrain.core.errors import InputError

FORMAT = "jaxtrain-artifact"
VERSION = 1
"""Raised when a reader of the previous version would misread the file. A reader takes all up to its own."""

BATCH = "batch"
"""The name of the first axis of every input and output: any number of examples."""

Shape = tuple[int | str, ...]
_NAMES = {dtype.name: dtype for dtype in tensors.DTYPES.values()}


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """An input or output of an artifact.

    Attributes:
      dtype: name of its dtype, such as ``uint8``.
      shape: of a batch; the first axis is ``"batch"``, and a name for a size that is free.
      minimum, maximum: the smallest and largest value that the model takes, of tokens and ids; None: any.
      white: of an image, the value of white (255 where pixels are 0..255, 16 for the digits).
      crop: of an image, the part of the shorter side that evaluation crops before it resizes; in (0, 1].

    >>> InputSpec("uint8", ("batch", 8, 8, 1)).text
    'uint8 [batch, 8, 8, 1]'
    """

    dtype: str
    shape: Shape
    minimum: int | None = None
    maximum: int | None = None
    white: float | None = None
    crop: float | None = None

    @property
    def text(self) -> str:
        """Dtype and shape, for messages."""
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype."""
        return _NAMES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an artifact is.

    Attributes:
      name: of the experiment.
      step: the update after which the checkpoint was saved.
      task: ``classification``, ``segmentation``, ``binary``, ``multi_label``, ``regression``,
        ``language_model`` or ``other``.
      inputs, outputs: by name.
      sizes: the largest size of each named axis other than ``batch``.
      platforms: where it runs: ``cpu``, ``cuda``.
      labels: names of the classes in label order; None where the data set has none.
      text: how a text becomes tokens: ``{"tokens": "bytes"}`` or ``"words"``; None for other data.
      metrics: the figures of the run's evaluation of this checkpoint.
      config: every setting of the experiment, as text.
      versions: of jaxtrain, JAX and the other packages that made the run and the file.
      parts: size and SHA-256 of each other part of the file.
    """

    name: str
    step: int
    task: str
    inputs: Mapping[str, InputSpec]
    outputs: Mapping[str, InputSpec]
    sizes: Mapping[str, int]
    platforms: tuple[str, ...]
    labels: tuple[str, ...] | None
    text: Mapping[str, Any] | None
    metrics: Mapping[str, Any]
    config: Mapping[str, str]
    versions: Mapping[str, str]
    parts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Return the manifest as JSON; the same manifest gives the same text."""
        body = {"format": FORMAT, "format_version": VERSION, **dataclasses.asdict(self)}
        for kind in ("inputs", "outputs"):
            body[kind] = {
                name: {key: value for key, value in spec.items() if value is not None}
                for name, spec in body[kind].items()
            }
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"

    def with_parts(self, contents: Mapping[str, bytes]) -> Manifest:
        """Return a copy with the sizes and checksums of these parts."""
        about = {name: {"bytes": len(data), "sha256": parts.sha256(data)} for name, data in contents.items()}
        return dataclasses.replace(self, parts=about)

    def check_parts(self, contents: Mapping[str, bytes], where: str) -> None:
        """Raise InputError unless ``contents`` are the parts that the manifest names, unchanged."""
        others = set(contents) - {parts.MANIFEST}
        if set(self.parts) != others:
            raise InputError(
                f"{where} is damaged: its manifest names the parts {', '.join(sorted(self.parts))}"
            )
        for name in sorted(others):
            if parts.sha256(contents[name]) != self.parts[name].get("sha256"):
                raise InputError(
                    f"{where}: its part {name} has changed since it was exported (its SHA-256 differs): "
                    "export it again, or copy it again"
                )


def parse(data: bytes | str, where: str) -> Manifest:
    """Read a manifest; every field that is used is checked.

    Raises:
      InputError: it is no manifest, or that of a newer format.
    """
    try:
        body = json.loads(data)
        if body["format"] != FORMAT or type(body["format_version"]) is not int:
            raise ValueError("another format")
        newer = body["format_version"] > VERSION
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{where} is not an artifact: its manifest cannot be read") from error
    if newer:
        raise InputError(
            f"{where} has format {body['format_version']}, and this jaxtrain reads up to {VERSION}: "
            "upgrade it"
        )
    try:
        return _parse(body)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{where} is damaged: its manifest has a wrong field ({error})") from error


def _parse(body: dict[str, Any]) -> Manifest:
    labels, text = body["labels"], body["text"]
    if text is not None and text["tokens"] not in ("bytes", "words"):
        raise ValueError("text")
    if not all(_is_size(size) for size in body["sizes"].values()):
        raise ValueError("sizes")
    return Manifest(
        name=_text(body["name"]),
        step=int(body["step"]),
        task=_text(body["task"]),
        inputs={_text(name): _spec(spec, body["sizes"]) for name, spec in body["inputs"].items()},
        outputs={_text(name): _spec(spec, body["sizes"]) for name, spec in body["outputs"].items()},
        sizes=dict(body["sizes"]),
        platforms=tuple(map(_text, body["platforms"])),
        labels=None if labels is None else tuple(map(_text, labels)),
        text=text,
        metrics=dict(body["metrics"]),
        config={_text(name): _text(value) for name, value in body["config"].items()},
        versions={_text(name): _text(value) for name, value in body["versions"].items()},
        parts={_text(name): dict(part) for name, part in body["parts"].items()},
    )


def _spec(spec: dict[str, Any], sizes: Mapping[str, int]) -> InputSpec:
    known = {field.name for field in dataclasses.fields(InputSpec)}
    one = InputSpec(**{**{k: v for k, v in spec.items() if k in known}, "shape": tuple(spec["shape"])})
    if one.dtype not in _NAMES or not one.shape or one.shape[0] != BATCH:
        raise ValueError(f"dtype or shape {one.text}")
    if not all(_is_size(n) or n in sizes for n in one.shape[1:]):
        raise ValueError(f"shape {one.text}")
    numbers = (one.minimum, one.maximum, one.white, one.crop)
    if not all(number is None or type(number) in (int, float) for number in numbers):
        raise ValueError("minimum, maximum, white or crop")
    return one


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**31


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value
