"""Does a run fit its devices and its disk? Checked from shapes, before anything is compiled."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

import jax

from jaxtrain import checkpoint, sharding
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import size_text
from jaxtrain.program import Program
from jaxtrain.program.device_limits import limit_of
from jaxtrain.program.memory import device_arrays, mesh_of

CHECKPOINTS_AT_ONCE = 2  # at least: the last complete one and the one being written


def check_disk(program: Program, folder: Path) -> None:
    """Raise InputError unless two checkpoints fit on the disk of ``folder``, existing ones included.

    Args:
      program: the run.
      folder: the run's folder, which need not exist yet.
    """
    existing = folder.glob("checkpoints/*/manifest.json") if folder.is_dir() else ()
    count = CHECKPOINTS_AT_ONCE - min(CHECKPOINTS_AT_ONCE - 1, len(list(existing)))
    one = checkpoint.space(program.abstract_state)
    disk = nearest_existing(folder)
    free = shutil.disk_usage(disk).free
    if count * one > free:
        what = "two checkpoints need" if count > 1 else "one more checkpoint needs"
        raise InputError(
            f"{folder}: {what} {size_text(count * one)} ({count * one:,} bytes) and {size_text(free)} "
            f"({free:,} bytes) are free on the disk of {disk}: free space, or choose another --workdir"
        )


def check_memory(program: Program) -> None:
    """Raise InputError if a device cannot hold what stays in its memory between two steps.

    That is parameters, optimizer state, statistics and averages, a batch, and resident data. A run that
    passes may still be too large: only the compiler knows a step's temporaries (``plan``). Does nothing where
    the memory of a device is unknown, as on a CPU.
    """
    limit = limit_of(mesh_of(program))
    if limit is None:
        return
    parts = {part: sum(one.bytes for one in arrays) for part, arrays in device_arrays(program).items()}
    if sum(parts.values()) <= limit.bytes:
        return
    names = {"params": "parameters", "optimizer": "optimizer state", "other_state": "other state"}
    needs = ", ".join(f"{names.get(part, part)} {size_text(size)}" for part, size in parts.items() if size)
    raise InputError(
        f"a device has {size_text(limit.bytes)} and must hold {size_text(sum(parts.values()))} before a step "
        f"computes anything ({needs}): {_fix(program, parts, limit.bytes)}"
    )


def smaller_settings(program: Program) -> list[str]:
    """Settings that make a step need less memory and divide evenly, such as ``accumulate=2``."""
    exp, parts = program.experiment, sharding.batch_parts(mesh_of(program))
    rows = exp.batch // parts
    fits = [n for n in range(2 * exp.accumulate, rows + 1) if rows % n == 0]
    half = exp.batch // 2 // (parts * exp.accumulate) * parts * exp.accumulate
    return [f"accumulate={n}" for n in fits[:1]] + [f"batch={n}" for n in (half,) if n]


def _fix(program: Program, parts: dict[str, int], limit: int) -> str:
    """What to change, by the part that is too large."""
    mesh, exp = mesh_of(program), program.experiment
    if parts["data"] and sum(parts.values()) - parts["data"] <= limit:
        return "--set placement=stream keeps the data on the host"
    state = sum(parts[name] for name in ("params", "optimizer", "other_state"))
    if state + parts["batch"] > limit >= state:
        each = sharding.batch_parts(mesh) * exp.accumulate
        most = (limit - state) * exp.batch // parts["batch"] // each * each
        if most:
            return f"--set batch={most} is the largest that leaves any room"
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state))
    if state_bytes <= limit * mesh.size and mesh.shape["fsdp"] < mesh.size:
        return f"--mesh fsdp={mesh.size} splits the state over the {mesh.size} devices"
    return (
        f"its state of {size_text(state_bytes)} needs {math.ceil(state_bytes / limit)} such devices or more "
        "with --mesh fsdp=*, a smaller model, or an optimizer that keeps less"
    )


def check_folder(folder: Path) -> None:
    """Raise InputError unless ``folder`` can be created or written; leaves nothing behind.

    Tries to write, because permission bits do not bind root and do not show quotas or read-only disks. The
    folder of a finished run need not be writable.

    >>> check_folder(Path("runs"))
    """
    where = ""
    if not str(folder).isascii():
        _check_name(folder)
    try:
        if folder.is_file():
            raise InputError(f"{folder} is a file: give a folder")
        if (folder / "result.json").exists():
            return
        parent = nearest_existing(folder)
        where = "" if parent == folder.absolute() else f" in {parent}"
        with tempfile.TemporaryFile(dir=parent):  # unnamed, where the file system can
            pass
    except OSError as error:  # also a folder without read permission
        raise InputError(
            f"{folder} cannot be written ({error.strerror}){where}: choose another --workdir"
        ) from error


def _check_name(folder: Path) -> None:
    """Raise InputError for a name that Orbax cannot write, because it is not UTF-8 in this locale."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{folder}: the name is not UTF-8: choose another --workdir, or set LC_ALL=C.UTF-8"
        ) from error


def nearest_existing(folder: Path) -> Path:
    """``folder``, or its closest parent that exists.

    >>> nearest_existing(Path("/nothing/of/the/kind"))
    PosixPath('/')
    """
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
