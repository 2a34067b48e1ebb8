"""Explain a device that ran out of memory: what the run needs, what is allocated, and what to do."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxtrain import sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import size_text
from jaxtrain.core.types import leaf_paths
from jaxtrain.experiment import find
from jaxtrain.monitor import Console
from jaxtrain.program import Program
from jaxtrain.program.memory import bytes_per_device, device_arrays, mesh_of
from jaxtrain.program.memory_text import memory_text, table
from jaxtrain.sharding import rules
from jaxtrain.train import run_record
from jaxtrain.train.capacity import smaller_settings

LARGEST = 10


@contextlib.contextmanager
def explain_out_of_memory(program: Program, name: str, folder: Path, console: Console) -> Iterator[None]:
    """Turn JAX's RESOURCE_EXHAUSTED error into a RunError that says what to do.

    First shows what the run needs between two steps and the largest live arrays. Allocates nothing on a
    device, and leaves out what cannot be shown.

    Args:
      program: the run.
      name: its experiment, for the advice.
      folder: the run's folder, whose record holds the settings.
      console: shows the tables.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        console.end()
        for text in (_needed_text, _live_text):
            with contextlib.suppress(Exception):
                console.note("\n" + text(program))
        command = f"python -m jaxtrain plan --experiment {name}"
        with contextlib.suppress(Exception):
            command = _command(program, name, folder)
        advice = [f"--set {setting}" for setting in smaller_settings(program)]
        tries = f"try {' or '.join(advice)}, or " if advice else ""
        raise RunError(
            f"a device has no memory left{_requested_text(error)}: {tries}see what fits with: {command}"
        ) from error


def _requested_text(error: Exception) -> str:
    """How much was requested, where the error says so in bytes."""
    found = re.search(r"allocat\w* (\d+)( ?bytes|B)|\((\d+)B\)", str(error))
    return f", which was asked for {size_text(int(found[1] or found[3]))} more" if found else ""


def live_arrays(abstract: Any) -> list[tuple[str, int, str, int]]:
    """Live arrays grouped by kind: (path in the state, count, array, bytes on each device), largest first.

    An array counts as one of the state's if it has that shape, dtype and sharding, else as ``other``.

    Args:
      abstract: the state's shapes, dtypes and shardings.
    """
    paths = leaf_paths(abstract)
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for array in jax.live_arrays():
        if not array.is_deleted():
            found = [path for path, leaf in paths.items() if _same_kind(array, leaf)]
            more = f" and {len(found) - 1} like it" if len(found) > 1 else ""
            where = f"{found[0]}{more}" if found else "other"
            split = rules.spec_text(array.sharding) if isinstance(array.sharding, NamedSharding) else ""
            text = f"{array.dtype.name}[{','.join(map(str, array.shape))}] {split}".strip()
            kinds.setdefault((where, text), []).append(bytes_per_device(array))
    rows = [(where, len(sizes), text, sum(sizes)) for (where, text), sizes in kinds.items()]
    return sorted(rows, key=lambda row: -row[3])


def _same_kind(array: Any, leaf: Any) -> bool:
    same = array.shape == leaf.shape and array.dtype == leaf.dtype
    return same and array.sharding.is_equivalent_to(leaf.sharding, len(leaf.shape))


def _needed_text(program: Program) -> str:
    exact = {part: sum(one.bytes for one in arrays) for part, arrays in device_arrays(program).items()}
    return memory_text(exact, {"total": "plus the temporaries of a step, which plan shows"})


def _live_text(program: Program) -> str:
    rows = live_arrays(program.abstract_state)
    lines = [(where, f"{n} ×", text, size_text(size)) for where, n, text, size in rows[:LARGEST]]
    total = size_text(sum(size for *_, size in rows))
    lines.append(("all", f"{sum(n for _, n, *_ in rows)} ×", "", total))
    return table("live arrays on each device", lines, "<><>")


def _command(program: Program, name: str, folder: Path) -> str:
    """The ``plan`` command for the run's settings and mesh."""
    words, mesh = ["python", "-m", "jaxtrain", "plan"], mesh_of(program)
    settings: list[str] = []
    with contextlib.suppress(InputError, RunError, OSError):
        record = run_record.load(folder)
        name, settings = _experiment_argument(record["name"], record["origin"]), record["overrides"]
    words += ["--experiment", name]
    for setting in settings:
        words += ["--set", setting]
    words += ["--devices", str(mesh.size)]
    if mesh.shape["data"] < mesh.size:
        words += ["--mesh", sharding.mesh_text(mesh.shape)]
    return shlex.join(words)


def _experiment_argument(name: str, origin: str) -> str:
    """The argument for ``--experiment``: the name, or the file where the name does not find it."""
    with contextlib.suppress(InputError):
        if find(name).origin == origin:
            return name
    return origin
