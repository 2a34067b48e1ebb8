"""Fingerprints of arrays: 64 bits that any flipped bit, swapped or lost element changes.

They are summed where the arrays lie, in integers that wrap around, so the order of the sum and with it the
mesh and the number of processes make no difference, and no array is ever gathered.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.core.types import leaf_paths


def fingerprint(tree: Any) -> dict[str, jax.Array]:
    """The fingerprint of every array by its path: uint32 [2]. Pure; neither shape nor dtype are part of it.

    Args:
      tree: arrays of any shape and dtype, random keys among them.

    >>> import jax.numpy as jnp
    >>> one, other = (fingerprint({"w": jnp.array(x)})["w"] for x in ([0.0, 1.0], [1.0, 0.0]))
    >>> one.tolist() == other.tolist()
    False
    """
    return {path: _of(jnp.asarray(leaf)) for path, leaf in leaf_paths(tree).items()}


def start(tree: Any) -> jax.Array | None:
    """Compute the fingerprints in one program and return without waiting: uint32 [arrays, 2].

    Args:
      tree: arrays, which may be split over a mesh; after the call they may be donated.

    Returns:
      An array for ``finish``, the same on every device; None where there is no array.
    """
    leaves = jax.tree.leaves(tree)
    return _program(_mesh(leaves))(leaves) if leaves else None


def prepare(tree: Any) -> None:
    """Compile what ``start`` will run, which then takes no time for it.

    Args:
      tree: shapes, dtypes and shardings (``jax.ShapeDtypeStruct`` leaves) of the arrays.
    """
    leaves = jax.tree.leaves(tree)
    if leaves:
        _program(_mesh(leaves)).lower(leaves).compile()


def finish(tree: Any, started: jax.Array | None) -> dict[str, str]:
    """What ``start`` computes, by path, in hexadecimal: waits for it.

    Args:
      tree: what was given to ``start``, or anything with the same paths.
      started: its result.
    """
    rows = np.zeros((0, 2), ">u4") if started is None else np.asarray(jax.device_get(started), ">u4")
    return {path: row.tobytes().hex() for path, row in zip(leaf_paths(tree), rows, strict=True)}


def _mesh(leaves: list[Any]) -> Any:
    """That the arrays are split over, None where they are on one device."""
    return next(
        (x.sharding.mesh for x in leaves if isinstance(getattr(x, "sharding", None), NamedSharding)), None
    )


@functools.cache
def _program(mesh: Any) -> Any:
    def fingerprints(leaves: list[Any]) -> jax.Array:
        return jnp.stack([_of(jnp.asarray(leaf)) for leaf in leaves])

    return jax.jit(fingerprints, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


@jax.jit  # traced once for each shape
def _of(x: jax.Array) -> jax.Array:
    """Each word is mixed with its place, one to one, so that a single change always changes the sums."""
    words = _words(x)
    first = _mix(words ^ _mix(_places(words.shape)))
    second = _mix(first + jnp.uint32(0x9E3779B9))
    zero = jnp.uint32(0)
    axes = tuple(range(words.ndim))
    both = jax.lax.reduce(
        (first, second), (zero, zero), _add, axes
    )  # one pass; two compile for twice as long
    return jnp.stack(both)


def _add(one: Any, other: Any) -> Any:
    return one[0] + other[0], one[1] + other[1]


def _words(x: jax.Array) -> jax.Array:
    """The bits of ``x``: uint32 [...], one an element, or [..., n] for elements of more than 32 bits."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    unsigned = jnp.dtype(f"uint{min(bits, 32)}")
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """The place of each element in row-major order, from 0, modulo 2^32: uint32 [*shape].

    Without a reshape, which would move the parts of an array that is split.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return place


def _mix(x: jax.Array) -> jax.Array:
    """A one-to-one function of 32 bits, each of which reaches all (the end of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
