"""Find the folders of runs, and read what each of them has recorded."""

from __future__ import annotations

import ast
import dataclasses
import datetime
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import InputError
from jaxtrain.runs import files, lock
from jaxtrain.runs.notes import Notes

DEPTH = 6
"""Folders below the root that are searched: ``runs/NAME/HASH-seedS`` is at depth 2."""
TAIL = 2**16
"""Bytes at the end of ``metrics.jsonl`` that are read for the latest values."""

RUNNING, FINISHED, STOPPED, FAILED, DAMAGED = "running", "finished", "stopped", "failed", "damaged"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder as it is now.

    Attributes:
      path: the folder.
      folder: its path below the root, or as it was given.
      state: ``running`` (a process holds its lock), ``finished``, ``failed`` (an update was not finite: there
        is a ``bad_batch.json``), ``stopped`` (all others) or ``damaged`` (``config.json`` cannot be read).
      record: ``config.json``.
      result: ``result.json``; empty without one.
      latest: the last value of each metric in ``metrics.jsonl``, by name; empty for a finished run.
      notes: tags and the note.
      modified: when the newest of these files was written, in seconds since 1970.
    """

    path: Path
    folder: str
    state: str
    record: Mapping[str, Any]
    result: Mapping[str, Any]
    latest: Mapping[str, Any]
    notes: Notes
    modified: float

    @property
    def experiment(self) -> str:
        """The experiment's name."""
        return _text(self.record.get("name"))

    @property
    def step(self) -> int | None:
        """The last update that is known."""
        found = (self.result if self.state == FINISHED else self.latest).get("step")
        found = self.result.get("steps") if found is None else found
        return found if _is_number(found) else None

    @property
    def steps(self) -> int | None:
        """Updates of the entire run."""
        found = self.record.get("steps")
        return found if _is_number(found) else None

    @property
    def when(self) -> str:
        """Time of the last record, local, to the minute: ``2026-11-30 17:05``."""
        try:
            time = datetime.datetime.fromtimestamp(self.modified)
        except (OSError, OverflowError, ValueError):
            return ""
        return time.isoformat(" ", "minutes")

    @property
    def metric(self) -> tuple[str, float] | None:
        """The main test metric: that which selects checkpoints, else ``accuracy``, ``loss`` or the first."""
        tests = self.tests()
        select = _text(setting(self.record, "select")).removeprefix("-")
        for name in (select, "accuracy", "loss", *tests):
            if name in tests:
                return name, tests[name]
        return None

    def tests(self) -> dict[str, float]:
        """Return the test metrics that count: of the best checkpoint on the validation set, else the last."""
        best = _mapping(self.result.get("best"))
        found = _mapping(best.get("test")) or _mapping(self.result.get("test"))
        return _numbers(found) if self.result else self.metrics("test")

    def metrics(self, split: str) -> dict[str, float]:
        """Return the last metrics of ``test``, ``valid`` or ``train`` by name."""
        if split == "test" and self.result:
            return _numbers(_mapping(self.result.get("test")))
        start = f"{split}/"
        return _numbers({k.removeprefix(start): v for k, v in self.latest.items() if k.startswith(start)})


def setting(record: Mapping[str, Any], path: str) -> Any:
    """Return a setting of ``config.json``: text without its quotes; None where there is none.

    >>> setting({"config": {"lr": "0.1", "select": "'accuracy'"}}, "select")
    'accuracy'
    """
    text = _mapping(record.get("config")).get(path)
    if not isinstance(text, str):
        return None
    quote = text[:1]
    if quote in ("'", '"') and len(text) < 10_000:
        if "\\" not in text and text.count(quote) == 2 and text[-1] == quote:  # nearly all: ast is slower
            return text[1:-1]
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
        return found if isinstance(found, str) else text
    return text


def find(root: Path) -> Iterator[Run]:
    """Generate the runs in a folder, in no order. Links are not followed, and no run is searched for others.

    Raises:
      InputError: there is no such folder.
    """
    if not root.is_dir():
        raise InputError(f"there is no folder {root}: give the folder of your runs with --root")
    waiting = [(str(root), "", 0)]
    while waiting:
        folder, shown, depth = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError:
            continue
        names = {entry.name for entry in found}
        run = _read(folder, shown or folder, names)
        if run is not None:
            yield run
            continue
        if depth < DEPTH:
            inner = (entry for entry in found if entry.is_dir(follow_symlinks=False))
            waiting += [
                (entry.path, f"{shown}/{entry.name}" if shown else entry.name, depth + 1) for entry in inner
            ]


def open_run(text: str, root: Path) -> Run:
    """Return the run that a user names: a folder, or its path below ``root``.

    Raises:
      InputError: there is no run.
    """
    for path in (Path(text), root / text):
        try:
            run = _read(str(path), text, {child.name for child in path.iterdir()})
        except (OSError, ValueError):
            continue
        if run is not None:
            return run
    raise InputError(f"{text} holds no run (no config.json): give a run's folder, as runs shows it")


def _read(folder: str, shown: str, names: set[str]) -> Run | None:
    """Read the run in a folder; None without a ``config.json``, or for that of something else."""
    if "config.json" not in names:
        return None

    def load(name: str) -> tuple[dict[str, Any] | None, float]:
        content = files.read(f"{folder}/{name}") if name in names else None
        return (None, 0.0) if content is None else (files.parse(content.data), content.modified)

    record, modified = load("config.json")
    if record is not None and not {"name", "config"} <= record.keys():
        return None
    if record is not None and not (isinstance(record["name"], str) and isinstance(record["config"], dict)):
        record = None
    result, ended = load("result.json")
    notes = Notes.of(load("notes.json")[0])
    known = record or {}
    state = FINISHED if result is not None and result.get("steps") == known.get("steps") else STOPPED
    if (state != FINISHED or _started_after(folder, ended)) and lock.is_locked(folder):
        state = RUNNING
    elif record is None:
        state = DAMAGED
    elif state != FINISHED and "bad_batch.json" in names:
        state = FAILED
    latest: dict[str, Any] = {}
    if state != FINISHED and "metrics.jsonl" in names:
        latest, written = _latest(folder)
        modified = max(modified, written)
    return Run(Path(folder), shown, state, known, result or {}, latest, notes, max(modified, ended))


def _started_after(folder: str, time: float) -> bool:
    """Return whether the lock was taken again after ``time``, as by a finished run that is extended."""
    try:
        return os.lstat(f"{folder}/{lock.FILE}").st_mtime > time
    except OSError:
        return False


def _latest(folder: str) -> tuple[dict[str, Any], float]:
    """Return the last value of each name at the end of ``metrics.jsonl``, and when it was written."""
    content = files.read(f"{folder}/metrics.jsonl", TAIL, tail=True)
    if content is None:
        return {}, 0.0
    found: dict[str, Any] = {}
    lines = content.data.splitlines()
    for number, line in enumerate(lines):  # to parse all of them would take most of the time of a list
        if number >= len(lines) - 4 or b'"test/' in line or b'"valid/' in line:
            found |= files.parse(line) or {}
    return found, content.modified


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    small = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return small or isinstance(value, float)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if _is_number(value)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
