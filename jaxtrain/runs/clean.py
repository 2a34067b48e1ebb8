"""Free the disk of checkpoints that are neither the best nor the latest of their run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import printable
from jaxtrain.runs import lock
from jaxtrain.runs.scan import Run


@dataclasses.dataclass(frozen=True)
class Plan:
    """What cleaning a run removes.

    Attributes:
      run: the run.
      remove: folders of checkpoints, and what interrupted saves and removals left.
      keep: steps that stay, with the reason.
      bytes: of what is removed.
      skipped: why nothing is removed; None where it can be.
    """

    run: Run
    remove: tuple[Path, ...] = ()
    keep: tuple[str, ...] = ()
    bytes: int = 0
    skipped: str | None = None


def plan(run: Run, keep: int = 1) -> Plan:
    """Return what ``clean`` removes now, and remove nothing.

    The best checkpoint on the validation set, the latest ``keep`` and those whose manifest is damaged stay.

    Args:
      run: of ``scan.find``.
      keep: at least 1.
    """
    if lock.is_locked(run.path):
        return Plan(run, skipped="it is in use by a run")
    return _plan(run, keep)


def clean(run: Run, keep: int = 1) -> Plan:
    """Remove what ``plan`` names, while the run's lock is held; returns what was removed.

    Raises:
      InputError: something cannot be removed.
    """
    from jaxtrain.checkpoint import folder as folders  # imports JAX

    with lock.hold(run.path) as reason:
        if reason is not None:
            return Plan(run, skipped=reason)
        found = _plan(run, keep)
        for path in found.remove:
            try:
                folders.remove(path)
            except OSError as error:
                raise InputError(
                    f"{printable(str(path))} cannot be removed ({error.strerror or error})"
                ) from error
        left = [path for path in found.remove if path.exists()]
        if left:
            raise InputError(f"{printable(str(left[0]))} cannot be removed: make its folder writable")
        return found


def _plan(run: Run, keep: int) -> Plan:
    from jaxtrain.checkpoint import folder as folders
    from jaxtrain.checkpoint import manifest

    folder = run.path / "checkpoints"
    if folder.is_symlink():
        return Plan(run, skipped="its checkpoints are behind a link, which is not followed")
    if not folder.is_dir():
        return Plan(run)
    try:
        saved = folders.list_checkpoints(folder)
        complete = [one for one in saved if one.damage is None]
        best = manifest.best(complete)
        latest = complete[-keep:]
        reasons = {
            "damaged": [one for one in saved if one.damage is not None],
            "best": [] if best is None else [best],
            "latest": latest,
        }
        why = {
            one.step: ", ".join(name for name, kept in reasons.items() if one in kept)
            for one in saved
            if any(one in kept for kept in reasons.values())
        }
        stays = tuple(f"{one.folder.name} ({why[one.step]})" for one in saved if one.step in why)
        remove = [one.folder for one in saved if one.step not in why]
        remove += [path for path in sorted(folder.iterdir()) if folders.is_left_over(path)]
        return Plan(run, tuple(remove), stays, sum(map(size, remove)))
    except (OSError, TypeError) as error:  # TypeError: of a score that is no number
        return Plan(run, skipped=f"its checkpoints cannot be read ({error})")


def size(path: Path) -> int:
    """Return the bytes that a folder takes on the disk, through no link."""
    total, waiting = 0, [str(path)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return total
