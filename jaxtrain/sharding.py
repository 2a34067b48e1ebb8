"""The mesh, the shardings of state and batch, and the one place where a step is compiled.

A laptop is a mesh of one device; nothing here or above has a second path for more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.errors import InputError

DATA = "data"  # the mesh axis over which the batch is split


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all local devices (or of ``devices``) along the axis ``data``.

    >>> make_mesh(jax.devices()[:1]).shape["data"]
    1
    """
    devices = list(jax.local_devices() if devices is None else devices)
    # Auto: make_mesh defaults to Explicit axes, under which flax.linen.Embed raises.
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_split(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices of ``data``."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_batch(batch: int, mesh: Mesh, name: str = "batch") -> None:
    """Raise InputError unless the global ``batch`` divides over the mesh."""
    devices = mesh.shape[DATA]
    if batch < 1 or batch % devices:
        low, high = batch // devices * devices, (batch // devices + 1) * devices
        fixes = " or ".join(str(n) for n in (low, high) if n > 0)
        fewer = max((n for n in range(1, devices) if batch % n == 0), default=1)
        raise InputError(
            f"{name} {batch} does not divide over {devices} devices: use --devices {fewer}"
            f"{' at most' if fewer > 1 else ''}, or --set {name}={fixes}"
        )


def device_memory(mesh: Mesh) -> int:
    """Bytes of memory for one device of the mesh; CPU devices share the host's."""
    stats = mesh.devices.flat[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // mesh.devices.size


def compile(
    fn: Callable[..., Any], *, args: Sequence[Any], out: Any, donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """``jax.jit`` with shardings: the only jit of an init, a train step or an eval step.

    Args:
      fn: a pure function of arrays.
      args: one sharding, or a pytree prefix of shardings, for each argument.
      out: the same for the result.
      donate: positions of arguments whose buffers the result may reuse.
    """
    return jax.jit(fn, in_shardings=tuple(args), out_shardings=out, donate_argnums=donate)
