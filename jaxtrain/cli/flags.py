"""The flags for devices, mesh and processes. Imports nothing that would hold up ``--help``."""

from __future__ import annotations

import argparse

FLAGS = ("devices", "mesh", "simulate_devices")


def add(parser: argparse.ArgumentParser, *, many_processes: bool = False) -> None:
    """The flags that ``devices.make_mesh`` reads; with ``many_processes`` those that join several, too."""
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
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on the same devices: on an NVIDIA GPU with XLA's deterministic "
        "operations, a CPU needs nothing for it but as many cores; bench --deterministic tells what it costs",
    )
    group = parser.add_argument_group("several processes or hosts, each started with the same command")
    group.add_argument(
        "--distributed", choices=("auto",), help="find the others through SLURM, Open MPI or Kubernetes"
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens; default: this machine only"
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")


def typed_flags(args: argparse.Namespace) -> list[str]:
    """The device flags as they were typed, for a command to be repeated; not those of other processes."""
    typed = []
    for name in FLAGS:
        if getattr(args, name, None) is not None:
            typed += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return typed + (["--deterministic"] if getattr(args, "deterministic", False) else [])
