"""Compare the code and the data of a run with what its record says of its start.

Other code is a loud line (an error with ``--strict``). Other data are refused, unless
``--accept-changed-data`` accepts them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain import checkpoint
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.data import Source, paths
from jaxtrain.data.identity import UNREADABLE, UNSTABLE, differences, files_of, identify
from jaxtrain.experiment import Experiment
from jaxtrain.experiment import code as experiment_code
from jaxtrain.monitor import Console
from jaxtrain.program.teacher import Teacher
from jaxtrain.sharding import multihost
from jaxtrain.train.run_folder import RunFolder
from jaxtrain.train.run_record import with_entry

SHOWN = 4  # differences in a message
NOT_RECORDED = (
    "this run was started by a version that recorded neither its code nor its data: "
    "changes of them cannot be noticed"
)


@dataclasses.dataclass(frozen=True)
class RunCheck:
    """Compare code and data of a run that starts with its record, and say what to record.

    Attributes:
      folder: of the run.
      record: its ``config.json``; None for a new run.
      experiment: what it runs.
      console: shows what has changed.
      strict: refuse changed code.
      accept: continue on changed data.
      accepted: how the data have changed, where that was accepted.
    """

    folder: RunFolder
    record: dict[str, Any] | None
    experiment: Experiment
    console: Console
    strict: bool = False
    accept: bool = False
    accepted: list[str] = dataclasses.field(default_factory=list)

    def code(self, code: Mapping[str, str] | None) -> dict[str, Any]:
        """Show a line where the code has changed; returns the entry ``code`` of the record.

        Raises:
          InputError: it has changed and ``strict``.
        """
        now = multihost.on_process_0(lambda: code, "code")
        if now is None:
            return {}
        if self.record is not None and self.folder.has_state():
            effect = "it may behave differently from here on"
            if self._is_finished():
                effect = "its result is of the code before"
            for note in check_code(self.record, now, self.strict, effect):
                self.console.note(note)
        return {"code": now}

    def init_from(self, source: list[Any] | None) -> dict[str, Any]:
        """Show a line where the checkpoint that the run started from is another now; returns what to record.

        Args:
          source: ``[--init-from, --init-map]``, from ``RunFolder.init_from``.

        Raises:
          InputError: a new run starts from a checkpoint that does not exist.
        """
        if source is None:
            return {}
        known = self.record if self.record is not None and self.folder.has_state() else None
        if known is None:
            found = multihost.on_process_0(lambda: checkpoint.identify_source(source[0]), "init_from")
            return {"init_from": source, "init_checkpoint": found}
        before, now = (
            known.get("init_checkpoint"),
            multihost.on_process_0(lambda: _identify_or_none(source[0]), "init_from"),
        )
        if before is not None and now is not None and now != before:
            self.console.note(
                f"{source[0]} has changed since this run started from it ({before}; now {now}): this run "
                "keeps what it started from; --new starts from the current one"
            )
        return {"init_from": source}

    def teacher(self, teacher: Teacher | None) -> dict[str, Any]:
        """Return the entry ``teacher_checkpoint`` of the record, which says which teacher a run learns from.

        Raises:
          InputError: it is another one than that of the run's start.
        """
        if teacher is None:
            return {}
        now = multihost.on_process_0(lambda: teacher.identity, "teacher")
        known = self.record if self.record is not None and self.folder.has_state() else {}
        before = known.get("teacher_checkpoint", now)
        if before != now:
            raise InputError(
                f"{self.folder}: the teacher {teacher.source} has changed since this run started ({before}; "
                f"now {now}): restore it, or start a fresh run with --new"
            )
        return {"teacher_checkpoint": now}

    def data(self, sources: Mapping[str, Source]) -> dict[str, Any]:
        """Show how the data have changed; returns the entries ``data``, ``files``, ``accepted_data``.

        Args:
          sources: by split, from ``assemble``'s ``inspect``.

        Raises:
          InputError: they have changed, and that is not accepted.
        """
        found = describe_data(self.experiment, sources)
        for note in (*paths.notes(), *_notes(found["data"])):
            self.console.note(note)
        known = self.record
        if known is None or not self.folder.has_state():
            return found  # nothing was computed from other data
        if "data" not in known:
            self.console.note(NOT_RECORDED)
            return found
        changed = data_changes(known, found["data"])
        if not changed:
            return {**found, "data": known["data"]}
        if not self.accept:
            since = "finished" if self._is_finished() else "started"
            raise refuse(self.folder.path, changed, "continue", since)
        self.console.note(accepted_note(changed))
        self.accepted.extend(changed)
        return {**found, **with_entry(known, "accepted_data", self.folder.acceptance("run", changed))}

    def keep_result(self) -> None:
        """Say, and record, that changed data were accepted for a run that has its result already."""
        if self.accepted:
            self.console.note("the result below is of the data before")
            self.folder.accept_data("run", self.accepted)

    def _is_finished(self) -> bool:
        """Return whether the folder holds the result of this experiment, not of fewer epochs."""
        known = self.record or {"config": {}}
        if float(known["config"].get("epochs", "inf")) != self.experiment.epochs:
            return False
        return self.folder.result(known.get("steps", 0)) is not None


def _identify_or_none(source: str) -> str | None:
    """Return what ``source`` is now; None where it is gone, which does not matter to a run that has begun."""
    try:
        return checkpoint.identify_source(source)
    except (InputError, RunError):
        return None


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
    text = f"code has changed since this run started: {shorten(changed)}"
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


def _notes(data: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a line for each split whose examples cannot be compared later."""
    lines = []
    for split, parts in data.items():
        names = [part.removeprefix("field ") for part, text in parts.items() if text == UNSTABLE]
        if names:
            lines.append(
                f"{split}: {', '.join(names)} differs when the same rows are gathered again: gather must be "
                "a pure function of the ids, or a resumed run is not the same"
            )
        if UNREADABLE in parts.values():
            lines.append(
                f"{split}: an example cannot be read, so the data are not compared with those of later"
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
        f"{folder}: the data have changed since this run {since}: {shorten(changed)}; restore them, start a "
        f"fresh run with --new, or {use} with --accept-changed-data (jaxtrain.fit: accept_changed_data=True)"
    )


def accepted_note(changed: list[str]) -> str:
    """Return the line that is shown where changed data are accepted."""
    return f"changed data are accepted: {shorten(changed)}"


def shorten(texts: list[str]) -> str:
    """Return the first differences, and the number of the others."""
    more = f", and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more
