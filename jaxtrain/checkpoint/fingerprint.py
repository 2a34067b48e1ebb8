"""Fingerprints of arrays: 64 bits that any flipped bit, swapped or lost element changes.

They are sums of wrapping integers, computed on the devices. The order of a sum does not matter, so neither do
the mesh and the number of processes, and no array is gathered.
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
    """Compute the fingerprint of every array, by path: uint32 [2]. Ignores shape and dtype.

    Args:
      tree: arrays of any shape and dtype, random keys among them.

    >>> import jax.numpy as jnp
    >>> one, other = (fingerprint({"w": jnp.array(x)})["w"] for x in ([0.0, 1.0], [1.0, 0.0]))
    >>> one.tolist() == other.tolist()
    False
    """
    return {path: _fingerprint(jnp.asarray(leaf)) for path, leaf in leaf_paths(tree).items()}


def start(tree: Any) -> jax.Array | None:
    """Compute the fingerprints in one program and return without waiting: uint32 [arrays, 2].

    Args:
      tree: arrays, which may be split over a mesh; after the call they may be donated.

    Returns:
      The argument of ``finish``, replicated; None for a tree without arrays.
    """
    leaves = jax.tree.leaves(tree)
    return _program(_mesh(leaves))(leaves) if leaves else None


def prepare(tree: Any) -> None:
    """Compile the program of ``start`` before it is needed.

    Args:
      tree: shapes, dtypes and shardings (``jax.ShapeDtypeStruct`` leaves) of the arrays.
    """
    leaves = jax.tree.leaves(tree)
    if leaves:
        _program(_mesh(leaves)).lower(leaves).compile()


def finish(tree: Any, started: jax.Array | None) -> dict[str, str]:
    """Wait for ``start`` and return the fingerprints by path, in hexadecimal.

    Args:
      tree: the argument of ``start``, or another tree with the same paths.
      started: the result of ``start``.
    """
    rows = np.zeros((0, 2), ">u4") if started is None else np.asarray(jax.device_get(started), ">u4")
    return {path: row.tobytes().hex() for path, row in zip(leaf_paths(tree), rows, strict=True)}


def _mesh(leaves: list[Any]) -> Any:
    """Return the mesh of the arrays; None where they are on one device."""
    return next(
        (x.sharding.mesh for x in leaves if isinstance(getattr(x, "sharding", None), NamedSharding)), None
    )


@functools.cache
def _program(mesh: Any) -> Any:
    def fingerprints(leaves: list[Any]) -> jax.Array:
        return jnp.stack([_fingerprint(jnp.asarray(leaf)) for leaf in leaves])

    return jax.jit(fingerprints, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


@jax.jit  # traced once for each shape
def _fingerprint(x: jax.Array) -> jax.Array:
    """Sum the words, each mixed one-to-one with its position, so that any single change changes the sum."""
    words = _words(x)
    first = _mix(words ^ _mix(_positions(words.shape)))
    second = _mix(first + jnp.uint32(0x9E3779B9))
    zero = jnp.uint32(0)
    axes = tuple(range(words.ndim))
    # one reduction over both: two would take twice as long to compile
    both = jax.lax.reduce((first, second), (zero, zero), _add, axes)
    return jnp.stack(both)


def _add(one: Any, other: Any) -> Any:
    return one[0] + other[0], one[1] + other[1]


def _words(x: jax.Array) -> jax.Array:
    """Return the bits of ``x``: uint32 [...], or [..., n] for elements of more than 32 bits."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    unsigned = jnp.dtype(f"uint{min(bits, 32)}")
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """Return the position of each element in row-major order, from 0, modulo 2^32: uint32 [*shape].

    A reshape would be shorter and would communicate for an array that is split.
    """
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return position


def _mix(x: jax.Array) -> jax.Array:
    """Mix 32 bits one-to-one; each input bit affects every output bit (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
