"""The experiment as text: overrides from it, a hash of it, and what differs between two of them.

The dataclasses and Linen modules are the config; everything here is a walk over their fields.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import json
import operator
import os
import types
import typing
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import pydantic

from jaxtrain.core import redact
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import did_you_mean

T = TypeVar("T")
LINEN_FIELDS = frozenset({"parent", "name"})


def config_text(value: Any, *, operational: bool = True) -> dict[str, str]:
    """Every setting by its path, as text: ``{"optimizer": "SGD", "optimizer.momentum": "0.9", ...}``.

    Args:
      value: an experiment, or any part of one.
      operational: also give the settings that never change what is computed.

    Secrets are left out (``jaxtrain.core.redact``), and masked in what this process prints from now on.
    """
    return dict(_walk("", value, operational))


def config_hash(experiment: Any) -> str:
    """Eight hex digits of everything that decides the result, except the seed and passwords."""
    lines = config_text(experiment, operational=False)
    text = "\n".join(f"{k} = {v}" for k, v in lines.items() if k != "seed")
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def first_difference(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, str, str] | None:
    """``(path, old value, new value)`` of the first setting that differs, None when none does."""
    for path in [*new, *old]:
        if old.get(path) != new.get(path):
            return path, old.get(path, "absent"), new.get(path, "absent")
    return None


def override(experiment: T, settings: list[str]) -> T:
    """``experiment`` with ``path=value`` settings applied, typed by the fields they name.

    Raises:
      InputError: an unknown path (with a suggestion) or a value of the wrong type.

    >>> from jaxtrain.optim import SGD
    >>> override(SGD(lr=0.1), ["lr=0.2", "nesterov=true", "clip=none"])
    SGD(lr=0.2, momentum=0.0, nesterov=True, weight_decay=0.0, decay='kernel|embedding', clip=None,
    groups=())
    """
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator or not path:
            raise InputError(f"--set {setting}: write path=value, such as optimizer.lr=0.1")
        experiment = _set(experiment, path.split("."), [], text)
    return experiment


def _fields(value: Any) -> list[dataclasses.Field[Any]]:
    linen = hasattr(value, "clone") and hasattr(value, "scope")
    return [f for f in dataclasses.fields(value) if f.init and not (linen and f.name in LINEN_FIELDS)]


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _walk(path: str, value: Any, operational: bool, name: str = "") -> Iterator[tuple[str, str]]:
    """``name`` is that of the field, which tells a secret; what a field holds many of has its name too."""
    below = f"{path}." if path else ""
    if _is_config(value):
        if path:
            yield path, type(value).__name__
        for field in _fields(value):
            if operational or not field.metadata.get("operational"):
                yield from _walk(below + field.name, getattr(value, field.name), operational, field.name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(f"{below}{key}", item, operational, f"{name}.{key}")
    elif isinstance(value, tuple | list) and not all(_is_number_or_text(v) for v in value):
        for number, item in enumerate(value):
            yield from _walk(f"{below}{number}", item, operational, name)
    elif isinstance(value, functools.partial):
        yield path, _leaf(value.func)
        yield from _walk(f"{below}args", value.args, operational, name)
        yield from _walk(f"{below}keywords", value.keywords, operational, name)
    else:
        yield path, _shown(name, value)


def _shown(name: str, value: Any) -> str:
    """The text of a setting called ``name``, or what stands for a secret."""
    texts = [str(v) for v in (value if isinstance(value, tuple | list | set) else [value]) if _is_text(v)]
    return (
        redact.placeholder(name, texts)
        if texts and redact.is_secret(name)
        else redact.redact_urls(_leaf(value))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes) and not isinstance(value, enum.Enum)


def _is_number_or_text(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | np.generic)


def _leaf(value: Any) -> str:  # noqa: PLR0911 - a table of types
    """Text that is the same in every process: no addresses, no values of large arrays."""
    if isinstance(value, np.generic):
        value = value.item()
    if hasattr(value, "__array__") and not isinstance(value, type):
        value = np.asarray(value)
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_leaf, value)))}}}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)} crc32 {zlib.crc32(value.tobytes()):08x}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_leaf, value))})"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # epochs=20 and epochs=20.0 are one setting
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _set(value: Any, path: list[str], done: list[str], text: str) -> Any:
    name, rest = path[0], path[1:]
    where = ".".join([*done, name])
    if isinstance(value, tuple | list) and name.isdigit() and int(name) < len(value):
        if not rest:
            if not _names(value[int(name)]):
                whole = ".".join(done)
                raise InputError(f"{where} is one item of {_leaf(value)}: set them all, as {whole}=...")
            raise InputError(f"{where} is {type(value[int(name)]).__name__}: set one of its fields")
        changed = _set(value[int(name)], rest, [*done, name], text)
        return (*value[: int(name)], changed, *value[int(name) + 1 :])
    names = _names(value)
    if name not in names:
        raise InputError(_unknown(where, name, names, value))
    current = getattr(value, name)
    if rest:
        changed = _set(current, rest, [*done, name], text)
    else:
        changed = _parse(where, text, _hint(type(value), name), current)
    return dataclasses.replace(value, **{name: changed})


def _names(value: Any) -> list[str]:
    if isinstance(value, tuple | list):
        return [str(n) for n in range(len(value))]
    return [f.name for f in _fields(value)] if _is_config(value) else []


def _unknown(where: str, name: str, names: list[str], value: Any) -> str:
    if not names:
        return f"{where} is unknown: {where.rpartition('.')[0]} is {_leaf(value)}, which has no fields"
    return f"{where} is unknown: {did_you_mean(name, names, prefix=where[: len(where) - len(name)])}"


def _hint(cls: type, name: str) -> Any:
    try:
        return typing.get_type_hints(cls)[name]
    except (
        NameError,
        TypeError,
        KeyError,
    ):  # a postponed annotation that only a type checker can see
        return Any


def _parse(where: str, text: str, hint: Any, current: Any) -> Any:
    """``text`` as the plain types within ``hint``; a field without a usable hint keeps its value's type."""
    if hint is Any and current is not None and not _is_config(current) and not callable(current):
        hint = type(current)
    if text == "()" and any(typing.get_origin(t) is tuple for t in _members(hint)):
        return ()  # also where the items are stages, which text cannot make: augment=() switches them off
    plain = [t for t in _members(hint) if _is_plain(t)]
    if plain == [type(None)] and text.lower() not in ("none", "null"):
        plain = []
    if not plain:
        inner = f": set one of its fields ({', '.join(_names(current))})" if _names(current) else ""
        raise InputError(f"{where} is {_leaf(current)} and cannot be set from text{inner}")
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(functools.reduce(operator.or_, plain))
    for candidate in _candidates(text):
        try:
            # JSON and strict: 0.5 is no int, "1" is no bool, and a list is a tuple.
            return adapter.validate_json(json.dumps(candidate), strict=True)
        except (pydantic.ValidationError, TypeError):
            continue
    expected = " or ".join(_type_name(t) for t in plain)
    given, name = redact.redact_setting(f"{where}={text}"), where.rpartition(".")[2]
    raise InputError(f"{given}: expected {expected}, such as {_shown(name, current)}")


def _members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(hint) for inner in _members(member)]
    return [hint]


def _is_plain(hint: Any) -> bool:
    """Can be written on a command line: numbers, strings, booleans, None, literals, tuples of them."""
    if typing.get_origin(hint) is typing.Literal:
        return True
    if typing.get_origin(hint) in (tuple, list):
        return all(a is Ellipsis or _is_plain(a) for a in typing.get_args(hint))
    return hint in (bool, int, float, str, type(None), tuple, list)


def _candidates(text: str) -> list[Any]:
    """What ``text`` may mean, likeliest first: a literal, a tuple of one, or the text itself."""
    words: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return [words[text.lower()], text]
    try:
        literal = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        split = [part.strip() for part in text.strip("()[]").split(",")]
        return [text, split]
    return [literal, [literal], text]


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(a) for a in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
