"""The folder of a run's checkpoints: list, clean, remove and set aside. Follows no links."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from jaxtrain.checkpoint import manifest
from jaxtrain.checkpoint.manifest import CheckpointInfo
from jaxtrain.core.errors import InputError

SAVING = ".saving"
"""A file in a step's folder from the start of its save until its manifest is written."""


def step_folder(folder: Path, step: int) -> Path:
    """``checkpoints/000400``."""
    return folder / f"{step:06d}"


def list_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """Return the checkpoints in ``folder``, damaged ones too, oldest first; not the unfinished saves."""
    steps = [(step, p) for p in folder.glob("*") if (step := _step(p)) is not None and not is_unfinished(p)]
    return [manifest.read(path, step) for step, path in sorted(steps)]


def clean(folder: Path) -> list[str]:
    """Remove unfinished saves and half-deleted steps; returns a line for the user about each finding.

    Raises:
      InputError: the folder is a file, or a link, behind which may be another run's checkpoints.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file where the folder of checkpoints must be: move it away")
    if folder.is_symlink():
        raise InputError(
            f"{folder} is a link, which is not followed: give the run's real folder with --workdir"
        )
    lines, strays = [], []
    for path in sorted(folder.glob("*")):
        if path.name.startswith(".trash-"):
            remove(path)
        elif _step(path) is None:
            strays += [] if path.name.startswith("damaged-") else [path.name]
        elif is_unfinished(path):
            remove(path)
            lines.append(f"the save of step {path.name} was unfinished and has been removed")
    if strays:
        lines.append(f"{folder} also contains {', '.join(strays)}: not a checkpoint, ignored")
    return lines


def remove(path: Path) -> None:
    """Delete a checkpoint. Rename it first, so that a kill leaves nothing that looks like a checkpoint."""
    trash = path
    if path.parent.is_symlink():
        raise OSError(f"{path.parent} is a link, which is not followed")
    if not path.name.startswith(".trash-"):
        trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
        path.rename(trash)
    if trash.is_symlink() or trash.is_file():
        trash.unlink()
    else:
        shutil.rmtree(trash, ignore_errors=True)  # follows no links either


def set_aside(path: Path) -> str:
    """Rename a damaged checkpoint, so that its step can be saved again; returns the new name."""
    number, to = 2, path.with_name(f"damaged-{path.name}")
    while to.exists() or to.is_symlink():
        to = path.with_name(f"damaged-{path.name}-{number}")
        number += 1
    path.rename(to)
    return to.name


def is_left_over(path: Path) -> bool:
    """Return whether an interrupted save or removal left this folder; not while the run is saving."""
    return path.name.startswith(".trash-") or (_step(path) is not None and is_unfinished(path))


def _step(path: Path) -> int | None:
    """Return the step in a folder's name; None for a folder that no save made, such as ``99``."""
    if not (path.name.isascii() and path.name.isdigit()) or not (path.is_dir() or path.is_symlink()):
        return None
    step = int(path.name)
    return step if path.name == f"{step:06d}" and (path.is_symlink() or _is_ours(path)) else None


def _is_ours(path: Path) -> bool:
    """Return whether a folder is empty or contains a file that a save writes."""
    names = {child.name for child in path.iterdir()}
    started = all(name.startswith("state.orbax-checkpoint-tmp") for name in names)
    return started or bool(names & {SAVING, "state", "manifest.json"})


def is_unfinished(path: Path) -> bool:
    """Return whether the manifest was never written. (A lost one is damage: then there is no ``SAVING``.)"""
    if path.is_symlink() or (path / "manifest.json").exists() or (path / "manifest.json").is_symlink():
        return False
    return (path / SAVING).exists() or not (path / "state").exists()
