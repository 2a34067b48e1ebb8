"""Save and restore through Orbax, and verify that what is restored is what was saved."""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint import async_save, fingerprint
from jaxtrain.checkpoint import folder as folders
from jaxtrain.checkpoint import manifest as manifests
from jaxtrain.checkpoint.load import flatten, load_arrays
from jaxtrain.checkpoint.manifest import CheckpointInfo, CorruptCheckpointError
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line, size_text
from jaxtrain.core.types import State, leaf_paths, without_teacher
from jaxtrain.sharding import multihost


@contextlib.contextmanager
def open(
    workdir: Path,
    max_to_keep: int = 2,
    about: dict[str, Any] | None = None,
    log: Callable[[str], None] = lambda line: None,
    older_hint: str = "resume from an older one with --resume last-good",
    on_save: Callable[[int, Path], None] = lambda step, folder: None,
) -> Iterator[Checkpoints]:
    """Open the checkpoints of a run; the end of the block waits for a pending save, and raises if it failed.

    Args:
      workdir: the run's folder.
      max_to_keep: how many of the latest steps to keep, at least 1; the best one is kept too.
      about: JSON for every manifest (experiment, config hash, versions). With ``run``, the name of the run,
        checkpoints that another run has written are refused.
      log: called in process 0 with a line for the user.
      older_hint: what to do about a damaged checkpoint when there is an older one, of step ``{step}``.
      on_save: called in process 0, in the thread that writes, when the checkpoint of a step is complete.
    """
    folder = Path(workdir).resolve() / "checkpoints"
    saved = Checkpoints(folder, max_to_keep, about or {}, log, older_hint, on_save)
    wait = True
    try:
        yield saved
        saved.wait()
    except KeyboardInterrupt:
        wait = False  # an interrupted save may never end
        raise
    finally:
        saved.close(wait)


class Checkpoints:
    """Save, list and restore. Made by ``open``."""

    def __init__(
        self,
        folder: Path,
        max_to_keep: int,
        about: dict[str, Any],
        log: Callable[[str], None],
        older_hint: str,
        on_save: Callable[[int, Path], None] = lambda step, folder: None,
    ) -> None:
        self._folder, self._max_to_keep, self._about, self._log = folder, max_to_keep, about, log
        self._older_hint, self._on_save = older_hint, on_save
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, int, Future[None]] | None = None
        self._compiled: Future[None] | None = None

    def steps(self) -> list[CheckpointInfo]:
        """Return the complete checkpoints, oldest first; the same in every process.

        Raises:
          CorruptCheckpointError: a manifest is damaged.
        """
        steps = self._on_process_0(
            lambda: [(saved, saved.damage) for saved in folders.list_checkpoints(self._folder)]
        )
        for saved, damage in steps:
            if damage is not None:
                raise self._corrupt_error(saved, damage)
        return [saved for saved, _ in steps]

    def latest(self) -> CheckpointInfo | None:
        """Return the newest complete checkpoint."""
        steps = self.steps()
        return steps[-1] if steps else None

    def best(self) -> CheckpointInfo | None:
        """Return the complete checkpoint with the highest validation score, the earliest of equals."""
        return manifests.best(self.steps())

    def best_score(self) -> float | None:
        """Return the score of ``best()``."""
        best = self.best()
        return None if best is None else best.score

    def clean(self) -> None:
        """Remove and report what a killed process left: unfinished saves and half-deleted steps."""
        for line in multihost.on_process_0(lambda: folders.clean(self._folder)):
            self._log_on_process_0(line)

    def restore_or(
        self, init: Callable[[], State], abstract: State, resume: str = "newest"
    ) -> tuple[State, int]:
        """Restore the newest state and its step, or return ``init()`` and 0 when there is no checkpoint.

        A state that is restored has no teacher (``core.types.TEACHER``).

        Args:
          init: creates the first state.
          abstract: its shapes, dtypes and shardings (``jax.ShapeDtypeStruct`` leaves).
          resume: ``"newest"``, or ``"last-good"``: every damaged checkpoint, newer or older, is reported and
            renamed to ``damaged-000400``, and the newest of the others is restored.

        Raises:
          InputError: the checkpoint is of another model or a newer format.
          CorruptCheckpointError: the newest is damaged; with ``"last-good"``, all are.
        """
        if resume == "last-good":
            return self._last_good(abstract) or (init(), 0)
        newest = self.latest()
        if newest is None:
            state, paths = init(), leaf_paths(without_teacher(abstract))
            if multihost.process_count() == 1 and not async_save.uses_copies(paths):
                # The first save would wait for it.
                self._compiled = self._writer.submit(fingerprint.prepare, paths)
            return state, 0
        self._check_run(newest)
        return self.restore(newest, abstract), newest.step

    def restore(self, saved: CheckpointInfo, abstract: State) -> State:
        """Restore and verify the state in ``saved``, sharded as ``abstract``; raises as ``restore_or``.

        It has no teacher, which no checkpoint holds.
        """
        paths, tree = flatten(without_teacher(abstract))
        manifests.check_same(saved, paths)
        arrays = self.restore_some(saved, paths)
        return jax.tree.unflatten(tree, [arrays[path] for path in paths])

    def check(self, saved: CheckpointInfo) -> None:
        """Raise CorruptCheckpointError unless every file of ``saved`` is what was saved."""
        damage = multihost.on_process_0(lambda: manifests.find_damage(saved))
        if damage is not None:
            raise self._corrupt_error(saved, damage)

    def _check_run(self, saved: CheckpointInfo) -> None:
        """Raise InputError for a checkpoint that another run has written, where both runs have a name."""
        theirs, ours = saved.manifest.get("run"), self._about.get("run")
        if theirs is not None and ours is not None and theirs != ours:
            raise InputError(
                f"checkpoint {saved.folder} was written by another run ({saved.manifest.get('experiment')}, "
                f"config {saved.manifest.get('hash')}): move it out of the folder, or start from "
                "its parameters with --init-from"
            )

    def restore_some(self, saved: CheckpointInfo, abstract: dict[str, Any]) -> dict[str, jax.Array]:
        """Restore the arrays of ``saved`` that ``abstract`` names, by path; shapes and dtypes must match."""
        self.check(saved)
        try:
            return load_arrays(saved, abstract, self._log_on_process_0)
        except CorruptCheckpointError as error:
            raise self._corrupt_error(saved, str(error)) from error

    def _last_good(self, abstract: State) -> tuple[State, int] | None:
        """Restore the newest undamaged state, and rename the damaged; None where nothing was saved."""
        steps = self._on_process_0(
            lambda: [(s, manifests.find_damage(s)) for s in folders.list_checkpoints(self._folder)]
        )
        bad = {saved.step: damage for saved, damage in steps if damage is not None}
        state = None
        for saved, damage in reversed(steps):
            if damage is None:
                self._check_run(saved)
                paths, tree = flatten(without_teacher(abstract))
                manifests.check_same(saved, paths)
                try:
                    arrays = load_arrays(saved, paths, self._log_on_process_0)
                    state = jax.tree.unflatten(tree, [arrays[path] for path in paths]), saved.step
                    break
                except CorruptCheckpointError as error:
                    bad[saved.step] = str(error)
        if steps and state is None:
            raise CorruptCheckpointError(
                f"all checkpoints in {self._folder} are damaged (step {max(bad)}: {bad[max(bad)]}): restore "
                "one from a copy, or train again with jaxtrain.run --new"
            )
        for step, damage in sorted(bad.items()):
            path = folders.step_folder(self._folder, step)
            now = multihost.on_process_0(functools.partial(folders.set_aside, path))
            self._log_on_process_0(
                f"WARNING: checkpoint {path} is damaged and has been renamed to {now}: {damage}"
            )
        return state

    def save(self, step: int, state: State, score: float | None = None) -> None:
        """Start saving ``state`` in the background; it may be donated when this returns.

        This waits for a pending save. It does nothing for a step that is saved already. On CPUs it does not
        wait for the copy either: the next step does, before it reuses the memory.
        """
        self.wait()
        folder = folders.step_folder(self._folder, step)
        if multihost.broadcast_from_0((folder / "manifest.json").exists(), "checkpoint"):
            return
        state = without_teacher(state)
        paths, _ = flatten(state)
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
                self._compiled.exception()  # waits; the call below raises the error
            write = async_save.start_save(folder / "state", paths)
        except Exception as error:
            raise self._save_error(step, size, error) from error
        self._pending = step, size, self._writer.submit(self._finish, write, folder, manifest)

    def poll(self) -> None:
        """Raise RunError if the pending save has failed; costs about a microsecond."""
        if self._pending is not None and self._pending[2].done() and self._pending[2].exception():
            self.wait()

    def wait(self) -> None:
        """Wait until the pending save is on disk, in every process. Raises RunError if it failed."""
        if self._pending is None:
            return
        step, size, future = self._pending
        self._pending = None
        try:
            future.result()
        except Exception as error:
            raise self._save_error(step, size, error) from error
        multihost.barrier("checkpoint")

    def close(self, wait: bool = True) -> None:
        """End the writer thread; with ``wait=False`` without waiting for a pending save."""
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
        self._on_save(manifest["step"], folder)

    def _on_process_0(
        self, find: Callable[[], list[tuple[CheckpointInfo, str | None]]]
    ) -> list[tuple[CheckpointInfo, str | None]]:
        """Run ``find`` on process 0 and return its checkpoints and their damage in every process."""
        found = multihost.on_process_0(
            lambda: [(s.step, s.folder.name, s.manifest, s.damage, more) for s, more in find()]
        )
        return [
            (CheckpointInfo(step, self._folder / name, manifest, damage), more)
            for step, name, manifest, damage, more in found
        ]

    def _corrupt_error(self, saved: CheckpointInfo, damage: str) -> CorruptCheckpointError:
        older = [
            s for s in folders.list_checkpoints(self._folder) if s.step < saved.step and s.damage is None
        ]
        fix = self._older_hint.format(step=older[-1].step) if older else "train again with jaxtrain.run --new"
        return CorruptCheckpointError(
            f"checkpoint {saved.folder} is damaged: {damage}; restore it from a copy, or {fix}"
        )

    def _save_error(self, step: int, size: int, error: Exception) -> RunError:
        unfinished = folders.step_folder(self._folder, step)
        if multihost.is_process_0() and folders.is_unfinished(unfinished):
            with contextlib.suppress(OSError):  # to free the space
                folders.remove(unfinished)
        complete = [saved for saved in folders.list_checkpoints(self._folder) if saved.damage is None]
        safe = f"step {complete[-1].step} is safe" if complete else "no step has been saved"
        existing = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        fix = "fix that"
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(existing).free
            if free < size or _is_out_of_space(error):
                fix = f"a checkpoint needs {size_text(size)} and {size_text(free)} are free: free space"
        return RunError(
            f"saving step {step} to {self._folder} failed ({type(error).__name__}: "
            f"{first_line(error)[:200]}); {safe}; {fix}, then run the same command again"
        )

    def _log_on_process_0(self, line: str) -> None:
        if multihost.is_process_0():
            self._log(line)


def _is_out_of_space(error: BaseException | None) -> bool:
    """Whether a save failed because the disk or a quota is full; Orbax and TensorStore pass it on as text."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search(r"No space left|Disk quota exceeded|ENOSPC|EDQUOT", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def space(state: State) -> int:
    """Return the bytes on disk that a checkpoint of ``state`` takes at most.

    Measured on 10 and on 12 arrays: Orbax adds up to 78 kB.
    """
    leaves = jax.tree.leaves(without_teacher(state))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + 64_000 + 2_000 * len(leaves)
