"""Four models in float64, and meshes that must train them identically up to rounding, on 1 or 2 processes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import data, losses, models, optim, sharding
from jaxtrain.core.types import Model, leaf_paths
from jaxtrain.experiment import Experiment
from jaxtrain.models import as_model
from jaxtrain.program import Program, assemble
from jaxtrain.sharding import rules

MESHES = ("data=8", "fsdp=8", "data=2,fsdp=4", "data=4,model=2", "data=2,fsdp=2,model=2")
FIRST = {
    "mlp": MESHES,
    "cnn": ("data=2,fsdp=2,model=2",),
    "resnet": ("data=2,fsdp=2,model=2",),
    "gpt": ("data=2,fsdp=2,model=2",),
}
"""Every mesh with the smallest model, and every model on the mesh with all axes."""
STEPS = 20


def in_float64(module: Any) -> Model:
    """Return ``module`` with float64 parameters and statistics, and so float64 activations."""
    model = as_model(module)

    def init(key: jax.Array, batch: Any) -> Any:
        def wide(x: jax.Array) -> jax.Array:
            return x.astype(jnp.float64) if x.dtype == jnp.float32 else x

        return jax.tree.map(wide, model.init(key, batch))

    return model._replace(init=init)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool, **_: Any) -> jax.Array:
    """Replace ``jax.nn.dot_product_attention``, whose softmax is always float32, in the dtype of ``q``."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if is_causal:
        visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(visible[None, None], scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def images(n: int, classes: int = 4) -> data.Arrays:
    rng = np.random.default_rng(n)
    return data.Arrays(
        {
            "image": rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8),
            "label": rng.integers(0, classes, n).astype(np.int32),
        }
    )


def tokens(n: int) -> data.Arrays:
    rng = np.random.default_rng(n)
    text = rng.integers(0, 32, (n, 13)).astype(np.uint8)
    return data.Arrays({"tokens": text[:, :-1], "label": text[:, 1:].astype(np.int32)})


def _experiment(model: Any, source: data.Arrays, **changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "model": in_float64(model),
        "train": source,
        "test": source,
        "loss": losses.CrossEntropy(),
        "optimizer": optim.SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3, clip=1.0),
        "batch": 32,
        "epochs": STEPS * 32 / len(source),
    }
    if "image" in source.fields:
        settings |= {"preprocess": (data.Normalise(),), "augment": (data.Flip(), data.Crop(pad=1))}
    return Experiment(**(settings | changes))


def experiments() -> dict[str, Experiment]:
    """Return small experiments with every kind of parameter. 72 examples make an epoch end inside a batch."""
    adam = optim.AdamW(lr=optim.Cosine(peak=1e-3, warmup=0.1))
    return {
        "mlp": _experiment(models.MLP(widths=(64, 32), classes=4, dropout=0.2), images(72)),
        "cnn": _experiment(
            models.CNN(widths=(8, 16), classes=4), images(72), post_update=(optim.EMA(decay=0.9),)
        ),
        "resnet": _experiment(
            models.ResNet(stages=(1, 1), block="basic", stem="cifar", width=8, classes=4), images(72)
        ),
        "gpt": _experiment(
            models.GPT(vocab=32, context=12, width=32, depth=1, heads=4, dropout=0.1),
            tokens(72),
            optimizer=adam,
        ),
    }


def train(program: Program, start: Any = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Train; return parameters, statistics and averages as NumPy arrays, and the example ids of every step.

    ``start`` is the initial state on the host, which saves compiling the initialisation for each mesh.
    """
    if start is None:
        state = program.init()
    else:
        state = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state))
    ids = []
    for step in range(program.steps):
        batch = program.train.batch(step)
        ids.append(whole(batch["rows"])[:, 0])
        state, _ = program.train_step(state, batch, program.key)
    leaves = leaf_paths({"params": state.params, "extra": state.extra})
    return {path: whole(leaf) for path, leaf in leaves.items()}, np.stack(ids)


def whole(array: Any) -> np.ndarray:
    """Return the full array on this host, gathered from all processes."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    rows = jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(array.sharding.mesh, jax.P()))
    return np.asarray(rows(array))


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Return the largest relative L2 distance of any array; norms below 1e-3 count as 1e-3."""
    assert ours.keys() == theirs.keys()
    gaps = [np.linalg.norm(ours[k] - theirs[k]) / max(np.linalg.norm(theirs[k]), 1e-3) for k in ours]
    return float(max(gaps))


def make(name: str, text: str | None) -> Program:
    """Return the program of a case on a mesh of all devices; on one device if ``text`` is None."""
    jax.nn.dot_product_attention, rules.SMALLEST = attention, 32
    devices = jax.devices()
    if text is None:
        return assemble(experiments()[name], sharding.make_mesh(devices[:1]))
    return assemble(experiments()[name], sharding.make_mesh(devices, sharding.parse_mesh(text, len(devices))))
