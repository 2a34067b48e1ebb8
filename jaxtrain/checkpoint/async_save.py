"""Writing arrays while training goes on: what is copied first, and what is left for later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint import fingerprint
from jaxtrain.sharding import multihost


def start_save(folder: Path, arrays: dict[str, jax.Array]) -> Callable[[], jax.Array | None]:
    """Take the values of ``arrays`` now; returns what writes them, waits for the disk and gives fingerprints.

    Where ``uses_copies`` says so the values are copied here, and all else is left to the function that is
    returned. Orbax by itself shares memory with the state, which JAX then copies with one thread when the
    next step would reuse it, and its own beginnings take 20 to 70 ms. On other devices it copies to the
    host, and among several processes it waits for the others: both here.

    Args:
      folder: of the arrays, which is replaced.
      arrays: by path; they may be donated when this has returned.

    Returns:
      A function without arguments; its result is for ``fingerprint.finish``.
    """
    if uses_copies(arrays):
        copied = _copy(arrays)

        def write() -> jax.Array | None:
            jax.block_until_ready(copied)  # the next step waits for it: nothing else may take its cores
            return _wait(fingerprint.start(copied), _start(folder, copied))

        return write
    prints = fingerprint.start(arrays)  # now: the next step is given the state's memory
    wait = _start(folder, arrays)
    return lambda: _wait(prints, wait)


def uses_copies(arrays: dict[str, Any]) -> bool:
    """Does ``start_save`` copy such arrays? It does in the memory of CPUs, which has room, for one process.

    Args:
      arrays: by path, or anything with their shardings.
    """
    everywhere = set().union(*(x.sharding.device_set for x in arrays.values()))
    return multihost.process_count() == 1 and all(device.platform == "cpu" for device in everywhere)


def _copy(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Copies that are being made; of arrays that all are replicated, one of each."""
    if all(x.is_fully_replicated for x in arrays.values()):
        arrays = {path: x.addressable_data(0) for path, x in arrays.items()}
    # A jitted copy takes twice as long, and is another program; NumPy's waits for the step.
    return jax.device_put(arrays, {path: x.sharding for path, x in arrays.items()}, may_alias=False)


def _start(folder: Path, arrays: dict[str, jax.Array]) -> Callable[[], None]:
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    # Else every replica writes a slice, by a program compiled for each array and device: training
    # stood still for 35 s at the first save of 30 arrays on 8 CPU devices.
    context.array.saving.use_replica_parallel = False
    # zstd made a trained state 8 % smaller and took more processor time than all the rest.
    context.array.saving.use_compression = False
    with context:
        return ocp.save_async(folder, arrays, overwrite=True).result


def _wait(prints: jax.Array | None, wait: Callable[[], None]) -> jax.Array | None:
    wait()
    return prints
