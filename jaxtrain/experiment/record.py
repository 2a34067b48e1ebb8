"""Read the ``config.json`` of a run: its experiment's name, its settings and what it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import InputError, RunError

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
