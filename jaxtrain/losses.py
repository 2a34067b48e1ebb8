"""Losses: ``(outputs, batch) -> (loss, metrics)``, with the loss a scalar mean over the examples.

Any function of that form trains; these are frozen dataclasses so that they can stand in a config.
A loss may have ``check(outputs, labels)``, which looks at raw host data before anything is compiled.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.errors import InputError
from jaxtrain.metrics import Mean
from jaxtrain.types import Batch, Metrics


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy with integer labels, and accuracy beside it.

    Attributes:
      smoothing: label smoothing in [0, 1): the target is ``(1 - s) * one_hot + s / classes``
        (Szegedy et al. 2016, arXiv:1512.00567, section 7).
      top: also report accuracy within the ``top`` best classes when it is above 1.
      label: the batch field with ``int [batch, ...]`` class indices in ``[0, classes)``.

    >>> batch = {"label": jnp.array([0, 1])}
    >>> loss, metrics = CrossEntropy()(jnp.array([[9.0, 0.0], [9.0, 0.0]]), batch)
    >>> metrics["accuracy"].compute()
    0.5
    """

    smoothing: float = 0.0
    top: int = 1
    label: str = "label"

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise InputError(f"loss.smoothing is {self.smoothing}: it must be in [0, 1)")
        if self.top < 1:
            raise InputError(f"loss.top is {self.top}: it must be at least 1")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        """``outputs: float [batch, ..., classes]`` logits; masked rows count for nothing."""
        label, mask = batch[self.label], batch.get("mask")
        logp = jax.nn.log_softmax(outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32)))
        nll = -jnp.take_along_axis(logp, label[..., None], axis=-1)[..., 0]
        if self.smoothing:
            nll = (1 - self.smoothing) * nll - self.smoothing * logp.mean(-1)
        loss = Mean.of(nll, mask)
        metrics: Metrics = {
            "loss": loss,
            "accuracy": Mean.of((outputs.argmax(-1) == label).astype(nll.dtype), mask),
        }
        if self.top > 1:
            _, best = jax.lax.top_k(outputs, self.top)
            hit = (best == label[..., None]).any(-1).astype(nll.dtype)
            metrics[f"top{self.top}"] = Mean.of(hit, mask)
        # max(): a batch whose every row is masked has loss 0, not NaN.
        return loss.total / jnp.maximum(loss.count, 1), metrics

    def check(self, outputs: jax.ShapeDtypeStruct, batch: Batch, ids: np.ndarray) -> None:
        """Raise InputError if a raw label is not a class of ``outputs: [batch, ..., classes]``.

        XLA would not: an index out of range gives NaN, clamps, or wraps, depending on the operation.
        """
        if self.label not in batch:
            raise InputError(
                f"CrossEntropy needs the batch field {self.label!r}; the source gives {sorted(batch)}"
            )
        label, classes = np.asarray(batch[self.label]), outputs.shape[-1]
        if not np.issubdtype(label.dtype, np.integer):
            raise InputError(f"field {self.label!r} is {label.dtype}: class labels are integers")
        if self.top > classes:
            raise InputError(f"loss.top={self.top} of only {classes} classes: lower it")
        bad = (label < 0) | (label >= classes)
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise InputError(
                f"label {label[bad][0]} of example {ids[row]} is outside the model's {classes} classes "
                f"0..{classes - 1} ({int(bad.sum())} such): fix the labels or set the model's classes"
            )


@dataclasses.dataclass(frozen=True)
class MSE:
    """Mean squared error over every element, and the mean absolute error beside it.

    Attributes:
      target: the batch field with ``float [batch, ...]`` of the outputs' shape.

    >>> loss, _ = MSE()(jnp.array([[1.0], [3.0]]), {"target": jnp.array([[0.0], [0.0]])})
    >>> float(loss)
    5.0
    """

    target: str = "target"

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        """``outputs: float [batch, ...]``; masked rows count for nothing."""
        target = batch[self.target]
        if outputs.shape != target.shape:  # (8, 1) - (8,) would broadcast to (8, 8)
            raise InputError(f"outputs {outputs.shape} and target {target.shape} must have one shape")
        error = outputs - target.astype(outputs.dtype)
        loss = Mean.of(error**2, batch.get("mask"))
        mae = Mean.of(jnp.abs(error), batch.get("mask"))
        return loss.total / jnp.maximum(loss.count, 1), {"loss": loss, "mae": mae}
