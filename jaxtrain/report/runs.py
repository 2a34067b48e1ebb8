"""The runs of a report: their folders, or those of a sweep, and what they have recorded so far."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import user_path
from jaxtrain.experiment import record
from jaxtrain.report.evaluations import Evaluation, in_result, read_evaluations
from jaxtrain.report.metrics_file import MetricsFile
from jaxtrain.runs import lock, notes
from jaxtrain.runs.notes import Notes

SWEEP = "sweep.json"
LARGEST = 2**26
"""Bytes of a ``result.json`` or ``sweep.json`` at most."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has recorded.

    Attributes:
      folder: of the run.
      label: the end of its path, as much as tells it from the others.
      record: its ``config.json``.
      metrics: its ``metrics.jsonl``.
      result: its ``result.json``; None until it has finished.
      evaluations: what ``evaluate`` has written into the folder.
      running: whether a process holds its lock.
      notes: its tags and note.
    """

    folder: Path
    label: str
    record: dict[str, Any]
    metrics: MetricsFile
    result: dict[str, Any] | None
    evaluations: list[Evaluation]
    running: bool
    notes: Notes

    @property
    def name(self) -> str:
        """The name of its experiment."""
        return str(self.record["name"])

    @property
    def config(self) -> dict[str, str]:
        """Its settings: texts by path."""
        return dict(self.record["config"])

    @property
    def steps(self) -> int | None:
        """The steps that it takes; None where that is not recorded."""
        steps = self.record.get("steps")
        return steps if isinstance(steps, int) else None

    def numbers(self, *path: str) -> dict[str, float]:
        """Return the numbers of an entry of the result, such as ``("best", "test")``; {} without it."""
        found: Any = self.result
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        items = found.items() if isinstance(found, dict) else ()
        return {k: float(v) for k, v in items if isinstance(v, int | float) and not isinstance(v, bool)}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep: its folder, its ``sweep.json``, and the runs of its members that have started.

    Attributes:
      folder: of the sweep.
      metric: what it compares, such as ``accuracy``; a minus before it means that lower is better. None until
        the sweep has finished, which then is the metric that its runs select by.
      strategy: how settings were chosen.
      settings: of each member, texts by path.
      members: the position of each member among the report's runs; None where it has not started.
    """

    folder: Path
    metric: str | None
    strategy: str
    settings: list[dict[str, str]]
    members: list[int | None]


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of a report, and the sweeps that some of them belong to."""

    runs: list[Run]
    sweeps: list[Sweep]


class Reader:
    """Reads runs again and again: of a ``metrics.jsonl`` only what was added.

    Args:
      paths: folders of runs and of sweeps.

    Raises:
      InputError: a folder is neither.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        if not paths:
            raise InputError("give the folder of at least one run")
        self.folders = list(dict.fromkeys(user_path(path) for path in paths))
        for folder in self.folders:
            if not folder.is_dir():
                what = "is a file" if folder.exists() else "does not exist"
                raise InputError(f"{folder} {what}: give a run's folder, as printed at its start")
        self._metrics: dict[Path, MetricsFile] = {}

    def read(self) -> Runs:
        """Read everything.

        Raises:
          InputError: a folder holds neither a run nor a sweep.
          RunError: a file cannot be read.
        """
        folders: list[Path] = []
        drafts = []
        for folder in self.folders:
            if not (folder / SWEEP).is_file():
                folders.append(folder)
                continue
            body, members = _read_sweep(folder)
            started = [one if (one / "config.json").is_file() else None for one in members]
            folders += [one for one in started if one is not None]
            drafts.append((folder, body, started))
        folders = list(dict.fromkeys(folders))
        if not folders:
            raise InputError(f"{self.folders[0]}: no member of this sweep has started yet")
        labels = short_labels(folders)
        runs = [self._read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]
        place = {folder: number for number, folder in enumerate(folders)}
        sweeps = [
            Sweep(
                folder,
                body.get("metric"),
                str(body.get("strategy", "")),
                [member["settings"] for member in body["members"]],
                [None if one is None else place[one] for one in started],
            )
            for folder, body, started in drafts
        ]
        return Runs(runs, sweeps)

    def signature(self) -> list[tuple[str, int, int]]:
        """Return the files that a report shows, with sizes and times, and locks: it changes when one does."""
        folders = list(self.folders)
        for folder in self.folders:
            if (folder / SWEEP).is_file():
                folders += _read_sweep(folder)[1]
        found = []
        for folder in dict.fromkeys(folders):
            found.append((str(folder), int(lock.is_locked(folder)), 0))
            paths = [
                folder / name for name in (SWEEP, "config.json", "metrics.jsonl", "result.json", notes.FILE)
            ]
            for path in [*paths, *sorted(folder.glob("evaluation/*/*"))]:
                try:
                    about = path.stat()
                except OSError:
                    continue
                found.append((str(path), about.st_size, about.st_mtime_ns))
        return found

    def _read_run(self, folder: Path, label: str) -> Run:
        found = record.load(folder)
        metrics = self._metrics.setdefault(folder, MetricsFile(folder / "metrics.jsonl"))
        try:
            metrics.update()
        except OSError as error:
            raise RunError(f"{folder / 'metrics.jsonl'} cannot be read ({error.strerror})") from error
        path = folder / "result.json"
        result = read_object(path) if path.is_file() else None
        evaluations, running = read_evaluations(folder), lock.is_locked(folder)
        if not any(one.confusion for one in evaluations):
            evaluations += in_result(folder, result or {})
        return Run(folder, label, found, metrics, result, evaluations, running, _notes(folder))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      RunError: it cannot be read, or is something else.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error}): restore it from a copy") from error
    return found


def _notes(folder: Path) -> Notes:
    try:
        return notes.read(folder)
    except InputError:  # damaged: ``runs`` says so where they are written
        return Notes()


def _read_sweep(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Return a ``sweep.json`` and the folders of its members; relative ones are below the sweep's folder."""
    path = folder / SWEEP
    body = read_object(path)
    members = body.get("members")
    right = isinstance(body.get("metric", ""), str) and isinstance(members, list)
    for member in members if isinstance(members, list) else ():
        settings = member.get("settings") if isinstance(member, dict) else None
        right = right and isinstance(settings, dict) and isinstance(member.get("folder"), str)
    if not right:
        raise RunError(f"{path} is no record of a sweep: it needs members with folder and settings")
    for member in body["members"]:
        member["settings"] = {str(name): str(value) for name, value in member["settings"].items()}
    return body, [Path(os.path.normpath(folder / member["folder"])) for member in body["members"]]


def short_labels(folders: Sequence[Path]) -> list[str]:
    """Return the end of each path, with as many parts as tell it from the others.

    >>> short_labels([Path("/runs/cnn/1-seed0"), Path("/runs/cnn/1-seed1")])
    ['1-seed0', '1-seed1']
    >>> short_labels([Path("/a/cnn/run"), Path("/a/mlp/run")])
    ['cnn/run', 'mlp/run']
    """
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        labels = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(labels)) == len(folders):
            break
    return [label.encode(errors="backslashreplace").decode() for label in labels]
