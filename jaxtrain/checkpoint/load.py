"""Load the arrays of a checkpoint by path and compare their fingerprints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.checkpoint import fingerprint
from jaxtrain.checkpoint.manifest import CheckpointInfo, CorruptCheckpointError
from jaxtrain.checkpoint.paths import check_paths
from jaxtrain.core.text import first_line
from jaxtrain.core.types import State, leaf_paths


def load_arrays(
    saved: CheckpointInfo, abstract: dict[str, Any], log: Callable[[str], None]
) -> dict[str, jax.Array]:
    """Load arrays from checked files. Raises CorruptCheckpointError if their fingerprints differ."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree.loading.partial_load = True
    stored = {path: leaf for path, leaf in abstract.items() if leaf.size}  # no file has an empty array
    try:
        with context:
            arrays: dict[str, jax.Array] = ocp.load(saved.folder / "state", stored) if stored else {}
    except Exception as error:  # Orbax, TensorStore and the disk raise many types
        raise CorruptCheckpointError(
            f"it cannot be read ({type(error).__name__}: {first_line(error)[:200]})"
        ) from error
    arrays = {path: arrays[path] if leaf.size else _empty(leaf) for path, leaf in abstract.items()}
    if saved.has_checksums:
        expected = saved.manifest["fingerprints"]
        for path, now in fingerprint.finish(arrays, fingerprint.start(arrays)).items():
            if now != expected.get(path):
                raise CorruptCheckpointError(f"the array {path} has changed (its fingerprint differs)")
    else:
        log(f"checkpoint {saved.folder} has no checksums (an older version wrote it): it is not verified")
    return arrays


def _empty(leaf: Any) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()


def flatten(state: State) -> tuple[dict[str, Any], Any]:
    """Return the leaves by path (``params/head/kernel``), and the tree; raises as ``check_paths``."""
    check_paths(state)
    return leaf_paths(state), jax.tree.structure(state)
