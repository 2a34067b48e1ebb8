"""Record what a run's results depend on besides its settings: versions, code, cores, XLA flags.

The record goes into ``config.json``. A resumed run compares it with the current environment and prints a line
per difference; it refuses nothing, because these are not settings.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from jax.sharding import Mesh

from jaxtrain import __version__
from jaxtrain.core.process import cores

DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"
"""The XLA flag that ``run --deterministic`` sets for GPUs."""


def record() -> dict[str, Any]:
    """Return the versions and the git commit of the current folder, for ``config.json``."""
    return {"versions": _versions(), "git": _git_commit()}


def bitwise_settings(mesh: Mesh, deterministic: bool) -> dict[str, Any]:
    """What the bits of a run depend on apart from its config, devices and versions.

    ``DETERMINISTIC_FLAG`` is in ``xla_flags`` only where it has an effect, so not on a CPU.
    """
    found, flags = {"deterministic": deterministic}, os.environ.get("XLA_FLAGS", "")
    if mesh.devices.flat[0].platform != "cpu":
        return {**found, "xla_flags": flags}
    return {**found, "xla_flags": flags.replace(DETERMINISTIC_FLAG, "").strip(), "cores": cores()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Warnings about differences between a run's record and the present, one per line.

    Args:
      before: the run's ``config.json``.
      now: what would be recorded today, with ``bits`` (``bitwise_settings``), ``mesh`` and ``devices``.

    >>> changes({"bits": {"cores": 2}}, {"bits": {"cores": 4}})
    ['cores was 2 and is 4: from here on the bits are not those of an uninterrupted run']
    """
    lines = []
    bits, bits_now = before.get("bits") or {}, now.get("bits") or {}
    names = [name for name in ("xla_flags", "cores") if name in bits and name in bits_now]
    if found := _differences({n: bits[n] for n in names}, bits_now):
        lines.append(f"{found}: from here on the bits are not those of an uninterrupted run")
    parts = {name: before[name] for name in ("mesh", "devices") if before.get(name)}
    if any(now.get(name, parts[name]) != parts[name] for name in parts):
        lines.append(
            "the run started on another mesh or other devices: from here on the bits are not those of an "
            "uninterrupted run"
        )
    if found := _differences(before.get("versions") or {}, _versions(), str):
        lines.append(f"{found}: from here on numbers may differ from those of an uninterrupted run")
    return lines


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], show: Any = repr) -> str:
    names = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name} was {show(before[name])} and is {show(now[name])}" for name in names)


def _versions() -> dict[str, str]:
    return {
        "jaxtrain": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")},
    }


def _git_commit() -> str | None:
    """The commit of the current folder, with ``-dirty`` when files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
