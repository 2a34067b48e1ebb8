"""The peers' networks and loop as in Flax's documentation: stock layers, ``TrainState``, ``device_put``."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

from benchmarks.pooling import StockCNN

__all__ = ["Loop", "StockCNN", "StockLeNet", "StockMLP"]


class StockLeNet(nn.Module):
    """``models.ConvNet`` of ``experiments/cifar_lenet.py``, parameters by the same names."""

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = image
        for k, width in enumerate((6, 16)):
            x = nn.relu(nn.Conv(width, (5, 5), padding="VALID", name=f"conv{k}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape((x.shape[0], -1))
        for k, width in enumerate((120, 84)):
            x = nn.relu(nn.Dense(width, name=f"dense{k}")(x))
        return nn.Dense(10, name="head")(x)


class StockMLP(nn.Module):
    """``models.MLP``, parameters by the same names."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = image.reshape((image.shape[0], -1))
        for k, width in enumerate(self.widths):
            x = nn.relu(nn.Dense(width, name=f"dense{k}")(x))
        return nn.Dense(10, name="head")(x)


class _TrainState(train_state.TrainState):
    batch_stats: Any


@jax.jit
def train_step(state: _TrainState, batch: dict[str, jax.Array]) -> tuple[_TrainState, jax.Array]:
    """One update, as in the documentation: nothing is donated."""

    def loss_fn(params: Any) -> Any:
        inputs = batch["tokens"] if "tokens" in batch else batch["image"]
        variables = {"params": params, **state.batch_stats}
        logits, updated = state.apply_fn(variables, inputs, train=True, mutable=list(state.batch_stats))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, updated

    (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=dict(updated)), loss


class Loop:
    """Batches cut out of NumPy arrays on the host, put on the device one by one.

    Args:
      model: a Linen module.
      exp: the experiment, for its data.
      tx: the optimizer.
      state: what jaxtrain begins with.
    """

    def __init__(self, model: nn.Module, exp: Any, tx: optax.GradientTransformation, state: Any) -> None:
        self._exp, self._fields = exp, exp.train.fields
        params, extra = jax.device_get((state.params, state.extra))
        self._state = _TrainState.create(apply_fn=model.apply, params=params, tx=tx, batch_stats=extra)
        self._rng, self._at = np.random.default_rng(0), 0
        self._order = self._rng.permutation(len(exp.train))

    def steps(self, count: int) -> None:
        """``count`` updates, finished."""
        batch = self._exp.batch
        for _ in range(count):
            if self._at + batch > len(self._order):
                self._order, self._at = self._rng.permutation(len(self._order)), 0
            self._update(self._order[self._at : self._at + batch])
            self._at += batch
        jax.block_until_ready(self._state)

    def losses(self, count: int) -> list[float]:
        """Of the first ``count`` updates, all on the first examples of the set; only before ``steps``."""
        return [float(self._update(np.arange(self._exp.batch))) for _ in range(count)]

    def _update(self, rows: np.ndarray) -> jax.Array:
        batch = jax.device_put({name: array[rows] for name, array in self._fields.items()})
        self._state, loss = train_step(self._state, batch)
        return loss
