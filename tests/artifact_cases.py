"""Models of random weights for the artifact tests: nothing is trained."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxtrain import sharding
from jaxtrain.core.types import State, leaf_paths
from jaxtrain.experiment import Experiment
from jaxtrain.export.trained import Trained
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


RUNS_ALONE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        absent = "flax optax orbax tensorflow_datasets grain chex rich sklearn PIL tensorboardX safetensors"
        if name.partition(".")[0] in absent.split():
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Block())
import numpy as np
from jaxtrain import artifact
model = artifact.load(sys.argv[1])
batch = np.load(sys.argv[2])
np.save(sys.argv[3], np.asarray(model(batch)["logits"]))
import jax
assert len(jax.devices()) == 3
loaded = {name for name in sys.modules if name.startswith("jaxtrain.")}
assert not any(name.split(".")[1] in {"models", "data", "step", "experiment"} for name in loaded), loaded
"""
"""Program ``MODEL INPUT OUTPUT``: run an artifact without what training needs, on three devices."""
