"""Flags that several commands share. Imports nothing that would slow down ``--help``."""

from __future__ import annotations

import argparse

from jaxtrain.core.signals import GRACE

STRATEGIES = ("auto", "sequential", "vmap", "devices")
TRACKERS = (
    "wandb, wandb:offline, mlflow, mlflow:URI of a server or a folder, or FILE.py:NAME, a tracker of your own"
)
FLAGS = ("devices", "mesh", "simulate_devices")


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add ``--experiment``, which is required, and ``--set``."""
    parser.add_argument(
        "--experiment", required=True, metavar="NAME", help="a name from run --list, or a path to a .py file"
    )
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a setting, such as optimizer.lr=0.2; may be repeated",
    )


def add_simulate_devices(parser: argparse._ActionsContainer) -> None:
    """Add ``--simulate-devices``."""
    parser.add_argument(
        "--simulate-devices", type=int, metavar="N", help="run the same program on N simulated CPU devices"
    )


def add(
    parser: argparse.ArgumentParser, *, many_processes: bool = False, starts_processes: bool = False
) -> None:
    """Add the flags that ``devices.make_mesh`` reads.

    Args:
      parser: of the command.
      many_processes: add ``--deterministic`` and the flags that join several processes, too.
      starts_processes: the command starts these processes itself: show only ``--processes`` in the help.
    """
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="use the first N devices (plan simulates those that are missing); default: all",
    )
    group.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="mesh axes and sizes: data (shards the batch), fsdp (shards batch, parameters and optimizer "
        "state), model (tensor parallelism); one N may be *, the devices that remain; default: data=*",
    )
    add_simulate_devices(group)
    if not many_processes:
        return
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on the same devices; sets XLA's deterministic operations on an "
        "NVIDIA GPU, and nothing on a CPU, where only the number of cores must be the same",
    )
    if not starts_processes:
        title = "several processes or hosts, each started with the same command"
        group = parser.add_argument_group(title)

    def shown(text: str) -> str:
        return argparse.SUPPRESS if starts_processes else text

    group.add_argument(
        "--distributed",
        choices=("auto",),
        help=shown("find the other processes with SLURM, Open MPI or Kubernetes"),
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help=shown("address of process 0; default: this machine only"),
    )
    text = "resume as N processes, on simulated devices" if starts_processes else "number of processes"
    group.add_argument("--processes", type=int, metavar="N", help=text)
    group.add_argument("--process-id", type=int, metavar="I", help=shown("index of this process, from 0"))


def add_start(parser: argparse.ArgumentParser) -> None:
    """Add the flags of how a run starts, and what of a run that is resumed may have changed."""
    parser.add_argument(
        "--init-from", metavar="RUN[:STEP]", help="start from the parameters of another run's checkpoint"
    )
    parser.add_argument(
        "--init-map",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="rename parameters of --init-from; head= leaves head as initialised; may be repeated",
    )
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="continue although the data have changed since the run started, and record that",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail if the step is compiled a second time, or the code has changed since the run started",
    )


def add_grace(parser: argparse.ArgumentParser) -> None:
    """Add ``--grace``."""
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE,
        metavar="SECONDS",
        help="time limit from a signal to the end of the process, saving included; default: %(default)g",
    )


def add_strategy(parser: argparse.ArgumentParser) -> None:
    """Add ``--strategy``."""
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="auto",
        help="how many runs train: sequential, one after the other on all devices; vmap, together as one "
        "batch of computations on one device; devices, one on each device; auto measures a few updates of "
        "each; default: %(default)s",
    )


def typed_flags(args: argparse.Namespace) -> list[str]:
    """Return the device flags as they were typed, to repeat a command; not those of several processes."""
    typed = []
    for name in FLAGS:
        if getattr(args, name, None) is not None:
            typed += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return typed + (["--deterministic"] if getattr(args, "deterministic", False) else [])
