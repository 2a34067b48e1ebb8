"""Losses of predicted numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.core.errors import InputError
from jaxtrain.core.outputs import select_output
from jaxtrain.core.types import Batch, Metrics
from jaxtrain.metrics import Mean, Regression, RootMean
from jaxtrain.metrics.task_inputs import prediction_error


@dataclasses.dataclass(frozen=True)
class MSE:
    """Mean squared error over all elements; also reports ``rmse``, its root, and ``mae``, the absolute error.

    Attributes:
      target: name of the batch field with the targets, ``float [batch, ...]``, in the shape of the outputs.
      output: the name or position of the predictions, where the model returns several outputs.

    >>> loss, _ = MSE()(jnp.array([[1.0], [3.0]]), {"target": jnp.array([[0.0], [0.0]])})
    >>> float(loss)
    5.0
    """

    target: str = "target"
    output: str | int | None = None

    @property
    def report(self) -> Regression:
        """The report of regression."""
        return Regression(self.target, self.output)

    def __call__(self, outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Return the loss and its metrics for ``outputs: float [batch, ...]``."""
        error, mask = self._error(outputs, batch), batch.get("mask")
        loss = Mean.of(self._each(error), mask)
        mae, rmse = Mean.of(jnp.abs(error), mask), RootMean.of(error**2, mask)
        return loss.total / jnp.maximum(loss.count, 1), {"loss": loss, "mae": mae, "rmse": rmse}

    def _error(self, outputs: Any, batch: Batch) -> jax.Array:
        return prediction_error(select_output(outputs, self.output, "loss.output"), batch[self.target])

    def _each(self, error: jax.Array) -> jax.Array:
        """Return the loss of each element."""
        return error**2


@dataclasses.dataclass(frozen=True)
class MAE(MSE):
    """Mean absolute error over all elements; also reports ``mae``, which is the same, and ``rmse``.

    Attributes:
      target: name of the batch field with the targets, ``float [batch, ...]``, in the shape of the outputs.
      output: the name or position of the predictions, where the model returns several outputs.

    >>> loss, _ = MAE()(jnp.array([[1.0], [3.0]]), {"target": jnp.array([[0.0], [0.0]])})
    >>> float(loss)
    2.0
    """

    def _each(self, error: jax.Array) -> jax.Array:
        return jnp.abs(error)


@dataclasses.dataclass(frozen=True)
class Huber(MSE):
    """Huber loss over all elements, squared for small errors and linear for large; also ``mae``, ``rmse``.

    ``error**2 / 2`` up to ``delta``, ``delta * (abs(error) - delta / 2)`` above (Huber 1964,
    doi:10.1214/aoms/1177703732), as in ``optax.losses.huber_loss``.

    Attributes:
      target: name of the batch field with the targets, ``float [batch, ...]``, in the shape of the outputs.
      output: the name or position of the predictions, where the model returns several outputs.
      delta: where the loss changes from squared to absolute, above 0, in the unit of the target.

    >>> loss, _ = Huber()(jnp.array([[1.0], [3.0]]), {"target": jnp.array([[0.0], [0.0]])})
    >>> float(loss)
    1.5
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.delta < float("inf"):
            raise InputError(f"loss.delta is {self.delta}: it must be above 0")

    def _each(self, error: jax.Array) -> jax.Array:
        return optax.losses.huber_loss(error, delta=self.delta)


@dataclasses.dataclass(frozen=True)
class Forecast(MSE):
    """Mean squared error of a forecast; also reports ``mae`` and the error of a naive forecast.

    The naive forecast repeats the last observed row. A useful model has ``loss`` below ``repeat_last_mse``
    and ``mae`` below ``repeat_last_mae``; these are over the same windows and in the same units.

    Attributes:
      target: name of the batch field with ``float [batch, horizon, variables]``, in the shape of the outputs.
      output: the name or position of the forecast, where the model returns several outputs.
      history: name of the batch field with ``float [batch, window, variables]``, the rows before the target.

    >>> batch = {"series": jnp.array([[[7.0], [1.0]]]), "target": jnp.array([[[2.0], [3.0]]])}
    >>> loss, metrics = Forecast()(jnp.array([[[2.0], [2.0]]]), batch)
    >>> float(loss), metrics["repeat_last_mse"].compute()
    (0.5, 2.5)
    """

    history: str = "series"

    def __call__(self, outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Return the loss and its metrics for ``outputs: float [batch, horizon, variables]``."""
        target, history, mask = batch[self.target], batch[self.history], batch.get("mask")
        error = self._error(outputs, batch)
        if target.ndim != 3 or history.ndim != 3 or history.shape[2] != target.shape[2]:
            raise InputError(
                f"{self.history!r} {history.shape} and {self.target!r} {target.shape}: Forecast takes "
                "[batch, steps, variables] in both, with the same variables"
            )
        repeat = prediction_error(jnp.broadcast_to(history[:, -1:], target.shape), target)
        loss = Mean.of(error**2, mask)
        return loss.total / jnp.maximum(loss.count, 1), {
            "loss": loss,
            "mae": Mean.of(jnp.abs(error), mask),
            "repeat_last_mse": Mean.of(repeat**2, mask),
            "repeat_last_mae": Mean.of(jnp.abs(repeat), mask),
        }

    def check(self, outputs: Any, batch: Batch, ids: np.ndarray) -> None:
        """Raise InputError if a field is missing or a raw target is not finite, naming the example."""
        for name in (self.target, self.history):
            if name not in batch:
                raise InputError(f"Forecast needs the batch field {name!r}; the batch has {sorted(batch)}")
        bad = ~np.isfinite(np.asarray(batch[self.target]))
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise InputError(
                f"field {self.target!r} of example {ids[row]} holds NaN or infinity ({int(bad.sum())} such "
                "values): fill the gaps, or leave out windows with gaps"
            )
