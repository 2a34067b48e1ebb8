"""The mesh: the devices of a run, and the axes that split its work."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import did_you_mean
from jaxtrain.sharding import described, multihost

AXES = ("data", "fsdp", "model")
"""``data`` shards the batch; ``fsdp`` the batch, parameters and optimizer state; ``model`` is tensor
parallelism.

Every mesh has all three axes, unused ones with size 1."""

BATCH_AXES = ("data", "fsdp")
RESERVED = "replica"  # for independent seeds in one program
FRACTION = 0.75
"""The fraction of a GPU's memory that JAX preallocates: https://docs.jax.dev/en/latest/gpu_memory_allocation.html"""
FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # new name, old name


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Parse ``"data=2,fsdp=4"`` into the size of every axis; one size may be ``*``: all remaining devices.

    Args:
      text: ``axis=size`` pairs, separated by commas.
      devices: number of devices; the product of the sizes.

    Raises:
      InputError: the text is malformed, or the sizes do not use exactly ``devices``.

    >>> parse_mesh("model=2,data=*", 8)
    {'data': 4, 'fsdp': 1, 'model': 2}
    """
    sizes: dict[str, int | None] = {}
    for part in text.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if not equals or not (size == "*" or (size.isascii() and size.isdigit() and int(size) > 0)):
            raise InputError(
                f"--mesh {text!r}: write axis=size, such as data=2,fsdp=4 or data=*; a size is 1 or more"
            )
        _check_axis(axis, text)
        if axis in sizes:
            raise InputError(f"--mesh {text} names {axis} twice")
        sizes[axis] = None if size == "*" else int(size)
    known = math.prod(size for size in sizes.values() if size is not None)
    free = [axis for axis, size in sizes.items() if size is None]
    if len(free) > 1:
        raise InputError(f"--mesh {text}: only one size can be *; give that of {free[0]} or {free[1]}")
    if free and devices % known:
        raise InputError(
            f"--mesh {text}: {devices} devices do not divide by {known}; use --devices "
            f"{max(devices // known, 1) * known}, or other sizes"
        )
    if free:
        sizes[free[0]] = devices // known
    elif known < devices:
        raise InputError(
            f"--mesh {text} uses {known} of {devices} devices and leaves {devices - known} idle: use "
            f"--devices {known} if that is intended, or write * for a size"
        )
    elif known > devices:
        raise InputError(
            f"--mesh {text} needs {known} devices and there are {devices}: lower a size, write * for one, or "
            f"try it with --simulate-devices {known}"
        )
    return {axis: sizes.get(axis) or 1 for axis in AXES}


def make_mesh(devices: Sequence[jax.Device] | None = None, sizes: Mapping[str, int] | None = None) -> Mesh:
    """Create a mesh of ``devices`` (default: those of all processes) with the axes ``AXES``.

    Args:
      devices: in order; neighbours differ in the last axes first.
      sizes: of the axes; their product is the number of devices. None puts all devices on ``data``.

    >>> dict(make_mesh(jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'model': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": len(devices)} if sizes is None else sizes
    for axis in sizes:
        _check_axis(axis, mesh_text(sizes))
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != len(devices):
        raise InputError(f"mesh {mesh_text(sizes)} does not have {len(devices)} devices")
    # Auto: make_mesh defaults to Explicit axes, under which flax.linen.Embed raises.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def as_mesh(mesh: Mesh | str | Mapping[str, int] | None) -> Mesh:
    """Return a mesh with all of ``AXES``.

    Args:
      mesh: sizes of axes, as a text in the syntax of ``--mesh`` or by name; a mesh that has some of the axes;
        or None for ``"data=*"``.

    Raises:
      InputError: it is something else, has an axis of another name, or does not fit the devices.

    >>> as_mesh("data=*").shape == as_mesh({"data": len(jax.devices())}).shape == as_mesh(None).shape
    True
    """
    if isinstance(mesh, str):
        return make_mesh(sizes=parse_mesh(mesh, len(jax.devices())))
    if mesh is None or isinstance(mesh, Mapping):
        return make_mesh(sizes=mesh)
    if not isinstance(mesh, Mesh):
        raise InputError(
            f'mesh is a {type(mesh).__name__}: give a text such as "data=2,fsdp=4", sizes by name, or a Mesh'
        )
    for axis in mesh.axis_names:
        _check_axis(axis, mesh_text(mesh.shape))
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
    shape = tuple(mesh.shape.get(axis, 1) for axis in AXES)
    devices = mesh.devices.transpose(order).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Write the axes larger than 1 in the syntax of ``--mesh``.

    >>> mesh_text({"data": 4, "fsdp": 1, "model": 2})
    'data=4,model=2'
    """
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device has in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_split(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading axis over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def stacked(sharding: NamedSharding) -> NamedSharding:
    """Return the sharding of arrays that are stacked on a new leading axis, each with ``sharding``."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def batch_parts(mesh: Mesh) -> int:
    """Return the number of parts of a split batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch: int, mesh: Mesh, name: str = "batch", accumulate: int = 1) -> None:
    """Raise InputError unless the global ``batch`` divides over the mesh, and into ``accumulate`` parts."""
    parts = batch_parts(mesh)
    divisor = parts * accumulate
    if batch >= 1 and batch % divisor == 0:
        return
    low, high = batch // divisor * divisor, (batch // divisor + 1) * divisor
    fixes = " or ".join(str(n) for n in (low, high) if n > 0)
    if batch >= 1 and batch % parts == 0:
        raise InputError(
            f"{name} {batch} does not divide into accumulate={accumulate} parts on {mesh_text(mesh.shape)}: "
            f"use --set {name}={fixes}, or another accumulate"
        )
    if len({device.process_index for device in mesh.devices.flat}) > 1:  # each has a part of the devices
        raise InputError(f"{name} {batch} does not divide over {parts} devices: use --set {name}={fixes}")
    fewer = max((n for n in range(1, parts) if batch % (n * accumulate) == 0), default=1)
    instead = f"--devices {fewer}" if parts == mesh.size else f"a --mesh with data × fsdp = {fewer}"
    raise InputError(
        f"{name} {batch} does not divide over {parts} devices: use {instead}"
        f"{' at most' if fewer > 1 else ''}, or --set {name}={fixes}"
    )


def device_memory(mesh: Mesh) -> int:
    """Return the bytes of memory of one device of the mesh; CPU devices share the host's.

    Of a described device, those that JAX would take.
    """
    card = described.card_of(mesh)
    if card is not None:
        return int(card.memory * memory_fraction()[0])
    stats = mesh.local_devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total // len(mesh.local_devices)


def memory_fraction() -> tuple[float, str]:
    """Return the fraction of a GPU's memory that JAX takes, and where this number comes from.

    Raises:
      InputError: an environment variable sets it to something else than a fraction.
    """
    for name in FRACTION_NAMES:
        text = os.environ.get(name)
        if text:
            try:
                fraction = float(text)
            except ValueError:
                fraction = 0
            if not 0 < fraction <= 1:
                raise InputError(f"{name}={text}: give a number in (0, 1], such as 0.9")
            return fraction, f"set by {name}"
    return FRACTION, f"JAX's default; {FRACTION_NAMES[0]} changes it"


def _check_axis(axis: str, text: str) -> None:
    if axis == RESERVED:
        raise InputError(
            f"--mesh {text}: the axis replica is reserved for independent seeds, which one run does not "
            "have; use data for more examples at a time"
        )
    if axis not in AXES:
        raise InputError(f"--mesh {text}: no axis is called {axis!r}: {did_you_mean(axis, AXES)}")


def describe_mesh(mesh: Mesh) -> str:
    """Describe a mesh in a few words: ``4 × cpu (data=2,fsdp=2), 2 processes``."""
    text = f"{mesh.size} × {mesh.devices.flat[0].device_kind}"
    if mesh.shape["data"] < mesh.size:
        text += f" ({mesh_text(mesh.shape)})"
    if described.card_of(mesh) is not None:
        hosts = len({device.process_index for device in mesh.devices.flat})
        return text + (f", {hosts} hosts" if hosts > 1 else "")
    return text + (f", {multihost.process_count()} processes" if multihost.process_count() > 1 else "")
