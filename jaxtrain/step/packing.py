"""A program's metrics as one vector for each dtype: one array to make and to read instead of one a figure.

Each result of a compiled function costs the host some microseconds when it is made and again when it is
read, and on a GPU a transfer: more than a short step takes, for the seven or more figures of an update.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.types import Metrics


class _Layout(NamedTuple):
    """Where the leaves of the metrics are: ``(vector, start, stop, shape)`` of each."""

    tree: Any
    leaves: tuple[tuple[int, int, int, tuple[int, ...]], ...]


@jax.tree_util.register_pytree_node_class
class PackedMetrics(Mapping[str, Any]):
    """The metrics of an update, or with a leading axis those of several; made by ``Packed.of``.

    As a mapping it gives single metrics as they were packed.

    >>> from jaxtrain.metrics import Mean
    >>> step = jax.jit(lambda x: Packed.of({"loss": Mean.of(x), "seen": Mean.of(2 * x)}))
    >>> found = step(jnp.array([1.0, 3.0]))
    >>> jax.tree.map(jnp.shape, found.vectors), found["loss"].compute()
    (((4,),), 2.0)
    >>> found.rows()[0]["seen"].compute()
    4.0
    """

    def __init__(self, vectors: tuple[Any, ...], layout: _Layout) -> None:
        self.vectors, self._layout = vectors, layout

    @classmethod
    def of(cls, metrics: Metrics) -> Self:
        """Pure, inside of a step: ``metrics`` as vectors, each of the leaves of one dtype."""
        leaves, tree = jax.tree.flatten(metrics)
        flat: dict[Any, list[jax.Array]] = {}
        for leaf in map(jnp.asarray, leaves):
            flat.setdefault(leaf.dtype, []).append(leaf)
        places, taken = [], dict.fromkeys(flat, 0)
        for leaf in map(jnp.asarray, leaves):
            start = taken[leaf.dtype]
            taken[leaf.dtype] += math.prod(leaf.shape)
            places.append((list(flat).index(leaf.dtype), start, taken[leaf.dtype], leaf.shape))
        vectors = [jnp.concatenate([leaf.reshape(-1) for leaf in each]) for each in flat.values()]
        return cls(tuple(vectors) or (jnp.zeros(1),), _Layout(tree, tuple(places)))  # one to wait for

    def rows(self) -> list[Metrics]:
        """The metrics of each update on the host, float64 and int64; waits for them."""
        vectors = [_widen(np.asarray(vector)) for vector in self.vectors]
        if vectors[0].ndim == 1:
            return [self._unpacked(vectors)]
        return [self._unpacked(rows) for rows in zip(*vectors, strict=True)]

    def _unpacked(self, vectors: Any) -> Metrics:
        leaves = [
            vectors[at][..., start:stop].reshape(*vectors[at].shape[:-1], *shape)
            if shape
            else vectors[at][..., start]
            for at, start, stop, shape in self._layout.leaves
        ]
        unpacked: Metrics = jax.tree.unflatten(self._layout.tree, leaves)
        return unpacked

    def __getitem__(self, name: str) -> Any:
        shapes = isinstance(self.vectors[0], jax.ShapeDtypeStruct)
        unpack = functools.partial(jax.eval_shape, self._unpacked) if shapes else self._unpacked
        return unpack(self.vectors)[name]

    def __iter__(self) -> Iterator[str]:
        tree = self._layout.tree
        return iter(jax.tree.unflatten(tree, range(tree.num_leaves)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Layout]:
        """The vectors."""
        return self.vectors, self._layout

    @classmethod
    def tree_unflatten(cls, layout: _Layout, vectors: Any) -> Self:
        """Back from ``tree_flatten``."""
        return cls(tuple(vectors), layout)


def pack_metrics(train_step: Callable[..., tuple[Any, Metrics]]) -> Callable[..., tuple[Any, PackedMetrics]]:
    """``train_step``, whose metrics are packed."""

    @functools.wraps(train_step)
    def step(*args: Any) -> tuple[Any, PackedMetrics]:
        state, metrics = train_step(*args)
        return state, PackedMetrics.of(metrics)

    return step


def _widen(array: np.ndarray) -> np.ndarray:
    """For adding up: float32 counts up to 2^24 only, int32 to 2^31."""
    kind = array.dtype.kind  # V is bfloat16
    return array.astype(np.float64) if kind in "fV" else array.astype(np.int64) if kind in "iub" else array
