"""Check a batch of inputs before a model gets it. Imports no JAX, which onnxruntime does not need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain.artifact.manifest import BATCH, InputSpec, Manifest
from jaxtrain.core.errors import InputError


def check_batch(manifest: Manifest, inputs: Any) -> dict[str, Any]:
    """Return a batch as arrays by name, after a check of names, dtypes, shapes and values.

    Raises:
      InputError: they are not those of the manifest; the message says what is expected.
    """
    specs = manifest.inputs
    if not isinstance(inputs, Mapping):
        if len(specs) != 1:
            raise InputError(f"{manifest.name} takes a dict of the arrays {', '.join(specs)}")
        inputs = {next(iter(specs)): inputs}
    batch = dict(inputs)
    for name, spec in specs.items():
        array = batch.get(name)
        if name in batch and not (hasattr(array, "shape") and hasattr(array, "dtype")):  # a list
            try:
                batch[name] = np.asarray(array)
            except ValueError as error:
                raise InputError(f"{name} must be {spec.text}, and is a list of unequal lists") from error
    check_shapes(manifest, batch)
    for name, spec in specs.items():
        check_values(name, spec, batch[name])
    return batch


def check_shapes(manifest: Manifest, batch: Mapping[str, Any]) -> None:
    """Check names, dtypes and shapes of a batch, of arrays or of their shapes.

    Raises:
      InputError: they are not those of the manifest.
    """
    if set(batch) != set(manifest.inputs):
        raise InputError(
            f"{manifest.name} takes {', '.join(manifest.inputs)}, and the batch has "
            f"{', '.join(map(str, batch)) or 'nothing'}"
        )
    sizes: dict[str, int] = {}
    for name, spec in manifest.inputs.items():
        array = batch[name]
        if array.dtype != spec.numpy_dtype or len(array.shape) != len(spec.shape):
            raise InputError(_expected(name, spec, array))
        for expected, size in zip(spec.shape, array.shape, strict=True):
            if isinstance(expected, str):
                largest = manifest.sizes.get(expected, size)
                if not 1 <= size <= largest or sizes.setdefault(expected, size) != size:
                    raise InputError(_expected(name, spec, array) + _limits(manifest, expected))
            elif expected != size:
                raise InputError(_expected(name, spec, array))


def _expected(name: str, spec: InputSpec, array: Any) -> str:
    return f"{name} must be {spec.text}, and is {array.dtype} {list(array.shape)}"


def _limits(manifest: Manifest, axis: str) -> str:
    if axis == BATCH:
        return ": at least one example, as many in every input"
    return f": {axis} is from 1 to {manifest.sizes[axis]}"


def check_values(name: str, spec: InputSpec, array: Any) -> None:
    """Check tokens and ids: the program would replace those out of range by others, silently.

    Raises:
      InputError: a value is out of the range of ``spec``.
    """
    if spec.minimum is None and spec.maximum is None:
        return
    lowest, highest = int(array.min()), int(array.max())
    if (spec.minimum is not None and lowest < spec.minimum) or (
        spec.maximum is not None and highest > spec.maximum
    ):
        raise InputError(
            f"{name} has values from {lowest} to {highest}: the model takes {spec.minimum} to {spec.maximum}"
        )
