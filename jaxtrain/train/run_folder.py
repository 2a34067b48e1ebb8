"""A run's folder: its default path, its ``config.json`` and ``result.json``, and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import platform
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from jaxtrain.core import safe_names
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import write_json
from jaxtrain.experiment import Experiment, config_hash, config_text, deciding, first_difference
from jaxtrain.optim import Constant, Schedule
from jaxtrain.sharding import multihost
from jaxtrain.train import environment

P = ParamSpec("P")
T = TypeVar("T")


def default_folder(name: str, experiment: Experiment) -> Path:
    """``runs/NAME/HASH-seedS``: the same command finds the same folder on every host.

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
        """The first of ``PATH``, ``PATH-2``, ``PATH-3``, ... that does not exist."""
        number, path = 2, self.path
        while path.exists():
            path = self.path.with_name(f"{self.path.name}-{number}")
            number += 1
        return str(path)

    @_on_process_0
    def record(self) -> dict[str, Any] | None:
        """The run's ``config.json``; None where there is no run. Raises as ``load``."""
        return load(self.path) if self.has_run else None

    @_on_process_0
    def acquire(
        self, name: str, experiment: Experiment, record: dict[str, Any], extend: bool = False
    ) -> None:
        """Make this the folder of a run, or check that it already is.

        Args:
          name: the experiment's name.
          experiment: what is to be run.
          record: further entries of ``config.json`` (origin, overrides, devices).
          extend: allow a longer run although the schedule depends on the length.

        Raises:
          InputError: the folder holds another run, something else, or cannot be written.
        """
        path, config = self.path, config_text(experiment)
        known = load(path) if self.has_run else None
        if known is None and path.is_dir() and any(path.iterdir()):
            raise InputError(
                f"{path} is not empty and holds no run (no config.json): choose another --workdir"
            )
        if known is not None:
            _check_same(path, known["config"], experiment, extend)
        try:
            path.mkdir(parents=True, exist_ok=True)
            source = record.get("init_from")
            if known is None or known["config"] != config or known.get("init_from") != source:
                # Drawn once: marks this run's checkpoints as its own.
                run = (known or {}).get("run") or secrets.token_hex(8)
                text = {"name": name, "run": run, "hash": config_hash(experiment), **record}
                text |= environment.record()
                write_json(path / "config.json", {**(known or {}), **text, "config": config})
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}): choose another --workdir"
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run out of the folder while in this block; process 0 holds the lock.

        The kernel releases the lock when the process ends, however it ends. (Some network disks have no
        locks.)

        Raises:
          InputError: another process has the folder.
        """
        with contextlib.ExitStack() as stack:
            multihost.on_process_0(lambda: stack.enter_context(_lock(self.path)), "lock")
            yield

    @_on_process_0
    def run_id(self) -> str | None:
        """The random id of this run, which its checkpoints carry; None where there is none."""
        return load(self.path).get("run") if self.has_run else None

    @_on_process_0
    def recorded_steps(self) -> int:
        """The last step with a record in ``metrics.jsonl``, 0 where there is none."""
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
        recorded = load(self.path).get("init_from") if self.has_run else None
        if not any(self.path.glob("checkpoints/*/manifest.json")):
            return asked or recorded
        if asked is not None and asked != recorded:
            start = f"with --init-from {recorded[0]}" if recorded else "without --init-from"
            raise InputError(
                f"{self.path} holds a run that started {start}: "
                "choose another --workdir, or start a fresh run with --new"
            )
        return None if recorded is None else list(recorded)

    @_on_process_0
    def result(self, steps: int) -> dict[str, Any] | None:
        """The result of a run that finished all ``steps``, None when it has not."""
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
    def write_result(self, found: dict[str, Any]) -> None:
        """Record the result of a finished run."""
        write_json(self.path / "result.json", found)


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
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a field has the wrong type")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error}): restore it from a copy") from error
    return record


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"{folder} is in use by another run ({file.read().strip() or 'unknown process'}): "
                "wait for it, stop it, or use --new"
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _check_same(folder: Path, old: dict[str, str], experiment: Experiment, extend: bool) -> None:
    """Raise InputError unless a run differs only in operational settings, epochs or guard=skip for stop."""
    before, decides = deciding(old, experiment)
    longer = float(decides["epochs"]) > float(before.get("epochs", "inf"))
    if longer and (extend or not _depends_on_length(experiment)):
        before["epochs"] = decides["epochs"]
    if (before.get("guard"), decides.get("guard")) == ("'stop'", "'skip'"):
        before["guard"] = decides["guard"]  # nothing was skipped so far: guard=skip gives the same run
    difference = first_difference(before, decides)
    if difference is None:
        return
    path, was, now = difference
    fix = "choose another --workdir, or start a fresh run with --new"
    if path == "epochs" and longer:
        fix = "its schedule depends on the number of epochs: --extend resumes it with the longer schedule"
    raise InputError(f"{folder} holds another run: {path} is {was} there and {now} here; {fix}")


def _depends_on_length(experiment: Experiment) -> bool:
    lr = getattr(experiment.optimizer, "lr", None)
    constant = isinstance(lr, Constant) and lr.warmup == 0
    frozen = any(group.until < 1 for group in getattr(experiment.optimizer, "groups", ()))
    built = any(hasattr(stage, "build") for stage in experiment.post_update)
    return (isinstance(lr, Schedule) and not constant) or frozen or built
