"""Is there room for a run, on its devices and on its disk? Told from shapes, before anything is compiled."""

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

SAVED = 2  # checkpoints that are there at once, at least: the last good one and the one being written


def check_disk(program: Program, folder: Path) -> None:
    """Raise InputError unless two checkpoints fit on the disk of ``folder``, or one beside one that is there.

    Args:
      program: the run.
      folder: the run's, which need not be there yet.
    """
    there = folder.glob("checkpoints/*/manifest.json") if folder.is_dir() else ()
    count = SAVED - min(SAVED - 1, len(list(there)))
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
    """Raise InputError if a device cannot even hold what lies there between two steps.

    That is parameters, optimizer state, statistics and averages, a batch, and data that is kept there. A run
    that passes may still be too large: a step's temporaries are known to the compiler only (``plan``).
    Nothing is asked where a device's memory is unknown, as on a CPU.
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
    """Settings with which a step needs less memory, and that divide as they must: ``accumulate=2``."""
    exp, parts = program.experiment, sharding.batch_parts(mesh_of(program))
    rows = exp.batch // parts
    fits = [n for n in range(2 * exp.accumulate, rows + 1) if rows % n == 0]
    half = exp.batch // 2 // (parts * exp.accumulate) * parts * exp.accumulate
    return [f"accumulate={n}" for n in fits[:1]] + [f"batch={n}" for n in (half,) if n]


def _fix(program: Program, parts: dict[str, int], limit: int) -> str:
    """What to change, for the part that is too large."""
    mesh, exp = mesh_of(program), program.experiment
    if parts["data"] and sum(parts.values()) - parts["data"] <= limit:
        return "--set placement=stream keeps the data on the host"
    state = sum(parts[name] for name in ("params", "optimizer", "other_state"))
    if state + parts["batch"] > limit >= state:
        each = sharding.batch_parts(mesh) * exp.accumulate
        most = (limit - state) * exp.batch // parts["batch"] // each * each
        if most:
            return f"--set batch={most} is the largest that leaves any room"
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state))
    if whole <= limit * mesh.size and mesh.shape["fsdp"] < mesh.size:
        return f"--mesh fsdp={mesh.size} splits the state over the {mesh.size} devices"
    return (
        f"its state of {size_text(whole)} needs {math.ceil(whole / limit)} such devices or more with --mesh "
        "fsdp=*, a smaller model, or an optimizer that keeps less"
    )


def check_folder(folder: Path) -> None:
    """Raise InputError unless ``folder`` can be made, or written where it is; leaves nothing behind.

    It is tried out: permission bits say nothing to root, and nothing of quotas or of read-only disks. The
    folder of a finished run need not be writable.

    >>> check_folder(Path("runs"))
    """
    where = ""
    try:
        if folder.is_file():
            raise InputError(f"{folder} is a file: give a folder")
        if (folder / "result.json").exists():
            return
        there = nearest_existing(folder)
        where = "" if there == folder.absolute() else f" in {there}"
        with tempfile.TemporaryFile(dir=there):  # without a name, where the file system can
            pass
    except OSError as error:  # also for a folder that cannot be looked into
        raise InputError(
            f"{folder} cannot be written ({error.strerror}){where}: choose another --workdir"
        ) from error


def nearest_existing(folder: Path) -> Path:
    """``folder``, or the closest of its parents that is there.

    >>> nearest_existing(Path("/nothing/of/the/kind"))
    PosixPath('/')
    """
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
