"""A run's ``config.json``: read it, and combine the record of its first start with what a later one finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import InputError, RunError

CONDITIONS = ("code", "devices", "mesh", "bits", "versions", "git")
"""Entries of ``config.json`` that are not settings: those of the first start stay."""
WRITTEN = ("config", "init_from", "init_checkpoint", "code", "data", "accepted_data")
"""Entries that a resumed run writes where they are others or were missing."""
TYPES = {"code": dict, "steps": int, "started_in": str, "resumed": list, "accepted_data": list}
"""Types of entries of ``config.json``, which older versions did not write."""


def load(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a run.

    Raises:
      InputError: there is no run in the folder.
      RunError: the file is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} holds no run (no config.json): give a run's folder, as printed at its start"
        )
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        source = record.get("init_from") or ["", []]
        texts = [
            record["name"],
            *record["config"].values(),
            *record.get("overrides", ()),
            source[0],
            *source[1],
        ]
        texts += [text for parts in record.get("data", {}).values() for text in parts.values()]
        typed = all(isinstance(record.get(name, kind()), kind) for name, kind in TYPES.items())
        typed = typed and all(isinstance(entry, dict) for entry in record.get("resumed", ()))
        if not typed or not all(isinstance(text, str) for text in texts):
            raise ValueError("a field has the wrong type")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error}): restore it from a copy") from error
    return record


def started_in(folder: Path) -> str | None:
    """Return the working directory of a run's first start; None where there is no record of it."""
    try:
        found = json.loads((folder / "config.json").read_text())["started_in"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def merge(known: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run that is resumed: settings of now, under the conditions of its first start.

    >>> merge({"run": "1", "mesh": {"data": 1}, "steps": 5}, {"run": "2", "mesh": {"data": 2}, "steps": 9})
    {'run': '1', 'mesh': {'data': 1}, 'steps': 9}
    """
    first = {name: known[name] for name in (*CONDITIONS, "run", "started_in") if known.get(name) is not None}
    return {**known, **now, **first}


def changed_conditions(known: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the conditions of now that differ from those of the last start, as far as they are known."""
    last = {name: known[name] for name in CONDITIONS if known.get(name) is not None}
    for entry in known.get("resumed", ()):
        last |= entry
    return {
        name: now[name] for name in CONDITIONS if name in last and now.get(name, last[name]) != last[name]
    }


def with_entry(record: dict[str, Any], name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the list ``name`` of a record with another entry, as ``{name: list}``."""
    return {name: [*record.get(name, ()), entry]}
