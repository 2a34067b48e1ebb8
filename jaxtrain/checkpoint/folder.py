"""The folder of a run's checkpoints: which are there, and what is removed or set aside. Follows no link."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from jaxtrain.checkpoint import manifest
from jaxtrain.checkpoint.manifest import CheckpointInfo
from jaxtrain.core.errors import InputError

SAVING = ".saving"
"""A file in a step's folder from before its save begins until its manifest is written."""


def step_folder(folder: Path, step: int) -> Path:
    """``checkpoints/000400``."""
    return folder / f"{step:06d}"


def list_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """The checkpoints that this process sees, damaged ones too, oldest first; unfinished saves are none."""
    steps = [(step, p) for p in folder.glob("*") if (step := _step(p)) is not None and not is_unfinished(p)]
    return [manifest.read(path, step) for step, path in sorted(steps)]


def clean(folder: Path) -> list[str]:
    """Remove unfinished saves and what is half deleted; returns a line to tell of each thing found.

    Raises:
      InputError: the folder is a file; or a link, and what is removed in it would be another run's.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, and checkpoints go into a folder of that name: move it away")
    if folder.is_symlink():
        raise InputError(
            f"{folder} is a link, which is not followed: put the whole run there instead, with --workdir"
        )
    lines, strays = [], []
    for path in sorted(folder.glob("*")):
        if path.name.startswith(".trash-"):
            remove(path)
        elif _step(path) is None:
            strays += [] if path.name.startswith("damaged-") else [path.name]
        elif is_unfinished(path):
            remove(path)
            lines.append(f"step {path.name} was never completely saved and has been removed")
    if strays:
        lines.append(f"{folder} also holds {', '.join(strays)}: no checkpoint, and left alone")
    return lines


def remove(path: Path) -> None:
    """Rename first: a kill half-way through deleting must not leave something that looks like a step."""
    trash = path
    if path.parent.is_symlink():
        raise OSError(f"{path.parent} is a link, which is not followed")
    if not path.name.startswith(".trash-"):
        trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
        path.rename(trash)
    if trash.is_symlink() or trash.is_file():
        trash.unlink()
    else:
        shutil.rmtree(trash, ignore_errors=True)  # it does not follow links either


def set_aside(path: Path) -> str:
    """Rename a damaged checkpoint, so that it counts as none and its step can be saved again."""
    number, to = 2, path.with_name(f"damaged-{path.name}")
    while to.exists() or to.is_symlink():
        to = path.with_name(f"damaged-{path.name}-{number}")
        number += 1
    path.rename(to)
    return to.name


def _step(path: Path) -> int | None:
    """The step that a folder is named for, None where it is not one of ours: ``99`` is a stray."""
    if not (path.name.isascii() and path.name.isdigit()) or not (path.is_dir() or path.is_symlink()):
        return None
    step = int(path.name)
    return step if path.name == f"{step:06d}" and (path.is_symlink() or _is_ours(path)) else None


def _is_ours(path: Path) -> bool:
    """Is it empty, or is something in it that a save makes?"""
    names = {child.name for child in path.iterdir()}
    begun = all(name.startswith("state.orbax-checkpoint-tmp") for name in names)
    return begun or bool(names & {SAVING, "state", "manifest.json"})


def is_unfinished(path: Path) -> bool:
    """Was there never a manifest? (Where one has been lost there is no ``SAVING``, and that is damage.)"""
    if path.is_symlink() or (path / "manifest.json").exists() or (path / "manifest.json").is_symlink():
        return False
    return (path / SAVING).exists() or not (path / "state").exists()
