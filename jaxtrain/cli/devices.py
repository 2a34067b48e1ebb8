"""What a command runs on: the devices, mesh and processes that its flags ask for."""

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

MOST_SIMULATED = 1024
PROCESS_FLAGS = ("distributed", "coordinator", "processes", "process_id")
ON = ("", "true", "1")
CONTRARY: dict[str, Callable[[str], bool]] = {
    "--xla_gpu_deterministic_ops": lambda value: value.lower() not in ON,
    "--xla_gpu_exclude_nondeterministic_ops": lambda value: value.lower() not in ON,
    "--xla_gpu_autotune_level": lambda value: value != "0",
}
"""Flags of XLA that touch the same matter, and which of their values ``--deterministic`` refuses."""


def make_mesh(args: argparse.Namespace, warn: Callable[[str], None] = lambda line: None) -> Mesh:
    """The mesh that the flags ask for. Joins the other processes first, where there are any.

    Args:
      args: with the attributes that ``flags.add`` adds.
      warn: takes a line that whoever runs this should read.

    Raises:
      InputError, RunError: a flag asks for what is not there, or another process does not come.
    """
    simulate_devices(args.simulate_devices)
    exact = getattr(args, "deterministic", False)
    if exact:
        set_deterministic()
    if any(getattr(args, name, None) is not None for name in PROCESS_FLAGS):
        auto = args.distributed == "auto"
        multihost.start(args.coordinator, args.processes, args.process_id, auto, warn=warn)
    devices = first_devices(args.devices)
    sizes = None if args.mesh is None else sharding.parse_mesh(args.mesh, len(devices))
    if exact and devices[0].platform not in ("cpu", "gpu", "cuda"):
        raise InputError(
            f"--deterministic knows what CPUs and NVIDIA GPUs need, not {devices[0].platform}: leave it out"
        )
    return sharding.make_mesh(devices, sizes)


def set_deterministic() -> None:
    """Make XLA give the same bits in every process that runs the same program; before JAX looks at devices.

    A CPU does so anyway, on the same number of cores. A GPU is told to by an XLA flag: no operation then adds
    in the order in which threads happen to come, and kernels are not chosen by timing them, which may end
    otherwise in the next process. The flag goes behind those that ``XLA_FLAGS`` has.

    Raises:
      InputError: ``XLA_FLAGS`` asks for the contrary or names a file; or JAX has started, on another backend
        than the CPU and without the flag.
    """
    if deterministic_requested() or getattr(jax.config, "jax_platforms", None) == "cpu":
        return
    if not in_use():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_FLAG}".strip()
    elif jax.default_backend() != "cpu":
        raise InputError(
            "--deterministic comes too late: this process already uses JAX's devices; start a fresh one"
        )


def deterministic_requested() -> bool:
    """Does ``XLA_FLAGS`` itself ask for deterministic operations?

    Raises:
      InputError: it asks for the contrary, or names a file.
    """
    given = os.environ.get("XLA_FLAGS", "").strip()
    if given and not given.startswith("-"):  # XLA then takes all of it for the name of a file
        raise InputError(
            f"XLA_FLAGS names the file {given}, to which --deterministic can add nothing: write the flags "
            "themselves into XLA_FLAGS"
        )
    found = {}
    for word in shlex.split(given):  # the last of a name counts
        name, _, value = word.partition("=")
        found[name] = value
    for name, contrary in CONTRARY.items():
        if name in found and contrary(found[name]):
            flag = f"{name}={found[name]}"
            raise InputError(
                f"XLA_FLAGS has {flag}, the contrary of --deterministic: leave out one of the two"
            )
    return DETERMINISTIC_FLAG.partition("=")[0] in found


def simulate_devices(count: int | None) -> None:
    """Make JAX see ``count`` CPU devices (in this process) instead of what is there; None changes nothing.

    The programs and their communication are those of ``count`` real devices; the speed is not.

    Raises:
      InputError: a count below 1, or JAX has already looked at the devices.
    """
    if count is None:
        return
    if not 1 <= count <= MOST_SIMULATED:
        raise InputError(f"--simulate-devices {count}: give 1 to {MOST_SIMULATED}")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise InputError(
            f"--simulate-devices {count} comes too late: this process already uses JAX's devices; start a "
            "fresh one"
        ) from error


def first_devices(count: int | None) -> list[jax.Device]:
    """The first ``count`` devices of the run, the same number of each process; None is all of them.

    Raises:
      InputError: JAX finds none; there are fewer, or ``count`` does not divide over the processes.
    """
    try:
        everything = jax.devices()
    except (RuntimeError, AssertionError) as error:
        named = os.environ.get("JAX_PLATFORMS")
        asked = f"; JAX_PLATFORMS is {named!r}: unset it, or install what that needs" if named else ""
        raise InputError(f"JAX cannot start its devices ({first_line(error)[:200]}){asked}") from error
    if count is None:
        return everything
    if not 1 <= count <= len(everything):
        more = f", or try more with --simulate-devices {count}" if count > 1 else ""
        raise InputError(f"--devices {count}: give 1 to {len(everything)}, as many as there are{more}")
    each, rest = divmod(count, multihost.process_count())
    local: dict[int, list[jax.Device]] = {}
    for device in everything:
        local.setdefault(device.process_index, []).append(device)
    most = min(len(devices) for devices in local.values())
    if rest or each > most:
        raise InputError(
            f"--devices {count}: {len(local)} processes use the same number each, at most {most}: give a "
            f"multiple of {len(local)} up to {len(local) * most}"
        )
    return [device for devices in local.values() for device in devices[:each]]
