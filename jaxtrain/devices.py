"""What a command runs on: the flags for devices, mesh and processes, and the mesh that they make."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.errors import InputError
from jaxtrain.sharding import processes

FLAGS = ("devices", "mesh", "simulate_devices")
MOST_SIMULATED = 1024
PROCESS_FLAGS = ("distributed", "coordinator", "processes", "process_id")


def add_flags(parser: argparse.ArgumentParser, *, many_processes: bool = False) -> None:
    """The flags that ``make`` reads; with ``many_processes`` also those that join several processes."""
    group = parser.add_argument_group("devices")
    group.add_argument("--devices", type=int, metavar="N", help="use the first N devices; default: all")
    group.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="how they share the work: data (examples), fsdp (examples and parameters), model (tensor "
        "parallelism); one N may be *; default: data=*",
    )
    group.add_argument(
        "--simulate-devices", type=int, metavar="N", help="run the same program on N simulated CPU devices"
    )
    if not many_processes:
        return
    group = parser.add_argument_group("several processes or hosts, each started with the same command")
    group.add_argument(
        "--distributed", choices=("auto",), help="find the others through SLURM, Open MPI or Kubernetes"
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens; default: this machine only"
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")


def make(args: argparse.Namespace, warn: Callable[[str], None] = lambda line: None) -> Mesh:
    """The mesh that the flags ask for. Joins the other processes first, where there are any.

    Args:
      args: with the attributes that ``add_flags`` adds.
      warn: takes a line that whoever runs this should read.

    Raises:
      InputError, RunError: a flag asks for what is not there, or another process does not come.
    """
    simulate(args.simulate_devices)
    if any(getattr(args, name, None) is not None for name in PROCESS_FLAGS):
        auto = args.distributed == "auto"
        processes.start(args.coordinator, args.processes, args.process_id, auto, warn=warn)
    devices = first(args.devices)
    sizes = None if args.mesh is None else sharding.parse_mesh(args.mesh, len(devices))
    return sharding.make_mesh(devices, sizes)


def simulate(count: int | None) -> None:
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


def first(count: int | None) -> list[jax.Device]:
    """The first ``count`` devices of the run, the same number of each process; None is all of them.

    Raises:
      InputError: there are fewer, or ``count`` does not divide over the processes.
    """
    everything = jax.devices()
    if count is None:
        return everything
    if not 1 <= count <= len(everything):
        more = f", or try more with --simulate-devices {count}" if count > 1 else ""
        raise InputError(f"--devices {count}: give 1 to {len(everything)}, as many as there are{more}")
    each, rest = divmod(count, processes.count())
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


def words(args: argparse.Namespace) -> list[str]:
    """The device flags as they were typed, for a command to be repeated; not those of other processes."""
    typed = []
    for name in FLAGS:
        if getattr(args, name, None) is not None:
            typed += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return typed


def describe(mesh: Mesh) -> str:
    """``4 × cpu (data=2,fsdp=2), 2 processes``."""
    text = f"{mesh.size} × {mesh.devices.flat[0].device_kind}"
    if mesh.shape["data"] < mesh.size:
        text += f" ({sharding.mesh_text(mesh.shape)})"
    return text + (f", {processes.count()} processes" if processes.count() > 1 else "")
