"""How much of a device's memory a run may use, and sizes such as ``80GB`` in text."""

from __future__ import annotations

import dataclasses
import re

from jax.sharding import Mesh

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import size_text
from jaxtrain.sharding import described
from jaxtrain.sharding.mesh import memory_fraction

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclasses.dataclass(frozen=True)
class Limit:
    """The memory that a run may use on each device.

    Attributes:
      bytes: the limit.
      text: where the number comes from.
    """

    bytes: int
    text: str


def limit_of(mesh: Mesh, device_memory: str | None = None) -> Limit | None:
    """Return the limit of the devices of ``mesh``; None where it is unknown, as on a CPU.

    Args:
      mesh: the devices.
      device_memory: memory of the device to plan for, such as ``"80GB"``, of which JAX takes a fraction.

    Raises:
      InputError: ``device_memory`` is not a size, or the environment variable not a fraction.
    """
    if device_memory is not None:
        size, (fraction, source) = parse_size(device_memory, "--device-memory"), memory_fraction()
        return Limit(int(size * fraction), f"{100 * fraction:g} % of {device_memory.strip()}, {source}")
    card = described.card_of(mesh)
    if card is not None:
        fraction, source = memory_fraction()
        text = f"{100 * fraction:g} % of the card's {size_text(card.memory)}, {source}"
        return Limit(int(card.memory * fraction), text)
    device = mesh.local_devices[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return Limit(int(stats["bytes_limit"]), f"what JAX may use of each {device.device_kind}")
    return None


def parse_size(text: str, flag: str) -> int:
    """Parse a size such as ``"80GB"`` to bytes.

    Args:
      text: a number and a unit: GB is 10⁹ bytes, GiB is 2³⁰, and likewise K, M and T.
      flag: the flag it belongs to, for the error.

    >>> parse_size("80GB", "--device-memory"), parse_size("1.5 GiB", "--device-memory")
    (80000000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    if match and not match[2]:
        raise InputError(f"{flag} {text} has no unit: use {text.strip()}GB or {text.strip()}GiB")
    units = {name.lower(): size for name, size in UNITS.items()}
    unit = units.get(match[2].lower()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise InputError(f"{flag} {text}: give a number above 0 and a unit ({', '.join(UNITS)})")
    return round(float(match[1]) * unit)
