"""How much of a device's memory a run may use, and sizes in bytes as people write them."""

from __future__ import annotations

import dataclasses
import os
import re

from jax.sharding import Mesh

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import size_text  # noqa: F401 - until every user imports it from core

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
FRACTION = 0.75
"""The part of a GPU's memory that JAX takes: https://docs.jax.dev/en/latest/gpu_memory_allocation.html"""
FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older


@dataclasses.dataclass(frozen=True)
class Limit:
    """What one device has for a run.

    Attributes:
      bytes: that many.
      text: where the number comes from.
    """

    bytes: int
    text: str


def limit_of(mesh: Mesh, told: str | None = None) -> Limit | None:
    """The limit of a device of ``mesh``; None where it is unknown, as on a CPU.

    Args:
      mesh: the devices.
      told: the memory of the device that is planned for, such as ``"80GB"``; JAX takes a part of it.

    Raises:
      InputError: ``told`` is no size, or the environment variable no fraction.
    """
    if told is not None:
        whole, (part, source) = parse_size(told, "--device-memory"), _fraction()
        return Limit(int(whole * part), f"{100 * part:g} % of {told.strip()}, {source}")
    device = mesh.local_devices[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return Limit(int(stats["bytes_limit"]), f"what JAX may take of each {device.device_kind}")
    return None


def parse_size(text: str, flag: str) -> int:
    """``"80GB"`` in bytes.

    Args:
      text: a number and a unit: GB is 10⁹ bytes, GiB is 2³⁰, and so for K, M and T.
      flag: where it stands, for the error.

    >>> parse_size("80GB", "--device-memory"), parse_size("1.5 GiB", "--device-memory")
    (80000000000, 1610612736)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    if found and not found[2]:
        raise InputError(f"{flag} {text}: say of what, such as {text.strip()}GB or {text.strip()}GiB")
    sizes = {name.lower(): size for name, size in UNITS.items()}
    size = sizes.get(found[2].lower()) if found else None
    if found is None or size is None or not float(found[1]):
        raise InputError(f"{flag} {text}: give a number above 0 and a unit ({', '.join(UNITS)})")
    return round(float(found[1]) * size)


def _fraction() -> tuple[float, str]:
    """The part of its memory that JAX takes of a GPU, and who said so."""
    for name in FRACTION_NAMES:
        text = os.environ.get(name)
        if text:
            try:
                part = float(text)
            except ValueError:
                part = 0
            if not 0 < part <= 1:
                raise InputError(f"{name}={text}: give a number in (0, 1], such as 0.9")
            return part, f"as {name} says"
    return FRACTION, f"which JAX takes unless {FRACTION_NAMES[0]} says otherwise"
