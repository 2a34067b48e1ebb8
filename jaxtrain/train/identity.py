"""Compare the code and the data of a run with what its record says of its start.

Other code is a loud line (an error with ``--strict``). Other data are refused, unless
``--accept-changed-data`` accepts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import InputError
from jaxtrain.data import Source
from jaxtrain.data.identity import UNSTABLE, differences, files_of, identify
from jaxtrain.experiment import Experiment
from jaxtrain.experiment import code as experiment_code
from jaxtrain.sharding import multihost

SHOWN = 4  # differences in a message
NOT_RECORDED = (
    "this run was started by a version that recorded neither its code nor its data: "
    "changes of them cannot be noticed"
)


def check_code(
    known: Mapping[str, Any], code: Mapping[str, str], strict: bool, effect: str = "its results may differ"
) -> list[str]:
    """Return a line that names the files of the run's code that have changed; [] where none has.

    Args:
      known: the run's ``config.json``.
      code: ``experiment.code.digests`` of today.
      strict: refuse changed code.
      effect: what that means.

    Raises:
      InputError: the code has changed and ``strict``.
    """
    changed = experiment_code.changes(known["code"], code) if known.get("code") else []
    if not changed:
        return []
    text = f"code has changed since this run started: {_shorten(changed)}"
    if strict:
        raise InputError(f"{text}; restore it, start a fresh run with --new, or leave out --strict")
    return [f"{text}: {effect}"]


def describe_data(experiment: Experiment, opened: Mapping[str, Source]) -> dict[str, Any]:
    """Return what ``config.json`` records of the data; process 0 reads them.

    Args:
      experiment: whose sources these are.
      opened: the same sources, in memory where they fit (``assemble``'s ``inspect``).

    Returns:
      ``data``, the identity of each split, and ``files``, the paths that were read.
    """
    return multihost.on_process_0(lambda: _describe(experiment, opened), "data identity")


def _describe(experiment: Experiment, opened: Mapping[str, Source]) -> dict[str, Any]:
    found: dict[int, dict[str, str]] = {}
    data: dict[str, Any] = {}
    files: set[str] = set()
    for split, now in opened.items():
        source = getattr(experiment, split)
        if id(source) not in found:
            found[id(source)] = identify(split, source, now)
            files |= {*files_of(source)}
        data[split] = found[id(source)]
    return {"data": data, "files": sorted(files)}


def unstable_notes(data: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a line for each split whose source gathers other values each time."""
    lines = []
    for split, parts in data.items():
        names = [part.removeprefix("field ") for part, text in parts.items() if text == UNSTABLE]
        if names:
            lines.append(
                f"{split}: {', '.join(names)} differs when the same rows are gathered again: gather must be "
                "a pure function of the ids, or a resumed run is not the same"
            )
    return lines


def data_changes(known: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """Return how the data differ from those that the run's record names, one text per difference."""
    return differences(known["data"], data) if known.get("data") else []


def refuse(folder: Path, changed: list[str], use: str, since: str = "started") -> InputError:
    """Return the error for changed data.

    Args:
      folder: of the run.
      changed: from ``data_changes``.
      use: what ``--accept-changed-data`` does with them.
      since: what they have changed since: the run ``"started"`` or ``"finished"``.
    """
    return InputError(
        f"{folder}: the data have changed since this run {since}: {_shorten(changed)}; restore them, start a "
        f"fresh run with --new, or {use} with --accept-changed-data (jaxtrain.fit: accept_changed_data=True)"
    )


def accepted_note(changed: list[str]) -> str:
    """Return the line that is shown where changed data are accepted."""
    return f"changed data are accepted: {_shorten(changed)}"


def _shorten(texts: list[str]) -> str:
    more = f", and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more
