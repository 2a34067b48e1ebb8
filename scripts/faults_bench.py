"""Runs that the fault suite breaks, and what became of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

EXPERIMENT = ROOT / "tests" / "tiny.py"
STEPS = 100
OFTEN = (
    "epochs=8",
    "eval_every=none",
    "log_every=1",
    "save_every=0.08",
    "max_to_keep=1",
)  # a save, a deletion a step
SOME = ("epochs=8", "eval_every=none", "log_every=1", "save_every=2")


class Case:
    """Counts of one kind of fault: every try is survived, lost or silently wrong.

    Args:
      name: what happens.
      ours: whether jaxtrain promises to survive it, or it is shown for comparison.
    """

    def __init__(self, name: str, ours: bool = True) -> None:
        self.name, self.ours = name, ours
        self.tried = self.survived = self.lost = self.wrong = 0
        self.notes: list[str] = []

    def add(self, outcome: str, note: str = "") -> None:
        self.tried += 1
        setattr(self, outcome, getattr(self, outcome) + 1)
        if note:
            self.notes.append(note)


class Bench:
    """A folder for runs, a compile cache that they share, and the results of undisturbed runs."""

    def __init__(self, folder: Path, quick: bool = False) -> None:
        self.folder, self.number, self.quick = folder, 0, quick
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        self.env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
        self.env["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        self._truth: dict[tuple[Path, tuple[str, ...]], dict[str, bytes]] = {}
        self.experiment = EXPERIMENT

    def fresh(self) -> Path:
        """The folder of a new run, which does not exist yet."""
        self.number += 1
        return self.folder / f"run{self.number}"

    def start(self, run: Path, settings: tuple[str, ...], *words: str, **env: str) -> subprocess.Popen[str]:
        """``python -m jaxtrain.run`` in the background."""
        command = [
            sys.executable,
            "-m",
            "jaxtrain.run",
            "--experiment",
            str(self.experiment),
            "--workdir",
            str(run),
        ]
        for setting in settings:
            command += ["--set", setting]
        return subprocess.Popen(
            [*command, *words],
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, run: Path, settings: tuple[str, ...], *words: str, **env: str) -> tuple[int, str]:
        """Run to the end: exit code and output."""
        process = self.start(run, settings, *words, **env)
        out, error = process.communicate()
        return process.returncode, out + error

    def truth(self, settings: tuple[str, ...]) -> dict[str, bytes]:
        """The final arrays of an undisturbed run."""
        key = self.experiment, settings
        if key not in self._truth:
            run = self.fresh()
            code, said = self.finish(run, settings)
            if code:
                raise SystemExit(f"the undisturbed run failed: {said}")
            self._truth[key] = arrays(run)
        return self._truth[key]

    def judge(self, case: Case, run: Path, settings: tuple[str, ...], code: int, said: str) -> None:
        """Count a resumed run that has ended: survived, lost or wrong."""
        if code:
            case.add(
                "lost", f"exit code {code}: {said.strip().splitlines()[-1][:200] if said.strip() else ''}"
            )
        elif arrays(run) != self.truth(settings):
            case.add("wrong", f"other parameters in {run.name}")
        else:
            case.add("survived")


def arrays(run: Path) -> dict[str, bytes]:
    """The bytes of all arrays of a run's last checkpoint; empty when it is not of the last step."""
    from jaxtrain import checkpoint

    with checkpoint.open(run) as saved:
        newest = saved.latest()
    if newest is None or newest.step != STEPS:
        return {}
    return {path: array.tobytes() for path, array in checkpoint.arrays(f"{run}:{STEPS}").items()}


def wait_for(process: subprocess.Popen[str], text: str) -> bool:
    """Read until a line begins with ``text``; False when the process ended before."""
    assert process.stdout is not None
    return any(line.startswith(text) for line in process.stdout)
