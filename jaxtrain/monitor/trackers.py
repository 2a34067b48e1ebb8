"""Send a run's records to trackers, such as W&B and MLflow, from threads that cannot disturb training.

Each tracker has a thread that follows ``metrics.jsonl`` and sends what is new. So all trackers get the same
records, nothing is held in memory for one that is slow, and a tracker that starts late, fails for a while or
belongs to a resumed run still gets every record: each start begins at the first line.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from jaxtrain.core import redact, user_modules
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import did_you_mean, first_line

PERIOD = 0.5  # seconds between looks at metrics.jsonl
RETRY = 60.0  # seconds until a tracker that failed is started again
HANG = 60.0  # seconds in one call of a tracker after which a line says so
FINISH = 20.0  # seconds that the end of a run waits for all trackers together
FINISH_EARLY = 5.0  # the same for a run that was stopped or failed
LINES = 1000  # records in one call of ``write``, at most

_abandoned = threading.Event()  # of the process: what a library does when Python ends concerns all of it

Record = tuple[int, Mapping[str, float]]
"""A step and its numbers by name; NaN where a number is not finite."""


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a tracker learns about a run.

    Attributes:
      id: 16 hexadecimal digits, the same after every resume.
      name: the experiment's name.
      folder: the run's folder.
      start: the step that it resumes from, 0 for a new run; records up to it have been sent before, if the
        tracker was there.
      config: the settings by path, such as ``{"batch": 128, "optimizer.lr": 0.1}``; numbers, booleans and
        texts, with secrets redacted.
    """

    id: str
    name: str
    folder: Path
    start: int
    config: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, record: Mapping[str, Any], start: int = 0) -> RunInfo:
        """Return what the ``config.json`` of ``folder`` says of a run."""
        config = {path: redact.redact(text) for path, text in record["config"].items()}
        return cls(record["run"], record["name"], folder.absolute(), start, settings(config))


class Tracker(Protocol):
    """What receives the records of a run. One thread calls it, never the training thread.

    ``start`` may be called again on the same object, after an error. After each ``start``, also that of a
    resumed run, ``write`` gets all records of the run from the first: a tracker that can replace what it has
    does so (a file opened with ``"w"``), another skips the steps that it has. A step that is trained again
    has the same bits, except for times and speeds.
    """

    def start(self, run: RunInfo) -> None:
        """Begin or continue the run."""

    def write(self, records: Sequence[Record]) -> None:
        """Take records, in the order of their steps; a step may have several, as after an evaluation."""

    def finish(self, status: str) -> None:
        """End the run, which is ``"finished"``, ``"stopped"`` by a signal or ``"failed"``."""


def make_tracker(spec: str | Tracker, flag: str = "--track") -> Tracker:
    """Make the tracker that ``--track`` names: ``wandb[:offline]``, ``mlflow[:URI]`` or ``FILE.py:NAME``.

    Raises:
      InputError: there is no such tracker, its package is missing, or it has no API key.
    """
    if not isinstance(spec, str):
        return check_tracker(spec, "a tracker")
    kind, _, argument = spec.partition(":")
    if kind == "wandb":
        _check_installed("wandb", "wandb")
        from jaxtrain.monitor.wandb_tracker import WandbTracker

        return WandbTracker(argument or None)
    if kind == "mlflow":
        _check_installed("mlflow", "mlflow")
        from jaxtrain.monitor.mlflow_tracker import MlflowTracker

        return MlflowTracker(argument or None)
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        hint = did_you_mean(kind, ("wandb", "mlflow"), otherwise="give wandb, mlflow:URI or FILE.py:NAME")
        raise InputError(f"{flag} {redact.redact_urls(spec)}: no such tracker; {hint}")
    module = user_modules.load(path)
    if not hasattr(module, name):
        raise InputError(f"{flag} {spec}: {path} defines no {name!r}")
    found = getattr(module, name)
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:
            raise InputError(
                f"{flag} {spec}: {name}() raises {type(error).__name__}: {first_line(error)}"
            ) from error
    checked = check_tracker(found, f"{flag} {spec}")
    with contextlib.suppress(AttributeError):  # of a class with slots
        checked.spec = spec  # type: ignore[attr-defined]
    return checked


def check_tracker(tracker: Any, where: str) -> Tracker:
    """Return ``tracker``; raises InputError where it lacks a method."""
    missing = [name for name in ("start", "write", "finish") if not callable(getattr(tracker, name, None))]
    if missing or isinstance(tracker, type):
        what = "a class: give an object" if isinstance(tracker, type) else f"without {', '.join(missing)}"
        raise InputError(f"{where} is {what}; a tracker has start(run), write(records) and finish(status)")
    checked: Tracker = tracker
    return checked


def _check_installed(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{package} is not installed: pip install 'jaxtrain[{extra}]'")


def settings(config: Mapping[str, str]) -> dict[str, Any]:
    """Return the texts of ``config.json`` as numbers, booleans and texts.

    >>> settings({"batch": "128", "name": "'cnn'", "widths": "(32, 64)", "clip": "None"})
    {'batch': 128, 'name': 'cnn', 'widths': '(32, 64)', 'clip': 'None'}
    """
    found: dict[str, Any] = {}
    for path, text in config.items():
        value: Any = text
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
        found[path] = value if isinstance(value, bool | int | float | str) else text
    return found


class Trackers:
    """The trackers of one run, and their threads.

    Args:
      trackers: from the first record to the last.
      run: what they get in ``start``; ``begin`` sets its ``start``.
      note: prints a line for the user.
    """

    def __init__(self, trackers: Sequence[Tracker], run: RunInfo, note: Callable[[str], None]) -> None:
        self._trackers, self._run, self._note = trackers, run, note
        self._followers: list[_Follower] = []

    def begin(self, start: int) -> None:
        """Start the threads; ``metrics.jsonl`` must end with the records of step ``start``."""
        run = dataclasses.replace(self._run, start=start)
        self._followers = [_Follower(tracker, run, self._note) for tracker in self._trackers]
        for follower in self._followers:
            follower.start()

    def check(self) -> None:
        """Print a line, once, for a tracker that hangs."""
        for follower in self._followers:
            follower.report_hang()

    def end(self, status: str, seconds: float | None = None) -> list[str]:
        """Let the trackers finish and wait for them; prints and returns a line for each that did not.

        Args:
          status: of the run.
          seconds: the longest wait; None waits until they are done.
        """
        for follower in self._followers:
            follower.end(status)
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        for follower in self._followers:
            follower.join(None if seconds is None else max(0.0, deadline - time.monotonic()))
        lines = [line for follower in self._followers if (line := follower.unsent()) is not None]
        for line in lines:
            self._note(line)
        return lines


class _Follower(threading.Thread):
    """Follows ``metrics.jsonl`` for one tracker. A daemon: a call that hangs does not hold the process."""

    def __init__(self, tracker: Tracker, run: RunInfo, note: Callable[[str], None]) -> None:
        spec = getattr(tracker, "spec", None)  # of a tracker that make_tracker made
        self.spec = str(spec or type(tracker).__name__)
        self._fix = f"send all with: python -m jaxtrain track --workdir {run.folder} --to {spec}"
        if spec is None:
            self._fix = f"{run.folder}/metrics.jsonl has all"
        super().__init__(name=f"tracker {self.spec}", daemon=True)
        self._tracker, self._run, self._note = tracker, run, note
        self._ended, self._status = threading.Event(), "finished"
        self._sent, self._done, self._failed = 0, False, ""
        self._called: float | None = None  # since when the tracker has been in a call
        self._hang_shown = False

    def end(self, status: str) -> None:
        """Ask for the end: the thread sends what is left and finishes."""
        self._status = status
        self._ended.set()

    def run(self) -> None:
        """Follow to the end; after an error start again, from the first record, until the run ends."""
        while not self._done:
            try:
                self._follow()
                self._done = True
            except Exception as error:  # a tracker's: anything may come out of it
                self._called = None
                shown, self._failed = self._failed, f"{type(error).__name__}: {first_line(error)[:160]}"
                if not shown:
                    again = "" if self._ended.is_set() else f", and it is tried again every {RETRY:g} s"
                    self._say(
                        f"WARNING: tracker {self.spec} failed ({self._failed}); training continues{again}"
                    )
                if self._ended.wait(RETRY):
                    return

    def _follow(self) -> None:
        self._sent = 0
        self._call(self._tracker.start, self._run)
        with (self._run.folder / "metrics.jsonl").open("rb") as file:
            while True:
                ended = self._ended.is_set()  # read first: what is written before the end is then seen below
                records = _read(file)
                if records:
                    self._call(self._tracker.write, records)
                    self._sent += len(records)
                    if self._failed:
                        self._say(f"tracker {self.spec} works again")
                        self._failed = ""
                elif ended:
                    break
                else:
                    self._ended.wait(PERIOD)
        self._call(self._tracker.finish, self._status)

    def _call(self, method: Callable[[Any], None], argument: Any) -> None:
        self._called = time.monotonic()
        method(argument)
        self._called = None

    def report_hang(self) -> None:
        """Print a line, once, when the tracker has been in one call for ``HANG`` seconds."""
        since = self._called
        if since is not None and not self._hang_shown and time.monotonic() - since > HANG:
            self._hang_shown = True
            self._say(f"WARNING: tracker {self.spec} has not answered for {HANG:g} s; training continues")

    def unsent(self) -> str | None:
        """Return a line about what was not sent; None where everything was."""
        if self._done:
            return None
        _abandoned.set()
        why = self._failed or "it did not answer in time"
        with (self._run.folder / "metrics.jsonl").open("rb") as file:
            total = sum(1 for line in file)
        sent = f"{self._sent} of {total} records sent ({why})"
        return redact.redact(f"WARNING: tracker {self.spec} is incomplete, {sent}; {self._fix}")

    def _say(self, text: str) -> None:
        with contextlib.suppress(Exception):  # of an output that is closed: the training thread reports it
            self._note(redact.redact(text))


def _read(file: BinaryIO) -> list[Record]:
    """Return the next complete lines, at most ``LINES``."""
    records: list[Record] = []
    while len(records) < LINES:
        position, line = file.tell(), file.readline()
        if not line.endswith(b"\n"):
            file.seek(position)
            break
        values = json.loads(line)
        step = int(values.pop("step"))
        records.append((step, {n: math.nan if value is None else value for n, value in values.items()}))
    return records


def abandoned() -> bool:
    """Return whether a tracker did not finish: its library may hold this process when Python ends."""
    return _abandoned.is_set()
