"""Models of random weights for the artifact tests: nothing is trained."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxtrain import sharding
from jaxtrain.artifact.trained import Trained
from jaxtrain.core.types import State, leaf_paths
from jaxtrain.experiment import Experiment
from jaxtrain.program import abstract_state


def random_state(experiment: Experiment, examples: dict[str, np.ndarray]) -> State:
    """Return a state with random weights: variances and scales near 1, all others near 0."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    abstract = abstract_state(experiment, mesh, examples)
    rng, leaves = np.random.default_rng(0), []
    for path, leaf in leaf_paths(abstract).items():
        if not np.issubdtype(leaf.dtype, np.floating):
            leaves.append(np.zeros(leaf.shape, leaf.dtype))
        elif path.endswith(("var", "scale")):
            leaves.append(rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype))
        else:
            fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
            leaves.append((rng.normal(size=leaf.shape) / max(fan_in, 1) ** 0.5).astype(leaf.dtype))
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(abstract), leaves))


def make_trained(experiment: Experiment, rows: int = 6, **about: Any) -> Trained:
    """Return ``experiment`` with random weights, and examples of its test set."""
    count = min(rows, len(experiment.test))
    examples = experiment.test.gather(np.arange(count))
    entries = {"name": "example", "step": 7, "metrics": {"test": {"accuracy": 0.5}}, "config": {"batch": "8"}}
    return Trained.of(experiment, random_state(experiment, examples), examples, {**entries, **about})
