"""Devices, mesh and processes, made from the flags of a command."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.sharding import multihost
from jaxtrain.sharding.initialize import in_use
from jaxtrain.train.environment import DETERMINISTIC_FLAG

MAX_SIMULATED = 1024
PROCESS_FLAGS = ("distributed", "coordinator", "processes", "process_id")
TRUE = ("", "true", "1")
CONFLICTS: dict[str, Callable[[str], bool]] = {
    "--xla_gpu_deterministic_ops": lambda value: value.lower() not in TRUE,
    "--xla_gpu_exclude_nondeterministic_ops": lambda value: value.lower() not in TRUE,
    "--xla_gpu_autotune_level": lambda value: value != "0",
}
"""XLA flags that affect determinism, and whether a value of each conflicts with ``--deterministic``."""


def make_mesh(args: argparse.Namespace, warn: Callable[[str], None] = lambda line: None) -> Mesh:
    """Make the mesh that the flags ask for. Joins the other processes first, if there are any.

    Args:
      args: with the attributes that ``flags.add`` adds.
      warn: prints a warning line.

    Raises:
      InputError, RunError: a flag asks for devices that do not exist, or another process does not join.
    """
    simulate_devices(args.simulate_devices)
    deterministic = getattr(args, "deterministic", False)
    if deterministic:
        set_deterministic()
    if any(getattr(args, name, None) is not None for name in PROCESS_FLAGS):
        auto = args.distributed == "auto"
        multihost.start(args.coordinator, args.processes, args.process_id, auto, warn=warn)
    devices = first_devices(args.devices)
    sizes = None if args.mesh is None else sharding.parse_mesh(args.mesh, len(devices))
    if deterministic and devices[0].platform not in ("cpu", "gpu", "cuda"):
        raise InputError(
            f"--deterministic supports CPUs and NVIDIA GPUs, not {devices[0].platform}: leave it out"
        )
    return sharding.make_mesh(devices, sizes)


def set_deterministic() -> None:
    """Make XLA compute the same bits in every process that runs the same program. Call before JAX starts.

    A CPU does so by default, on the same number of cores. On a GPU an XLA flag is appended to ``XLA_FLAGS``:
    reductions then have a fixed order, and kernels are not selected by autotuning, whose choice may differ
    in the next process.

    Raises:
      InputError: ``XLA_FLAGS`` conflicts with it or names a file; or JAX has already started without the
        flag, on another backend than the CPU.
    """
    if deterministic_requested() or getattr(jax.config, "jax_platforms", None) == "cpu":
        return
    if not in_use():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_FLAG}".strip()
    elif jax.default_backend() != "cpu":
        raise InputError(
            "--deterministic comes too late: JAX has already started in this process; start a new one"
        )


def deterministic_requested() -> bool:
    """Return whether ``XLA_FLAGS`` already asks for deterministic operations.

    Raises:
      InputError: it conflicts with them, or names a file.
    """
    text = os.environ.get("XLA_FLAGS", "").strip()
    if text and not text.startswith("-"):  # XLA reads this as the name of a file
        raise InputError(
            f"XLA_FLAGS names the file {text}, so --deterministic cannot add its flag: write the flags "
            "themselves into XLA_FLAGS"
        )
    found = {}
    for word in shlex.split(text):  # the last of several values counts
        name, _, value = word.partition("=")
        found[name] = value
    for name, conflicts in CONFLICTS.items():
        if name in found and conflicts(found[name]):
            raise InputError(
                f"XLA_FLAGS has {name}={found[name]}, which conflicts with --deterministic: leave one out"
            )
    return DETERMINISTIC_FLAG.partition("=")[0] in found


def simulate_devices(count: int | None) -> None:
    """Make JAX use ``count`` simulated CPU devices in this process; None changes nothing.

    Programs and collectives are those of ``count`` real devices; the speed is not.

    Raises:
      InputError: a count below 1, or JAX has already started.
    """
    if count is None:
        return
    if not 1 <= count <= MAX_SIMULATED:
        raise InputError(f"--simulate-devices {count}: give 1 to {MAX_SIMULATED}")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise InputError(
            f"--simulate-devices {count} comes too late: JAX has already started in this process; start a "
            "new one"
        ) from error


def first_devices(count: int | None) -> list[jax.Device]:
    """Return the first ``count`` devices, the same number from each process; None returns all.

    Raises:
      InputError: JAX cannot start, has fewer devices, or ``count`` does not divide over the processes.
    """
    try:
        available = jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        hint = f"; JAX_PLATFORMS is {platforms!r}: unset it, or install its plugin" if platforms else ""
        raise InputError(f"JAX cannot start a backend ({first_line(error)[:200]}){hint}") from error
    if count is None:
        return available
    if not 1 <= count <= len(available):
        hint = f", or simulate more with --simulate-devices {count}" if count > 1 else ""
        raise InputError(f"--devices {count}: give 1 to {len(available)}, the number of devices{hint}")
    each, rest = divmod(count, multihost.process_count())
    local: dict[int, list[jax.Device]] = {}
    for device in available:
        local.setdefault(device.process_index, []).append(device)
    limit = min(len(devices) for devices in local.values())
    if rest or each > limit:
        raise InputError(
            f"--devices {count}: {len(local)} processes use the same number each, at most {limit}: give a "
            f"multiple of {len(local)} up to {len(local) * limit}"
        )
    return [device for devices in local.values() for device in devices[:each]]
