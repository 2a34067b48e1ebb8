"""The norm of many arrays, in few kernels of a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

LEAVES_PER_SUM = 20  # XLA fuses 96 operands; AdamW's update of a parameter reads four arrays
ROW = 256  # elements that one row of a merged sum adds up


def merged_norm(tree: Any, shardings: Any = None) -> jax.Array:
    """Return the L2 norm of all leaves together; one kernel sums the squares of ``LEAVES_PER_SUM`` leaves.

    It is that of ``optax.tree.norm`` up to rounding, which has a kernel or two for each leaf. Of sharded
    leaves each device adds up its own parts, and then the devices add up one number each.

    Args:
      tree: arrays of any shapes and floating-point dtypes.
      shardings: the tree's ``NamedSharding``s; None where no leaf is sharded: sharded ones would be gathered.

    Returns:
      A scalar; not finite where an element is not, and 0 for a tree without leaves.

    >>> tree = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.array([3.0])}
    >>> float(merged_norm(tree))
    5.0
    """
    leaves, placed = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    split = [_split_axes(sharding) for sharding in placed]
    if not any(split):
        return jnp.sqrt(_sum_of_squares(leaves, [1] * len(leaves)))
    mesh, axes = placed[0].mesh, tuple(sorted(set[str]().union(*split)))
    # A part that several devices store is in each of their sums.
    copies = [_size(mesh, axes) // _size(mesh, own) for own in split]

    def of_parts(*parts: jax.Array) -> jax.Array:
        return jnp.sqrt(jax.lax.psum(_sum_of_squares(parts, copies), axes))

    specs = tuple(sharding.spec for sharding in placed)
    norm = jax.shard_map(of_parts, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(*leaves)
    return jnp.asarray(norm)


def _sum_of_squares(leaves: Sequence[jax.Array], copies: Sequence[int]) -> jax.Array:
    """Add up the squares of all elements, those of leaf k divided by ``copies[k]``."""
    squares = [jnp.square(jnp.abs(_as_cudnn(leaf))).reshape(-1) for leaf in leaves]
    squares = [square / n if n > 1 else square for square, n in zip(squares, copies, strict=True)]
    if not squares:
        return jnp.float32(0)
    rows = []
    for start in range(0, len(squares), LEAVES_PER_SUM):
        part = jnp.concatenate(squares[start : start + LEAVES_PER_SUM])
        rows.append(jnp.pad(part, (0, -part.size % ROW)).reshape(-1, ROW).sum(1))
    # Without a barrier XLA rewrites the sum of a concatenation as one sum for each leaf.
    return jax.lax.optimization_barrier(jnp.concatenate(rows)).sum()


def _as_cudnn(leaf: jax.Array) -> jax.Array:
    """Move the output channels of a square convolution kernel first, as cuDNN returns its gradient.

    In another order each kernel's squares would be transposed by a launch of its own.
    """
    square_kernel = leaf.ndim == 4 and leaf.shape[0] == leaf.shape[1]
    return jnp.moveaxis(leaf, -1, 0) if square_kernel else leaf


def _split_axes(sharding: NamedSharding) -> set[str]:
    """Return the mesh axes with more than one device that split an array."""
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in sharding.spec]
    return {axis for entry in entries for axis in entry if sharding.mesh.shape[axis] > 1}


def _size(mesh: Mesh | AbstractMesh, axes: Iterable[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
