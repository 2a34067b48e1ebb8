"""The devices that ``plan`` compiles for: this machine's, simulated CPUs, or GPUs that are not here."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from typing import Any

import jax
from jax.extend.backend import clear_backends
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.cli import devices
from jaxtrain.core.errors import InputError
from jaxtrain.sharding import cards, described
from jaxtrain.sharding.cards import Card
from jaxtrain.sharding.initialize import in_use

CPU_NOTE = "CPU figures: temporaries are 1.4 to 4 times those of a GPU; for these, add --for h100"


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that are compiled for.

    Attributes:
      mesh: the devices.
      simulated: whether CPU devices stand for them.
      card: the GPU that they describe, where ``--for`` names one.
    """

    mesh: Mesh
    simulated: bool
    card: Card | None

    def notes(self, placement: str, limit: Any) -> list[str]:
        """Return notes for the reader of the figures.

        Args:
          placement: of the experiment.
          limit: of a device's memory; None where it is unknown.
        """
        if self.mesh.devices.flat[0].platform != "cpu":
            return []
        lines = [CPU_NOTE]
        if self.simulated:
            lines.append(f"simulated: {self.mesh.size} CPU devices stand for the real ones")
            if placement == "auto" and limit is None:
                lines.append(
                    "this machine's memory decides whether data is resident on the devices; give that of the "
                    "real ones with --device-memory"
                )
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return ``devices`` and, for a card, ``for`` of the command's JSON."""
        every = list(self.mesh.devices.flat)
        kind = {"count": len(every), "kind": every[0].device_kind, "simulated": self.simulated}
        if self.card is None:
            return {"devices": kind}
        hosts = len({device.process_index for device in every})
        about = {"card": self.card.name, "hosts": hosts, "devices_per_host": len(every) // hosts}
        about |= {"memory": self.card.memory, "compute_capability": list(self.card.capability)}
        return {"devices": kind, "for": about}


def chosen_card(args: argparse.Namespace) -> Card | None:
    """Return the card of ``--for``, and keep JAX on the CPU where it is given; None without the flag.

    Raises:
      InputError: there is no such card, or another flag does not go with it.
    """
    if args.card is None:
        if args.hosts is not None:
            raise InputError(f"--hosts {args.hosts} needs --for, such as --for h100")
        return None
    if args.simulate_devices is not None:
        raise InputError(
            f"--simulate-devices {args.simulate_devices} does not go with --for, which describes GPUs: use "
            f"--devices {args.simulate_devices}"
        )
    card = cards.load_card(args.card)
    if not in_use():
        jax.config.update("jax_platforms", "cpu")  # the GPU's plugin is used as a compiler only
    return card


def make_target(args: argparse.Namespace, card: Card | None) -> Target:
    """Make the mesh: of described devices with a card, else simulated if it needs more than there are.

    Raises:
      InputError: a flag asks for devices that cannot be had.
    """
    if card is not None:
        return Target(_described_mesh(args, card), False, card)
    if args.simulate_devices is not None:
        return Target(devices.make_mesh(args), True, None)
    count = _device_count(args)
    if count is None or count <= len(jax.devices()):
        return Target(devices.make_mesh(args), False, None)
    if count > devices.MAX_SIMULATED:
        raise InputError(
            f"this machine has no {count} devices, and plan simulates at most {devices.MAX_SIMULATED}: give "
            "fewer, and extrapolate"
        )
    clear_backends()
    devices.simulate_devices(count)
    return Target(devices.make_mesh(args), True, None)


def _described_mesh(args: argparse.Namespace, card: Card) -> Mesh:
    hosts = 1 if args.hosts is None else args.hosts
    count = _device_count(args)
    count = hosts if count is None else count
    if hosts < 1:
        raise InputError(f"--hosts {hosts}: give at least 1")
    if count % hosts:
        raise InputError(
            f"--hosts {hosts} with {count} devices: each host has the same number of them: use --devices "
            f"{hosts * max(1, count // hosts)}, or another multiple of {hosts}"
        )
    if count > devices.MAX_SIMULATED:
        raise InputError(
            f"{count} devices: plan compiles for at most {devices.MAX_SIMULATED}; give fewer, and extrapolate"
        )
    sizes = None if args.mesh is None else sharding.parse_mesh(args.mesh, count)
    return sharding.make_mesh(described.described_devices(card, hosts, count // hosts), sizes)


def _device_count(args: argparse.Namespace) -> int | None:
    """Return the number of devices that ``--devices`` or ``--mesh`` says; None where neither does."""
    count: int | None = args.devices
    if count is not None and count < 1:
        raise InputError(f"--devices {count}: give at least 1")
    sizes = re.findall(r"=\s*(\d+)\s*(?:,|$)", args.mesh or "")
    if not sizes or "*" in args.mesh:
        return count
    product = math.prod(map(int, sizes))
    if count is not None and product > count:
        raise InputError(
            f"--mesh {args.mesh} needs {product} devices, more than --devices {count}: use --devices "
            f"{product}, or lower a size"
        )
    return product if count is None else count
