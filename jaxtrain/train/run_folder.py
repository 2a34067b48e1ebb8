"""A run's folder: its default path, its ``config.json`` and ``result.json``, and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

from jaxtrain.core import safe_names
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import as_json, not_finite, null_line, write_json
from jaxtrain.experiment import Experiment, comparable_configs, config_hash, config_text, first_difference
from jaxtrain.sharding import multihost
from jaxtrain.train import environment
from jaxtrain.train.run_record import WRITTEN, changed_conditions, load, merge, with_entry

LOCK_TRIES = 5

P = ParamSpec("P")
T = TypeVar("T")


def default_folder(name: str, experiment: Experiment) -> Path:
    """Return ``runs/NAME/HASH-seedS``, which the same command finds on every host.

    Raises:
      InputError: the name of the experiment cannot name a folder.
    """
    own = f"{config_hash(experiment)}-seed{experiment.seed}"
    return safe_names.inside(
        Path("runs"), name, own, what="experiment", fix="rename it, or give --workdir DIR"
    )


def _on_process_0(
    method: Callable[Concatenate[RunFolder, P], T],
) -> Callable[Concatenate[RunFolder, P], T]:
    """Call the method on process 0; every process returns its result or raises its error."""

    @functools.wraps(method)
    def call(self: RunFolder, *args: P.args, **kwargs: P.kwargs) -> T:
        return multihost.on_process_0(lambda: method(self, *args, **kwargs), method.__qualname__)

    return call


class RunFolder:
    """The folder of one run. Process 0 reads and writes it; with several processes all get its answer.

    Args:
      path: the folder, which need not exist yet.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def has_run(self) -> bool:
        """Whether ``config.json`` exists, as this process sees it."""
        return (self.path / "config.json").exists()

    @_on_process_0
    def next_free(self) -> str:
        """Return the first of ``PATH``, ``PATH-2``, ``PATH-3``, ... that does not exist."""
        number, path = 2, self.path
        while path.exists():
            path = self.path.with_name(f"{self.path.name}-{number}")
            number += 1
        return str(path)

    @_on_process_0
    def record(self) -> dict[str, Any] | None:
        """Return the run's ``config.json``; None where there is no run. Raises as ``load``."""
        return load(self.path) if self.has_run else None

    @_on_process_0
    def check(self, experiment: Experiment) -> None:
        """Check that the folder holds a run of ``experiment``, which may have fewer epochs, or none.

        Raises:
          InputError: it holds another run, or something else.
        """
        self._check(experiment)

    def _check(self, experiment: Experiment) -> dict[str, Any] | None:
        known = load(self.path) if self.has_run else None
        if known is None and self.path.is_dir() and any(self.path.iterdir()):
            raise InputError(
                f"{self.path} is not empty and holds no run (no config.json): choose another --workdir"
            )
        if known is not None:
            _check_same(self.path, known["config"], experiment)
        return known

    @_on_process_0
    def acquire(self, name: str, experiment: Experiment, record: dict[str, Any]) -> dict[str, Any]:
        """Make this the folder of a run, or check that it already is.

        ``config.json`` of a run that is resumed is written only if the settings or the data are others.

        Args:
          name: the experiment's name.
          experiment: what is to be run; may have more epochs than the run began with (``run_length``).
          record: further entries of ``config.json`` (origin, overrides, devices).

        Returns:
          The conditions that differ from those of the last start, for ``add_resumed``.

        Raises:
          InputError: the folder holds another run, something else, or cannot be written.
        """
        path, known = self.path, self._check(experiment)
        now = {
            "name": name,
            "run": secrets.token_hex(8),  # marks this run's checkpoints as its own
            "hash": config_hash(experiment),
            **record,
            **environment.record(),
            "config": config_text(experiment),
        }
        changed: dict[str, Any] = {}
        if known is None:
            new = now
        elif not self._newest_step():  # nothing was saved, so this is the start
            new = {**known, **now, "run": known.get("run") or now["run"]}
        else:
            new, changed = merge(known, now), changed_conditions(known, now)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if known is None or any(known.get(name) != new.get(name) for name in WRITTEN):
                write_json(path / "config.json", new)
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}): choose another --workdir"
            ) from error
        return changed

    @_on_process_0
    def add_resumed(self, step: int, changed: dict[str, Any]) -> None:
        """Add the conditions that differ from those of the last start to the list ``resumed``.

        Raises:
          RunError: ``config.json`` cannot be written.
        """
        known = load(self.path)
        try:
            entry = with_entry(known, "resumed", {"step": step, **changed})
            write_json(self.path / "config.json", {**known, **entry})
        except OSError as error:
            raise RunError(f"{self.path}/config.json cannot be written ({error.strerror})") from error

    @_on_process_0
    def accept_data(self, command: str, changed: list[str]) -> None:
        """Record that changed data were accepted by a command that does not train.

        Raises:
          InputError: ``config.json`` cannot be written.
        """
        known = load(self.path)
        entry = {"command": command, "step": self._newest_step(), "changed": changed}
        try:
            write_json(self.path / "config.json", {**known, **with_entry(known, "accepted_data", entry)})
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error.strerror}), and --accept-changed-data is recorded in "
                "it: make it writable"
            ) from error

    @_on_process_0
    def acceptance(self, command: str, changed: list[str]) -> dict[str, Any]:
        """Return the entry of ``accepted_data`` in ``config.json``."""
        return {"command": command, "step": self._newest_step(), "changed": changed}

    @_on_process_0
    def has_state(self) -> bool:
        """Return whether there is a checkpoint or a result: a run without either starts from step 0."""
        return self._newest_step() > 0 or (self.path / "result.json").exists()

    def _newest_step(self) -> int:
        """Return the step of the newest checkpoint, 0 without one."""
        names = [path.parent.name for path in self.path.glob("checkpoints/*/manifest.json")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    @contextlib.contextmanager
    def locked(self, note: Callable[[str], None] = print) -> Iterator[None]:
        """Keep every other run out of the folder while in this block; process 0 holds the lock.

        The kernel releases the lock when the process ends, however it ends.

        Args:
          note: called with a line for the user where the disk has no locks, as some network disks.

        Raises:
          InputError: another process has the folder, or it cannot be written.
        """
        with contextlib.ExitStack() as stack:
            multihost.on_process_0(lambda: stack.enter_context(_lock(self.path, note)), "lock")
            yield

    @_on_process_0
    def run_id(self) -> str | None:
        """Return the random id of this run, which its checkpoints carry; None where there is none."""
        return load(self.path).get("run") if self.has_run else None

    @_on_process_0
    def recorded_steps(self) -> int:
        """Return the last step with a record in ``metrics.jsonl``, 0 where there is none."""
        try:
            lines = (self.path / "metrics.jsonl").read_text().splitlines()
            return max((int(json.loads(line)["step"]) for line in lines if line.endswith("}")), default=0)
        except (OSError, ValueError, LookupError, TypeError):
            return 0

    @_on_process_0
    def init_from(self, source: str | None, renames: Sequence[str]) -> list[Any] | None:
        """What the run starts from, ``[--init-from, --init-map]``, as recorded where it has begun; else None.

        Raises:
          InputError: the run started from something else; or there are renames without a source.
        """
        if renames and source is None:
            raise InputError("--init-map needs --init-from, whose parameters it renames")
        asked = None if source is None else [source, list(renames)]
        known = load(self.path) if self.has_run else {}
        recorded: list[Any] | None = known.get("init_from")

        def absolute(found: list[Any], folder: str) -> list[Any]:
            return [str(Path(folder, found[0]).absolute()), list(found[1])]

        # a relative path is meant from where the run was first started
        first = None if recorded is None else absolute(recorded, known.get("started_in", ""))
        if not any(self.path.glob("checkpoints/*/manifest.json")):
            return asked or first
        if asked is not None and asked != recorded and absolute(asked, "") != first:
            start = f"with --init-from {recorded[0]}" if recorded else "without --init-from"
            raise InputError(
                f"{self.path} holds a run that started {start}: "
                "choose another --workdir, or start a fresh run with --new"
            )
        return recorded

    @_on_process_0
    def result(self, steps: int) -> dict[str, Any] | None:
        """Return the result of a run that finished all ``steps``, None when it has not."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            dict(found["test"]), float(found["seconds"]), found["examples_per_second"], found["resumed_from"]
            return found if found["steps"] == steps else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error}): delete it and run again") from error

    @_on_process_0
    def write_result(self, found: dict[str, Any], note: Callable[[str], None]) -> dict[str, Any]:
        """Record the result of a finished run; returns what was written.

        Args:
          found: the result.
          note: called with a line that names the numbers that are not finite, and null in the file.
        """
        if names := not_finite(found):
            note(null_line("result.json", names))
        written: dict[str, Any] = as_json(found)
        write_json(self.path / "result.json", written)
        return written


@contextlib.contextmanager
def _lock(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((folder / ".lock").open("a+", errors="replace"))
            _lock_file(folder, file, note)
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {platform.node()}")
            file.flush()
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error.strerror}): choose another --workdir"
            ) from error
        yield


def _lock_file(folder: Path, file: IO[str], note: Callable[[str], None]) -> None:
    """Lock ``file``; where the disk has no locks, say so and continue."""
    try:
        for _ in range(LOCK_TRIES - 1):  # the command ``runs`` tries each lock, for an instant
            with contextlib.suppress(BlockingIOError, PermissionError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.02)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise InputError(
            f"{folder} is in use by another run ({file.read().strip() or 'unknown process'}): "
            "wait for it, stop it, or use --new"
        ) from error
    except OSError as error:
        note(f"{folder} is on a disk without locks ({error.strerror}): let no other run use it")


def _check_same(folder: Path, old: dict[str, str], experiment: Experiment) -> None:
    """Raise InputError unless only epochs (more), operational settings or guard=skip for stop differ."""
    before, decides = comparable_configs(old, experiment)
    if float(decides["epochs"]) > float(before.get("epochs", "inf")):
        before["epochs"] = decides["epochs"]
    if (before.get("guard"), decides.get("guard")) == ("'stop'", "'skip'"):
        before["guard"] = decides["guard"]  # nothing was skipped so far: guard=skip gives the same run
    difference = first_difference(before, decides)
    if difference is None:
        return
    path, was, now = difference
    raise InputError(
        f"{folder} holds another run: {path} is {was} there and {now} here; "
        "choose another --workdir, or start a fresh run with --new"
    )
