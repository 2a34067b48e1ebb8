"""A run's ``config.json``: read it, and combine the record of its first start with what a later one finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxtrain.experiment.record import load

__all__ = ["CONDITIONS", "WRITTEN", "changed_conditions", "load", "merge", "started_in", "with_entry"]

CONDITIONS = ("code", "devices", "mesh", "bits", "versions", "git")
"""Entries of ``config.json`` that are not settings: those of the first start stay."""
WRITTEN = ("config", "init_from", "init_checkpoint", "code", "data", "accepted_data")
"""Entries that a resumed run writes where they are others or were missing."""


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
