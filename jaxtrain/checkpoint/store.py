"""Saving and restoring through Orbax, and the proof that what is restored is what was saved."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint import async_save, fingerprint
from jaxtrain.checkpoint import folder as folders
from jaxtrain.checkpoint import manifest as manifests
from jaxtrain.checkpoint.manifest import CheckpointInfo, CorruptCheckpointError
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line, size_text
from jaxtrain.core.types import State, leaf_paths
from jaxtrain.sharding import multihost


@contextlib.contextmanager
def open(
    workdir: Path,
    max_to_keep: int = 2,
    about: dict[str, Any] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    older: str = "go on from an older one with --resume last-good",
) -> Iterator[Checkpoints]:
    """The checkpoints of a run; leaving the block waits for the save under way, and raises if it failed.

    Args:
      workdir: the run's folder.
      max_to_keep: how many of the latest steps to keep, at least 1; the best one is kept beside them.
      about: JSON put into every manifest (experiment, config hash, versions); with ``run``, the run's own
        name, checkpoints that another run has written are refused.
      tell: called in process 0 with each line that a person should read.
      older: what to do about a damaged checkpoint when there is an older one, of step ``{step}``.
    """
    saved = Checkpoints(Path(workdir).resolve() / "checkpoints", max_to_keep, about or {}, tell, older)
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

    def __init__(
        self, folder: Path, max_to_keep: int, about: dict[str, Any], tell: Callable[[str], None], older: str
    ) -> None:
        self._folder, self._max_to_keep, self._about, self._tell = folder, max_to_keep, about, tell
        self._older = older
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, int, Future[None]] | None = None
        self._compiled: Future[None] | None = None

    def steps(self) -> list[CheckpointInfo]:
        """Complete checkpoints, oldest first; the same in every process.

        Raises:
          Damaged: a manifest that cannot be read.
        """
        steps = self._agreed(
            lambda: [(saved, saved.damage) for saved in folders.list_checkpoints(self._folder)]
        )
        for saved, damage in steps:
            if damage is not None:
                raise self._damaged(saved, damage)
        return [saved for saved, _ in steps]

    def latest(self) -> CheckpointInfo | None:
        """The newest complete checkpoint."""
        steps = self.steps()
        return steps[-1] if steps else None

    def best(self) -> CheckpointInfo | None:
        """The complete checkpoint with the highest validation score, the earliest of equals."""
        return manifests.best(self.steps())

    def best_score(self) -> float | None:
        """The score of ``best()``."""
        best = self.best()
        return None if best is None else best.score

    def clean(self) -> None:
        """Remove what a killed process left, unfinished saves and half-deleted steps, and tell of it."""
        for line in multihost.on_process_0(lambda: folders.clean(self._folder)):
            self._note(line)

    def restore_or(
        self, init: Callable[[], State], abstract: State, resume: str = "newest"
    ) -> tuple[State, int]:
        """The newest state and its step, or ``init()`` and 0 when nothing was ever saved.

        Args:
          init: makes the first state.
          abstract: its shapes, dtypes and shardings (``jax.ShapeDtypeStruct`` leaves).
          resume: ``"newest"``, or ``"last-good"``: damaged checkpoints are told of and set aside as
            ``damaged-000400``, whether newer or older, and the newest of the others is taken.

        Raises:
          InputError: the checkpoint is of another model or a newer format.
          Damaged: it is there and not what was saved; with ``"last-good"``, all are.
        """
        if resume == "last-good":
            return self._last_good(abstract) or (init(), 0)
        newest = self.latest()
        if newest is None:
            state, paths = init(), leaf_paths(abstract)
            if multihost.process_count() == 1 and not async_save.uses_copies(
                paths
            ):  # which the first save would wait for
                self._compiled = self._writer.submit(fingerprint.prepare, paths)
            return state, 0
        self._check_run(newest)
        return self.restore(newest, abstract), newest.step

    def restore(self, saved: CheckpointInfo, abstract: State) -> State:
        """The state in ``saved``, placed as ``like`` says, and proven. Raises as ``restore_or``."""
        paths, tree = _flatten(abstract)
        manifests.check_same(saved, paths)
        arrays = self.restore_some(saved, paths)
        return jax.tree.unflatten(tree, [arrays[path] for path in paths])

    def check(self, saved: CheckpointInfo) -> None:
        """Raise Damaged unless every file of ``saved`` is what was saved."""
        damage = multihost.on_process_0(lambda: manifests.find_damage(saved))
        if damage is not None:
            raise self._damaged(saved, damage)

    def _check_run(self, saved: CheckpointInfo) -> None:
        """Raise InputError for a checkpoint that another run has written, where both say which they are."""
        theirs, ours = saved.manifest.get("run"), self._about.get("run")
        if theirs is not None and ours is not None and theirs != ours:
            raise InputError(
                f"checkpoint {saved.folder} was written by another run ({saved.manifest.get('experiment')}, "
                f"config {saved.manifest.get('hash')}): take it out of the folder; to begin with its "
                "parameters use --init-from"
            )

    def restore_some(self, saved: CheckpointInfo, abstract: dict[str, Any]) -> dict[str, jax.Array]:
        """Some of the arrays in ``saved`` by path, which must have the shapes and dtypes of ``abstract``."""
        self.check(saved)
        try:
            return _load(saved, abstract, self._note)
        except CorruptCheckpointError as error:
            raise self._damaged(saved, str(error)) from error

    def _last_good(self, abstract: State) -> tuple[State, int] | None:
        """The newest good state and its step, None where nothing was saved; sets the damaged aside."""
        steps = self._agreed(
            lambda: [(s, manifests.find_damage(s)) for s in folders.list_checkpoints(self._folder)]
        )
        bad = {saved.step: damage for saved, damage in steps if damage is not None}
        state = None
        for saved, damage in reversed(steps):
            if damage is None:
                self._check_run(saved)
                paths, tree = _flatten(abstract)
                manifests.check_same(saved, paths)
                try:
                    arrays = _load(saved, paths, self._note)
                    state = jax.tree.unflatten(tree, [arrays[path] for path in paths]), saved.step
                    break
                except CorruptCheckpointError as error:
                    bad[saved.step] = str(error)
        if steps and state is None:
            raise CorruptCheckpointError(
                f"no checkpoint in {self._folder} is good (step {max(bad)}: {bad[max(bad)]}): restore one "
                "from a copy, or start again with --new"
            )
        for step, damage in sorted(bad.items()):
            path = folders.step_folder(self._folder, step)
            now = multihost.on_process_0(functools.partial(folders.set_aside, path))
            self._note(f"WARNING: checkpoint {path} is damaged and has been renamed to {now}: {damage}")
        return state

    def save(self, step: int, state: State, score: float | None = None) -> None:
        """Start saving ``state``, which may be donated at once; the disk is written in the background.

        A save that is still under way is waited for first. A step that is already there is left alone.
        On CPUs it does not even wait for the copy, which the next step does before it reuses the memory.
        """
        self.wait()
        folder = folders.step_folder(self._folder, step)
        if multihost.broadcast_from_0((folder / "manifest.json").exists(), "checkpoint"):
            return
        paths, _ = _flatten(state)
        manifest = {
            "format": manifests.FORMAT,
            "step": step,
            "score": score,
            **self._about,
            "tree": {path: manifests.spec(leaf) for path, leaf in paths.items()},
        }
        size = space(state)
        try:
            for path in (folder, folder / "state"):
                if path.is_symlink():
                    raise OSError(f"{path} is a link, which is not followed")
            folder.mkdir(parents=True, exist_ok=True)
            if multihost.is_process_0():
                (folder / folders.SAVING).touch()
            if self._compiled is not None:
                self._compiled.exception()  # waits; an error is left to the call
            write = async_save.start_save(folder / "state", paths)
        except Exception as error:
            raise self._failed(step, size, error) from error
        self._pending = step, size, self._writer.submit(self._finish, write, folder, manifest)

    def poll(self) -> None:
        """Raise RunError if the save under way has failed; costs about a microsecond."""
        if self._pending is not None and self._pending[2].done() and self._pending[2].exception():
            self.wait()

    def wait(self) -> None:
        """Block until the save under way is on disk, in every process. Raises RunError if it failed."""
        if self._pending is None:
            return
        step, size, future = self._pending
        self._pending = None
        try:
            future.result()
        except Exception as error:
            raise self._failed(step, size, error) from error
        multihost.barrier("checkpoint")

    def close(self, wait: bool = True) -> None:
        """Let go of the writer thread, without waiting for what it does if ``wait`` is false."""
        self._writer.shutdown(wait, cancel_futures=not wait)

    def _finish(self, write: Callable[[], Any], folder: Path, manifest: dict[str, Any]) -> None:
        prints = write()  # in every process: Orbax commits when all have written
        if not multihost.is_process_0():
            return
        manifests.write(folder, {**manifest, "fingerprints": fingerprint.finish(manifest["tree"], prints)})
        (folder / folders.SAVING).unlink()
        steps = [saved for saved in folders.list_checkpoints(self._folder) if saved.damage is None]
        best = manifests.best(steps)
        for old in steps[: -self._max_to_keep]:
            if best is None or old.step != best.step:
                folders.remove(old.folder)

    def _agreed(
        self, look: Callable[[], list[tuple[CheckpointInfo, str | None]]]
    ) -> list[tuple[CheckpointInfo, str | None]]:
        """What process 0 finds, in every process: checkpoints, and what is damaged of each."""
        found = multihost.on_process_0(
            lambda: [(s.step, s.folder.name, s.manifest, s.damage, more) for s, more in look()]
        )
        return [
            (CheckpointInfo(step, self._folder / name, manifest, damage), more)
            for step, name, manifest, damage, more in found
        ]

    def _damaged(self, saved: CheckpointInfo, damage: str) -> CorruptCheckpointError:
        older = [
            s for s in folders.list_checkpoints(self._folder) if s.step < saved.step and s.damage is None
        ]
        fix = self._older.format(step=older[-1].step) if older else "start again with --new"
        return CorruptCheckpointError(
            f"checkpoint {saved.folder} is damaged: {damage}; restore it from a copy, or {fix}"
        )

    def _failed(self, step: int, size: int, error: Exception) -> RunError:
        unfinished = folders.step_folder(self._folder, step)
        if multihost.is_process_0() and folders.is_unfinished(unfinished):
            with contextlib.suppress(OSError):  # what was written of it would keep the space
                folders.remove(unfinished)
        kept = [saved for saved in folders.list_checkpoints(self._folder) if saved.damage is None]
        safe = f"step {kept[-1].step} is safe" if kept else "no step has been saved"
        there = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        free = size_text(shutil.disk_usage(there).free)
        return RunError(
            f"saving step {step} to {self._folder} failed ({type(error).__name__}: "
            f"{first_line(error)[:200]}); {safe}; a checkpoint needs {size_text(size)} and {free} are free: "
            "free space or fix the folder, then run the same command again"
        )

    def _note(self, line: str) -> None:
        if multihost.is_process_0():
            self._tell(line)


def space(state: Any) -> int:
    """Bytes on a disk that a checkpoint of ``state`` may take, at most: Orbax compresses, and adds its own.

    Measured on 10 and on 12 arrays: up to 78 kB more than the arrays hold.
    """
    leaves = jax.tree.leaves(state)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + 64_000 + 2_000 * len(leaves)


def _load(
    saved: CheckpointInfo, abstract: dict[str, Any], note: Callable[[str], None]
) -> dict[str, jax.Array]:
    """Arrays out of files that are known to be what was saved. Raises Damaged if the arrays are not."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            arrays: dict[str, jax.Array] = ocp.load(saved.folder / "state", abstract)
    except Exception as error:  # whatever Orbax, TensorStore or the disk has to say
        raise CorruptCheckpointError(
            f"it cannot be read ({type(error).__name__}: {first_line(error)[:200]})"
        ) from error
    if saved.has_checksums:
        then = saved.manifest["fingerprints"]
        for path, now in fingerprint.finish(arrays, fingerprint.start(arrays)).items():
            if now != then.get(path):
                raise CorruptCheckpointError(
                    f"the array {path} is not what was saved (its fingerprint differs)"
                )
    else:
        note(f"checkpoint {saved.folder} has no checksums (an older version wrote it): not verified")
    return arrays


def _flatten(state: State) -> tuple[dict[str, Any], Any]:
    """Leaves by path (``params/head/kernel``), and the structure to put them back."""
    paths, tree = leaf_paths(state), jax.tree.structure(state)
    if len(paths) != len(jax.tree.leaves(state)):
        raise InputError("two arrays of the state have one path: names must not contain '/'")
    return paths, tree
