"""Processes with time limits, for ``scripts/gpu_check.py``."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """A part that cannot run here, and why."""


class Failed(Exception):
    """A part that went wrong, and how."""


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

    def left(self) -> float:
        """Seconds the running part may still take."""
        return self.began + self.limit - time.monotonic()

    def start(self, *args: Any, **env: str) -> subprocess.Popen[str]:
        """``python ARGS`` in the scratch folder, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, *map(str, args)],
            cwd=self.scratch,
            env={**self.env, **env, "GPU_CHECK_BEGAN": repr(time.time())},
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
            raise TimedOut(f"not finished in {self.limit:.0f} s; last output: {tail(output)}") from None
        if process.returncode != want:
            raise Failed(f"exit code {process.returncode} instead of {want}: {tail(output)}")
        return output

    def child(self, *args: Any, **env: str) -> dict[str, Any]:
        """A function of ``benchmarks/gpu_child.py``: the JSON on the last line it prints."""
        output = self.run("-m", "benchmarks.gpu_child", *args, **env)
        found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        return found

    def train(self, name: str, folder: str, settings: dict[str, Any]) -> list[str]:
        """Arguments of the training command."""
        pairs = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
        return ["-m", "jaxtrain.run", "--experiment", name, *pairs, "--workdir", str(self.scratch / folder)]


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
