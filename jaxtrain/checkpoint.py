"""Checkpoints: Orbax writes the arrays, a manifest says what they are and that they are complete.

``checkpoints/000400/state`` is Orbax's; ``checkpoints/000400/manifest.json`` is written after Orbax has
committed, so a folder without one is a save that never finished. Nothing else imports orbax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxtrain.errors import InputError, RunError
from jaxtrain.sharding import processes
from jaxtrain.types import State, leaf_paths

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Saved:
    """One complete checkpoint: its step, its folder and what its manifest says."""

    step: int
    folder: Path
    manifest: dict[str, Any]

    @property
    def score(self) -> float | None:
        """The validation score (higher is better), None when it was not evaluated."""
        return self.manifest.get("score")


@contextlib.contextmanager
def open(workdir: Path, keep: int = 2, about: dict[str, Any] | None = None) -> Iterator[Checkpoints]:
    """The checkpoints of a run; leaving the block waits for the save under way, and raises if it failed.

    Args:
      workdir: the run's folder.
      keep: how many of the latest steps to keep, at least 1; the best one is kept beside them.
      about: JSON put into every manifest (experiment, config hash, versions).
    """
    saved = Checkpoints(Path(workdir).resolve() / "checkpoints", keep, about or {})
    wait = True
    try:
        yield saved
        saved.wait()
    except KeyboardInterrupt:
        wait = False  # a save cut off in the middle may never end
        raise
    finally:
        saved.close(wait)


class Checkpoints:
    """Save, list and restore. Made by ``open``."""

    def __init__(self, folder: Path, keep: int, about: dict[str, Any]) -> None:
        self._folder, self._keep, self._about = folder, keep, about
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None

    def steps(self) -> list[Saved]:
        """Complete checkpoints, oldest first; the same in every process.

        Raises:
          RunError: a manifest that cannot be read.
        """
        listed = processes.first(lambda: [(one.folder.name, one.manifest) for one in _listed(self._folder)])
        return [Saved(int(name), self._folder / name, manifest) for name, manifest in listed]

    def latest(self) -> Saved | None:
        """The newest complete checkpoint."""
        steps = self.steps()
        return steps[-1] if steps else None

    def best(self) -> Saved | None:
        """The complete checkpoint with the highest validation score, the earliest of equals."""
        return _best(self.steps())

    def best_score(self) -> float | None:
        """The score of ``best()``."""
        best = self.best()
        return None if best is None else best.score

    def clean(self) -> list[str]:
        """Remove what a killed process left: unfinished saves and half-deleted steps. Returns their names.

        Raises:
          RunError: the only checkpoints there are have lost their manifests.
        """
        return processes.first(self._clean)

    def _clean(self) -> list[str]:
        stray = [
            p
            for p in self._folder.glob("*")
            if p.name.startswith(".trash-") or (p.name.isdigit() and not (p / "manifest.json").exists())
        ]
        whole = [p for p in stray if p.name.isdigit() and (p / "state").is_dir()]
        if whole and not _listed(self._folder):  # Orbax finished, so this is no save that a kill cut off
            raise RunError(
                f"checkpoint {whole[-1]} has its arrays and no manifest.json: restore that file from a copy, "
                "or delete the folder to start again"
            )
        for path in stray:
            _remove(path)
        return sorted(p.name for p in stray if p.name.isdigit())

    def restore_or(self, init: Callable[[], State], like: State) -> tuple[State, int]:
        """The newest state and its step, or ``init()`` and 0 when nothing was ever saved.

        Args:
          init: makes the first state.
          like: its shapes, dtypes and shardings (``jax.ShapeDtypeStruct`` leaves).

        Raises:
          InputError: the checkpoint is of another model or a newer format.
          RunError: it is there and cannot be read.
        """
        newest = self.latest()
        if newest is None:
            return init(), 0
        return self.restore(newest, like), newest.step

    def restore(self, saved: Saved, like: State) -> State:
        """The state in ``saved``, placed as ``like`` says. Raises as ``restore_or``."""
        from orbax.checkpoint import v1 as ocp

        _check(saved, like)
        paths, tree = _flatten(like)
        try:
            arrays = ocp.load(saved.folder / "state", paths)
        except Exception as error:  # whatever Orbax, TensorStore or the disk has to say
            raise RunError(
                f"checkpoint {saved.folder} cannot be read ({_first_line(error)}): restore the folder from "
                "a copy, or delete it to go on from the step before"
            ) from error
        return jax.tree.unflatten(tree, [arrays[path] for path in paths])

    def save(self, step: int, state: State, score: float | None = None) -> None:
        """Start saving ``state``; returns when it has been copied, while the disk is still being written.

        A save that is still under way is waited for first. A step that is already there is left alone.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        folder = self._folder / f"{step:06d}"
        if processes.agree((folder / "manifest.json").exists(), "checkpoint"):
            return
        paths, _ = _flatten(state)
        manifest = {
            "format": FORMAT,
            "step": step,
            "score": score,
            **self._about,
            "tree": {path: _spec(leaf) for path, leaf in paths.items()},
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            context = ocp.Context()
            # Else every replica writes a slice, by a program compiled for each array and device: training
            # stood still for 35 s at the first save of 30 arrays on 8 CPU devices.
            context.array.saving.use_replica_parallel = False
            with context:
                response = ocp.save_async(folder / "state", paths, overwrite=True)
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = step, self._writer.submit(self._finish, response, folder, manifest)

    def poll(self) -> None:
        """Raise RunError if the save under way has failed; costs about a microsecond."""
        if self._pending is not None and self._pending[1].done() and self._pending[1].exception():
            self.wait()

    def wait(self) -> None:
        """Block until the save under way is on disk, in every process. Raises RunError if it failed."""
        if self._pending is None:
            return
        step, future = self._pending
        self._pending = None
        try:
            future.result()
        except Exception as error:
            raise self._failed(step, error) from error
        processes.barrier("checkpoint")

    def close(self, wait: bool = True) -> None:
        """Let go of the writer thread, without waiting for what it does if ``wait`` is false."""
        self._writer.shutdown(wait, cancel_futures=not wait)

    def _finish(self, response: Any, folder: Path, manifest: dict[str, Any]) -> None:
        response.result()  # in every process: Orbax commits when all have written
        if not processes.is_first():
            return
        write_json(folder / "manifest.json", manifest)
        steps = _listed(self._folder)
        best = _best(steps)
        for old in steps[: -self._keep]:
            if best is None or old.step != best.step:
                _remove(old.folder)

    def _failed(self, step: int, error: Exception) -> RunError:
        kept = _listed(self._folder)
        safe = f"step {kept[-1].step} is safe" if kept else "no step has been saved"
        return RunError(
            f"saving step {step} to {self._folder} failed ({_first_line(error)}); {safe}: "
            "free space or fix the folder, then run the same command again"
        )


def _listed(folder: Path) -> list[Saved]:
    """The complete checkpoints that this process sees, oldest first."""
    found = [p for p in folder.glob("[0-9]*") if p.name.isdigit()]
    return [
        Saved(int(p.name), p, _read_manifest(p / "manifest.json"))
        for p in sorted(found, key=lambda p: int(p.name))
        if (p / "manifest.json").exists()
    ]


def _best(steps: list[Saved]) -> Saved | None:
    scored = [s for s in steps if s.score is not None]
    return max(scored, key=lambda s: (s.score, -s.step)) if scored else None


def _flatten(state: State) -> tuple[dict[str, Any], Any]:
    """Leaves by path (``params/head/kernel``), and the structure to put them back."""
    paths, tree = leaf_paths(state), jax.tree.structure(state)
    if len(paths) != len(jax.tree.leaves(state)):
        raise InputError("two arrays of the state have one path: names must not contain '/'")
    return paths, tree


def _spec(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _check(saved: Saved, like: State) -> None:
    """Orbax casts dtypes and reshapes in silence, so the manifest decides."""
    if saved.manifest.get("format") != FORMAT:
        raise InputError(
            f"checkpoint {saved.folder} has format {saved.manifest.get('format')!r} and this version reads "
            f"{FORMAT}: use the jaxtrain that wrote it ({saved.manifest.get('jaxtrain', 'unknown')})"
        )
    have = saved.manifest["tree"]
    want = {path: _spec(leaf) for path, leaf in _flatten(like)[0].items()}
    for path in [*want, *have]:
        if have.get(path) != want.get(path):
            raise InputError(
                f"checkpoint {saved.folder} is of another model: {path} is {have.get(path, 'absent')} there "
                f"and {want.get(path, 'absent')} here; use another --workdir, or --new"
            )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        manifest["format"], dict(manifest["tree"]), float(manifest["score"] or 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"checkpoint {path.parent} cannot be read (its manifest.json is damaged): restore it from a "
            "copy, or delete the folder to go on from the step before"
        ) from error
    return manifest


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write so that ``path`` is either whole or absent, also after a power cut."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(json.dumps(data, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _remove(folder: Path) -> None:
    """Rename first: a kill half-way through deleting must not leave something that looks like a step."""
    trash = folder
    if not folder.name.startswith(".trash-"):
        trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
        folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
