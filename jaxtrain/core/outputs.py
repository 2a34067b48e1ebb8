"""Select one output of a model that returns several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtrain.core.errors import InputError


def select_output(outputs: Any, name: str | int | None, setting: str) -> Any:
    """Return the output called ``name``, or ``outputs`` itself where ``name`` is None.

    Args:
      outputs: an array, or several: a dict, a tuple, a list, a named tuple or a dataclass of outputs.
      name: a key, a field's name or a position; None for a model with one output.
      setting: what the user sets, such as ``"loss.output"``, for messages.

    Raises:
      InputError: there is no such output, it is several outputs itself, or there are several and ``name`` is
        None.

    >>> select_output({"logits": 1, "features": 2}, "logits", "loss.output")
    1
    >>> select_output((1, 2), 1, "loss.output")
    2
    """
    names = output_names(outputs)
    if name is None:
        if names is None:
            return outputs
        raise InputError(
            f"the model returns {len(names)} outputs ({_listed(names)}): name one of them, "
            f"{setting}={names[0] if names else 0!r}"
        )
    if names is None:
        raise InputError(f"{setting} is {name!r}, and the model returns one array: leave it out")
    by_position = isinstance(name, int) and isinstance(outputs, tuple | list)
    if name not in (range(-len(names), len(names)) if by_position else names):
        raise InputError(f"{setting} is {name!r}: the model's outputs are {_listed(names)}")
    found = outputs[name] if by_position or isinstance(outputs, Mapping) else getattr(outputs, str(name))
    inner = output_names(found)
    if inner is not None:
        raise InputError(
            f"{setting} is {name!r}, which is {len(inner)} outputs itself ({_listed(inner)}): let the model "
            "return them side by side"
        )
    return found


def output_names(outputs: Any) -> list[Any] | None:
    """Return the names or positions of several outputs; None for a single array.

    >>> output_names([1, 2]), output_names({"a": 1}), output_names(3.0)
    ([0, 1], ['a'], None)
    """
    if isinstance(outputs, Mapping):
        return list(outputs)
    if hasattr(outputs, "shape"):  # an array, or ChunkedLogits, which is a dataclass
        return None
    if isinstance(outputs, tuple | list):
        return list(getattr(outputs, "_fields", range(len(outputs))))
    if dataclasses.is_dataclass(outputs):
        return [field.name for field in dataclasses.fields(outputs)]
    return None


def _listed(names: list[Any]) -> str:
    return ", ".join(map(str, names)) or "none"
