"""Typed overrides (``--set path=value``), the config as text, its hash, and the first difference of two.

The frozen dataclasses and Linen modules are the config; every function here walks over their fields.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import operator
import os
import re
import typing
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxtrain.core import redact
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import did_you_mean, first_line
from jaxtrain.experiment.setting_values import is_parsable, parse, union_members

T = TypeVar("T")
_DATA = re.compile(r"(train|valid|test)(\.source)*\.(fields\..+|indices)=\S+\[.*\] crc32 [0-9a-f]{8}$")
LINEN_FIELDS = frozenset({"parent", "name"})


def config_text(value: Any, *, operational: bool = True) -> dict[str, str]:
    """Return every setting as text, by its path: ``{"optimizer": "SGD", "optimizer.momentum": "0.9", ...}``.

    Args:
      value: an experiment, or any part of one.
      operational: include the settings that never change what is computed.

    Secrets are replaced (``jaxtrain.core.redact``), and masked in everything this process prints afterwards.
    """
    return dict(_flatten("", value, operational))


def config_hash(experiment: Any) -> str:
    """Return eight hex digits that identify all settings that change the result, but seed and passwords."""
    lines = config_text(experiment, operational=False)
    text = "\n".join(f"{k} = {v}" for k, v in lines.items() if k != "seed")
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def first_difference(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Return ``(path, old value, new value)`` of the first setting that differs; None if all are equal."""
    for path in [*new, *old]:
        if old.get(path) != new.get(path):
            return path, old.get(path, "absent"), new.get(path, "absent")
    return None


def comparable_configs(recorded: Mapping[str, str], experiment: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Return a recorded ``config_text`` and the one of ``experiment``, without operational settings and data.

    The contents of arrays in a source are data, which ``data.identity`` compares.
    """
    now = config_text(experiment, operational=False)
    operational = config_text(experiment).keys() - now.keys()

    def decides(path: str) -> bool:
        parts = path.split(".")
        return not any(".".join(parts[:n]) in operational for n in range(1, len(parts) + 1))

    def without_data(texts: Mapping[str, str]) -> dict[str, str]:
        return {path: text for path, text in texts.items() if not _DATA.match(f"{path}={text}")}

    return without_data({path: text for path, text in recorded.items() if decides(path)}), without_data(now)


def override(experiment: T, settings: list[str]) -> T:
    """Return ``experiment`` with ``path=value`` settings applied, the last one of a path.

    The fields of one object are set together, so that only their new values must fit each other.

    Args:
      experiment: an experiment, or any frozen dataclass; it is not changed.
      settings: such as ``["batch=64", "model.widths=32,64"]``. A path is field names and tuple positions
        joined by dots. A value is parsed as the type of its field.

    Raises:
      InputError: an unknown path (with a suggestion) or a value of the wrong type.

    >>> from jaxtrain.optim import SGD
    >>> override(SGD(lr=0.1), ["lr=0.2", "nesterov=true", "clip=none"])
    SGD(lr=0.2, momentum=0.0, nesterov=True, weight_decay=0.0, decay='kernel|embedding', clip=None,
    groups=())
    """
    parsed = []
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator or not all(path.split(".")):
            raise InputError(f"--set {_shorten(setting)}: write path=value, such as optimizer.lr=0.1")
        parsed.append(_Setting(tuple(path.split(".")), text))
    changed: T = _replace(experiment, parsed, ())
    return changed


class _Setting(NamedTuple):
    """The rest of a path, from the object that it is applied to, and the text of the value."""

    path: tuple[str, ...]
    text: str


def _fields(value: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields that are settings: without ``parent`` and ``name``, which Linen adds."""
    linen = hasattr(value, "clone") and hasattr(value, "scope")
    return [f for f in dataclasses.fields(value) if f.init and not (linen and f.name in LINEN_FIELDS)]


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _flatten(path: str, value: Any, operational: bool, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield ``(path, text)`` of ``value`` and of everything inside it.

    ``name`` is the name of the enclosing field, by which secrets are recognised; items of a tuple share it.
    """
    prefix = f"{path}." if path else ""
    if _is_config(value):
        if path:
            yield path, type(value).__name__
        for field in _fields(value):
            unset = field.metadata.get("added") and getattr(value, field.name) == field.default
            if not unset and (operational or not field.metadata.get("operational")):
                yield from _flatten(prefix + field.name, getattr(value, field.name), operational, field.name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(f"{prefix}{key}", item, operational, f"{name}.{key}")
    elif isinstance(value, tuple | list) and not all(_is_number_or_text(v) for v in value):
        for number, item in enumerate(value):
            yield from _flatten(f"{prefix}{number}", item, operational, name)
    elif isinstance(value, functools.partial):
        yield path, _text(value.func)
        yield from _flatten(f"{prefix}args", value.args, operational, name)
        yield from _flatten(f"{prefix}keywords", value.keywords, operational, name)
    else:
        yield path, _redacted_text(name, value)


def _redacted_text(name: str, value: Any) -> str:
    """Return the text of a setting called ``name``; a placeholder if it is a secret."""
    values = value if isinstance(value, tuple | list | set) else [value]
    strings = [str(v) for v in values if _is_string(v)]
    if strings and redact.is_secret(name):
        return redact.placeholder(name, strings)
    return redact.redact_urls(_text(value))


def _is_string(value: Any) -> bool:
    return isinstance(value, str | bytes) and not isinstance(value, enum.Enum)


def _is_number_or_text(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | np.generic)


def _text(value: Any) -> str:  # noqa: PLR0911 - a table of types
    """Return text that is the same in every process: no addresses, and checksums for arrays."""
    if isinstance(value, np.generic):
        value = value.item()
    if hasattr(value, "__array__") and not isinstance(value, type):
        value = np.asarray(value)
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)} crc32 {zlib.crc32(value.tobytes()):08x}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # epochs=20 and epochs=20.0 are one setting
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _replace(value: Any, settings: Sequence[_Setting], parents: tuple[str, ...]) -> Any:
    """Return ``value`` with all of ``settings``.

    ``parents`` is the path from the experiment to ``value``, for messages.
    """
    if not settings:
        return value
    groups: dict[str, list[_Setting]] = {}
    for setting in settings:
        name = setting.path[0]
        if name not in (names := _child_names(value)):
            raise InputError(_unknown_path(".".join([*parents, name]), name, names, value))
        groups.setdefault(name, []).append(setting._replace(path=setting.path[1:]))
    if isinstance(value, tuple | list):
        return _replace_items(value, groups, parents)
    changes = {name: _replace_field(value, name, group, parents) for name, group in groups.items()}
    try:
        return dataclasses.replace(value, **changes)
    except InputError:
        raise
    except Exception as error:  # a class of the user's that checks its fields
        given = [f"{'.'.join([*parents, *one.path])}={one.text}" for one in settings]
        shown = _shorten(", ".join(map(redact.redact_setting, given)))
        raise InputError(f"{shown}: {type(error).__name__}: {first_line(error)}") from error


def _replace_field(value: Any, name: str, settings: Sequence[_Setting], parents: tuple[str, ...]) -> Any:
    """Return the new value of a field: parsed, or its object with the settings after that."""
    full_path, current = (*parents, name), getattr(value, name)
    inner: list[_Setting] = []
    for setting in settings:
        if setting.path:
            inner.append(setting)
        else:
            current, inner = (
                _parse(".".join(full_path), setting.text, _type_hint(type(value), name), current),
                [],
            )
    return _replace(current, inner, full_path)


def _replace_items(
    items: tuple[Any, ...] | list[Any], groups: Mapping[str, list[_Setting]], parents: tuple[str, ...]
) -> tuple[Any, ...]:
    """Return ``items`` with fields of some replaced: ``augment.0.p=0.25``."""
    tuple_path, changed = ".".join(parents), list(items)
    for number, settings in groups.items():
        item = items[int(number)]
        if not all(setting.path for setting in settings):
            if not _child_names(item):
                raise InputError(
                    f"{tuple_path}.{number} is one item of {_text(items)}: set all of them, as "
                    f"{tuple_path}=..."
                )
            raise InputError(f"{tuple_path}.{number} is {type(item).__name__}: set one of its fields")
        changed[int(number)] = _replace(item, settings, (*parents, number))
    return tuple(changed)


def _child_names(value: Any) -> list[str]:
    """Return the names that may follow ``value`` in a path: fields, or positions in a tuple."""
    if isinstance(value, tuple | list):
        return [str(n) for n in range(len(value))]
    return [f.name for f in _fields(value)] if _is_config(value) else []


def _unknown_path(full_path: str, name: str, names: list[str], value: Any) -> str:
    """Return the error message for a path that does not exist, with a suggestion."""
    if not names:
        parent = full_path.rpartition(".")[0]
        return f"{_shorten(full_path)} is unknown: {parent} is {_text(value)}, which has no fields"
    hint = did_you_mean(name, names, prefix=full_path[: len(full_path) - len(name)])
    return f"{_shorten(full_path)} is unknown: {hint}"


def _type_hint(cls: type, name: str) -> Any:
    """Return the annotation of a field; ``Any`` if it cannot be evaluated at run time."""
    try:
        return typing.get_type_hints(cls)[name]
    except (NameError, TypeError, KeyError):  # a name imported under TYPE_CHECKING, for example
        return Any


def _parse(path: str, text: str, hint: Any, current: Any) -> Any:
    """Return ``text`` as a value of type ``hint``; without a usable hint, of the current value's type."""
    if hint is Any and current is not None and not _is_config(current) and not callable(current):
        hint = _type_of(current)
    members = union_members(hint)
    if text == "()" and any(typing.get_origin(t) is tuple for t in members):
        return ()  # also for a tuple of stages, which text cannot make: augment=() switches them off
    parsable = [t for t in members if is_parsable(t)]
    if parsable == [type(None)] and text.lower() not in ("none", "null"):
        parsable = []
    if not parsable:
        names = _child_names(current)
        advice = f": set one of its fields ({', '.join(names)})" if names else ""
        raise InputError(f"{path} is {_text(current)} and cannot be set from text{advice}")
    try:
        return parse(text, functools.reduce(operator.or_, parsable))
    except ValueError as error:
        expected = " or ".join(_type_name(t) for t in parsable)
        setting, field = redact.redact_setting(f"{path}={text}"), path.rpartition(".")[2]
        raise InputError(
            f"{_shorten(setting)}: expected {expected}, such as {_redacted_text(field, current)}"
        ) from error


def _type_of(value: Any) -> Any:
    """Return the type that a field without annotation has: that of its value."""
    texts = isinstance(value, tuple) and value and all(isinstance(item, str) for item in value)
    return tuple[str, ...] if texts else type(value)


def _shorten(setting: str) -> str:
    """Return a setting as one line of a message."""
    line = " ".join(setting.split())
    return line if len(line) <= 100 else f"{line[:80]}... ({len(line)} characters)"


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(a) for a in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
