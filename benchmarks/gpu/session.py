"""Processes with time limits, for ``scripts/gpu_check.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARGIN = 5.0  # seconds before its limit at which a child begins nothing more


class Skipped(Exception):
    """A part that cannot run here, and why."""


class Failed(Exception):
    """A part that went wrong, and how; ``output`` is what its process had printed."""

    def __init__(self, why: str, output: str = "") -> None:
        super().__init__(why)
        self.output = output


class TimedOut(Failed):
    """A part that did not finish in its time."""


@dataclasses.dataclass
class Session:
    """What the parts share."""

    scratch: Path
    data: Path | None
    cpu: bool
    env: dict[str, str]
    deadline: float
    limit: float = 0.0  # seconds for the part that is running
    began: float = 0.0
    memory: int = 0  # bytes of the device, 0 where they are not known
    patience: float = 1.0  # factor of the parts' time limits, which are for a GPU
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # what later parts need of earlier ones

    @property
    def tiny(self) -> tuple[str, ...]:
        """What is added to a child's arguments where this is only tried out on a CPU."""
        return ("--tiny",) if self.cpu else ()

    def left(self) -> float:
        """Seconds the running part may still take."""
        return self.began + self.limit - time.monotonic()

    def start(self, *args: Any, **env: str) -> subprocess.Popen[str]:
        """``python ARGS`` in the scratch folder, in a new process group."""
        return subprocess.Popen(
            [sys.executable, *map(str, args)],
            cwd=self.scratch,
            env=self._env(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *args: Any, **env: str) -> str:
        """``python ARGS`` to its end; its output. Raises Failed for an exit code, TimedOut."""
        return self.end(self.start(*args, **env), 0)

    def end(self, process: subprocess.Popen[str], want: int) -> str:
        """Wait for ``process`` and its exit code ``want``; its output."""
        try:
            output, _ = process.communicate(timeout=max(1.0, self.left()))
        except subprocess.TimeoutExpired:
            output = stop(process)
            raise TimedOut(
                f"not finished in {self.limit:.0f} s; last output: {tail(output)}", output
            ) from None
        except BaseException:  # Ctrl-C reaches this process only
            stop(process)
            raise
        if process.returncode != want:
            raise Failed(f"exit code {process.returncode} instead of {want}: {tail(output)}")
        return output

    def child(self, *args: Any, module: str = "benchmarks.gpu.child", **env: str) -> dict[str, Any]:
        """A function of ``benchmarks/gpu/child.py``: the last line of JSON that it prints.

        A function of several figures prints all that it has after each of them, so one that is cut off
        returns those, with the reason. One that prints ``skip`` raises Skipped.
        """
        try:
            output = self.run("-m", module, *args, **env)
        except TimedOut as why:
            found = said(why.output)
            if found is None:
                raise
            return {**found, "cut": f"not finished in {self.limit:.0f} s"}
        found = said(output)
        if found is None:
            raise Failed(f"no figures were printed: {tail(output)}")
        if "skip" in found:
            raise Skipped(str(found["skip"]))
        return found

    @contextlib.contextmanager
    def side(self, *args: Any, module: str = "benchmarks.gpu.side", **env: str) -> Iterator[Side]:
        """A process of ``benchmarks/gpu/side.py`` that works when it is asked to; it ends with the block."""
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, args)],
            cwd=self.scratch,
            env=self._env(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        side = Side(self, process)
        try:
            yield side
        finally:
            side.close()

    def train(self, name: str, folder: str, settings: dict[str, Any]) -> list[str]:
        """Arguments of the training command."""
        pairs = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
        return ["-m", "jaxtrain.run", "--experiment", name, *pairs, "--workdir", str(self.scratch / folder)]

    def _env(self, more: dict[str, str]) -> dict[str, str]:
        until = time.time() + self.left() - MARGIN
        return {**self.env, **more, "GPU_CHECK_BEGAN": repr(time.time()), "GPU_CHECK_UNTIL": repr(until)}


class Side:
    """One side of a comparison in a separate process, so that the sides can take turns on the device."""

    def __init__(self, session: Session, process: subprocess.Popen[str]) -> None:
        self._session, self._process = session, process
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def answer(self, reserve: float = 0.0) -> dict[str, Any]:
        """The next line of JSON. Raises Failed where the process has ended, TimedOut.

        ``reserve`` are seconds of the part reserved for what comes after.
        """
        while True:
            try:
                line = self._lines.get(timeout=max(1.0, self._session.left() - reserve))
            except queue.Empty:
                said, limit = tail("".join(self._said)), self._session.limit - reserve
                raise TimedOut(f"not finished in {limit:.0f} s; last output: {said}") from None
            if line is None:
                output = "".join(self._said)
                raise Failed(f"exit code {self._process.wait()}: {tail(output)}", output)
            found = _json(line)
            if found is not None:
                return found

    def ask(self, *words: Any) -> dict[str, Any]:
        """Send a line, and wait for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(" ".join(map(str, words)) + "\n")
            self._process.stdin.flush()
        except OSError:  # it has ended, and its last output says why
            pass
        return self.answer()

    def close(self) -> None:
        """End the process: its input does, then signals."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        for signum, patience in ((None, 3), (signal.SIGTERM, 5), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                if signum is not None:
                    os.killpg(self._process.pid, signum)
            try:
                self._process.wait(timeout=patience)
                break
            except subprocess.TimeoutExpired:
                continue
        with contextlib.suppress(ProcessLookupError):  # compilers that it has started
            os.killpg(self._process.pid, signal.SIGKILL)
        self._reader.join(timeout=10)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._said.append(line)
                self._lines.put(line)
        self._lines.put(None)


def missing(*packages: str) -> str | None:
    """Why a part that needs ``packages`` cannot run; None where all are there. Imports none of them."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed" if absent else None


def said(output: str) -> dict[str, Any] | None:
    """The last line of ``output`` that is a JSON object.

    >>> said('{"a": 1}\\na warning\\n{"a": 1, "b"')
    {'a': 1}
    """
    return next((found for line in reversed(output.splitlines()) if (found := _json(line)) is not None), None)


def stop(process: subprocess.Popen[str]) -> str:
    """Ask a process we started to end, then make it and its children; what it had printed."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            return process.communicate(timeout=10)[0]
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    return process.communicate()[0]


def tail(output: str) -> str:
    """The last lines of it, as one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:] or "nothing"


def _json(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
