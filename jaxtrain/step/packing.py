"""Metrics packed as one vector per dtype, so that the host reads one or two arrays a step.

The host pays some microseconds to make and to read each result of a compiled function, and on a GPU a
transfer: for the seven or more figures of an update, more than a short step takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.types import Metrics


class _Layout(NamedTuple):
    """The tree of the metrics and for each leaf ``(vector, start, stop, shape)``."""

    tree: Any
    leaves: tuple[tuple[int, int, int, tuple[int, ...]], ...]


@jax.tree_util.register_pytree_node_class
class PackedMetrics(Mapping[str, Any]):
    """The metrics of one update, or with a leading axis those of several (``step.scan_steps``).

    A mapping of the metrics by name.

    >>> from jaxtrain.metrics import Mean
    >>> step = jax.jit(lambda x: PackedMetrics.of({"loss": Mean.of(x), "seen": Mean.of(2 * x)}))
    >>> metrics = step(jnp.array([1.0, 3.0]))
    >>> jax.tree.map(jnp.shape, metrics.vectors), metrics["loss"].compute()
    (((4,),), 2.0)
    >>> metrics.rows()[0]["seen"].compute()
    4.0
    """

    def __init__(self, vectors: tuple[Any, ...], layout: _Layout) -> None:
        self.vectors, self._layout = vectors, layout

    @classmethod
    def of(cls, metrics: Metrics) -> Self:
        """Pack ``metrics``; pure, for use inside a step."""
        leaves, tree = jax.tree.flatten(metrics)
        parts: dict[Any, list[jax.Array]] = {}
        places = []
        for leaf in map(jnp.asarray, leaves):
            part = parts.setdefault(leaf.dtype, [])
            start = sum(each.size for each in part)
            places.append((list(parts).index(leaf.dtype), start, start + leaf.size, leaf.shape))
            part.append(leaf)
        vectors = [jnp.concatenate([leaf.reshape(-1) for leaf in part]) for part in parts.values()]
        return cls(tuple(vectors) or (jnp.zeros(1),), _Layout(tree, tuple(places)))  # never without a result

    def rows(self) -> list[Metrics]:
        """Wait for the metrics of each update and return them on the host, as float64 and int64."""
        vectors = [_widen(np.asarray(vector)) for vector in self.vectors]
        if vectors[0].ndim == 1:
            return [self._unpack(vectors)]
        return [self._unpack(row) for row in zip(*vectors, strict=True)]

    def _unpack(self, vectors: Any) -> Metrics:
        leaves = [
            vectors[i][..., start:stop].reshape(*vectors[i].shape[:-1], *shape)
            if shape
            else vectors[i][..., start]
            for i, start, stop, shape in self._layout.leaves
        ]
        metrics: Metrics = jax.tree.unflatten(self._layout.tree, leaves)
        return metrics

    def __getitem__(self, name: str) -> Any:
        return self._unpack(self.vectors)[name]

    def __iter__(self) -> Iterator[str]:
        tree = self._layout.tree
        return iter(jax.tree.unflatten(tree, range(tree.num_leaves)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Layout]:
        """The vectors and their layout."""
        return self.vectors, self._layout

    @classmethod
    def tree_unflatten(cls, layout: _Layout, vectors: Any) -> Self:
        """Inverse of ``tree_flatten``."""
        return cls(tuple(vectors), layout)


def pack_metrics(train_step: Callable[..., tuple[Any, Metrics]]) -> Callable[..., tuple[Any, PackedMetrics]]:
    """Return ``train_step`` with its metrics packed."""

    @functools.wraps(train_step)
    def step(*args: Any) -> tuple[Any, PackedMetrics]:
        state, metrics = train_step(*args)
        return state, PackedMetrics.of(metrics)

    return step


def _widen(array: np.ndarray) -> np.ndarray:
    """Make room for sums over many steps: float32 counts to 2^24 only, int32 to 2^31."""
    kind = array.dtype.kind  # V is bfloat16
    return array.astype(np.float64) if kind in "fV" else array.astype(np.int64) if kind in "iub" else array
