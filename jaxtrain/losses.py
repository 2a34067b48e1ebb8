"""Losses: ``(outputs, batch) -> (loss, metrics)``, with the loss a scalar mean over the examples.

Any function of that form trains; these are frozen dataclasses so that they can stand in a config.
A loss may have ``check(outputs, batch, ids)``, which looks at raw host data before anything is compiled, and
``outside(outputs, batch)``, which counts bad labels inside the step, after augmentation (``step.guard``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.chunked_logits import ChunkedLogits
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Metrics
from jaxtrain.metrics import Mean, MeanIoU, RootMean


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy with integer labels, and accuracy beside it.

    Attributes:
      smoothing: label smoothing in [0, 1): the target is ``(1 - s) * one_hot + s / classes``
        (Szegedy et al. 2016, arXiv:1512.00567, section 7).
      top: also report accuracy within the ``top`` best classes when it is above 1.
      label: the batch field with ``int [batch, ...]`` class indices in ``[0, classes)``.
      iou: also report ``mean_iou``, the mean intersection over union of the classes, as for a class map
        ``int [batch, height, width]``.

    Where ``data.Mixup`` has mixed two images, the batch has ``label_mixed`` beside the label and ``mix``,
    the weight of the label, float ``[batch]``: the loss is then the weighted mean of both labels' losses.
    Accuracy is that of the heavier one.

    Of a model that gives ``ChunkedLogits`` the logits are computed chunk by chunk, and never held whole (but
    for ``iou``, whose counts are ``[classes, classes]`` anyway).

    >>> batch = {"label": jnp.array([0, 1])}
    >>> loss, metrics = CrossEntropy()(jnp.array([[9.0, 0.0], [9.0, 0.0]]), batch)
    >>> metrics["accuracy"].compute()
    0.5
    """

    smoothing: float = 0.0
    top: int = 1
    label: str = "label"
    iou: bool = False

    chunked: ClassVar[bool] = True
    """It takes ``ChunkedLogits``."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise InputError(f"loss.smoothing is {self.smoothing}: it must be in [0, 1)")
        if self.top < 1:
            raise InputError(f"loss.top is {self.top}: it must be at least 1")

    def __call__(self, outputs: jax.Array | ChunkedLogits, batch: Batch) -> tuple[jax.Array, Metrics]:
        """``outputs: float [batch, ..., classes]`` logits; masked rows count for nothing."""
        label, mask = batch[self.label], batch.get("mask")
        others = [label]
        if "label_mixed" in batch:
            others += [batch["label_mixed"], batch["mix"].reshape(-1, *(1,) * (label.ndim - 1))]
        if isinstance(outputs, ChunkedLogits) and (self.iou or label.shape != outputs.shape[:-1]):
            outputs = outputs.whole()
        if isinstance(outputs, ChunkedLogits):
            rows = outputs.each(
                functools.partial(self._rows, hit=_ranked),
                *(jnp.broadcast_to(x, label.shape) for x in others),
            )
        else:
            rows = self._rows(outputs, *others, hit=_among_best)
        metrics: Metrics = {name: Mean.of(values, mask) for name, values in rows.items()}
        if self.iou and not isinstance(outputs, ChunkedLogits):
            metrics["mean_iou"] = MeanIoU.of(outputs, _heavier(*others), mask)
        loss = metrics["loss"]
        # max(): a batch whose every row is masked has loss 0, not NaN.
        return loss.total / jnp.maximum(loss.count, 1), metrics

    def _rows(
        self, logits: jax.Array, label: jax.Array, *mixed: jax.Array, hit: Callable[..., jax.Array]
    ) -> dict[str, jax.Array]:
        """The loss of each label and whether it was met: float ``[batch, ...]``."""
        logp = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        nll = self._nll(logp, label)
        if mixed:
            other, mix = mixed
            nll = mix * nll + (1 - mix) * self._nll(logp, other)
            label = _heavier(label, *mixed)
        rows = {"loss": nll, "accuracy": (logits.argmax(-1) == label).astype(nll.dtype)}
        if self.top > 1:
            rows[f"top{self.top}"] = hit(logits, label, self.top).astype(nll.dtype)
        return rows

    def _nll(self, logp: jax.Array, label: jax.Array) -> jax.Array:
        """float ``[batch, ...]``: the loss of each label."""
        nll = -jnp.take_along_axis(logp, label[..., None], axis=-1)[..., 0]
        if self.smoothing:
            nll = (1 - self.smoothing) * nll - self.smoothing * logp.mean(-1)
        return nll

    def outside(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """How many labels are no class of ``outputs: [batch, ..., classes]``, unmasked: int32 ``[]``.

        For what ``check`` cannot see: labels that an augmentation made, and loops of one's own.
        """
        count, classes, mask = jnp.int32(0), outputs.shape[-1], batch.get("mask")
        for name in (self.label, "label_mixed"):
            label = batch.get(name)
            if label is not None and jnp.issubdtype(label.dtype, jnp.integer):
                if label.dtype.itemsize < 4:  # uint8 cannot hold 256, and XLA would compare with 0
                    label = label.astype(jnp.int32)
                bad = (label < 0) | (label >= classes)
                if mask is not None:
                    bad &= mask.reshape(mask.shape + (1,) * (bad.ndim - mask.ndim)) > 0
                count += bad.sum(dtype=jnp.int32)
        return count

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
            rows = np.unique(np.argwhere(bad)[:, 0])
            more = ", ".join(f"{ids[row]}" for row in rows[1:6]) + (", ..." if len(rows) > 6 else "")
            such = f"{int(bad.sum())} such" + (f", also of example {more}" if more else "")
            raise InputError(
                f"label {label[bad][0]} of example {ids[rows[0]]} in field {self.label!r} is outside the "
                f"model's {classes} classes 0..{classes - 1} ({such}): fix the labels or set "
                "the model's classes"
            )


@dataclasses.dataclass(frozen=True)
class MSE:
    """Mean squared error over every element; beside it its root and the mean absolute error.

    Attributes:
      target: the batch field with ``float [batch, ...]`` of the outputs' shape.

    >>> loss, _ = MSE()(jnp.array([[1.0], [3.0]]), {"target": jnp.array([[0.0], [0.0]])})
    >>> float(loss)
    5.0
    """

    target: str = "target"

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        """``outputs: float [batch, ...]``; masked rows count for nothing."""
        error, mask = _error(outputs, batch[self.target]), batch.get("mask")
        loss = Mean.of(error**2, mask)
        mae, rmse = Mean.of(jnp.abs(error), mask), RootMean.of(error**2, mask)
        return loss.total / jnp.maximum(loss.count, 1), {"loss": loss, "mae": mae, "rmse": rmse}


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Mean squared error of a forecast, beside that of repeating the last observed row.

    A forecast worth having is below ``repeat_last_mse`` and ``repeat_last_mae``, which are of the same
    windows and in the same units as ``loss`` and ``mae``.

    Attributes:
      target: the batch field with ``float [batch, horizon, variables]``, of the outputs' shape.
      history: the batch field with ``float [batch, window, variables]``, the rows before the target.

    >>> batch = {"series": jnp.array([[[7.0], [1.0]]]), "target": jnp.array([[[2.0], [3.0]]])}
    >>> loss, metrics = Forecast()(jnp.array([[[2.0], [2.0]]]), batch)
    >>> float(loss), metrics["repeat_last_mse"].compute()
    (0.5, 2.5)
    """

    target: str = "target"
    history: str = "series"

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        """``outputs: float [batch, horizon, variables]``; masked rows count for nothing."""
        target, history, mask = batch[self.target], batch[self.history], batch.get("mask")
        error = _error(outputs, target)
        if target.ndim != 3 or history.ndim != 3 or history.shape[2] != target.shape[2]:
            raise InputError(
                f"{self.history!r} {history.shape} and {self.target!r} {target.shape}: Forecast takes "
                "[batch, steps, variables] in both, with the same variables"
            )
        repeat = _error(jnp.broadcast_to(history[:, -1:], target.shape), target)
        loss = Mean.of(error**2, mask)
        return loss.total / jnp.maximum(loss.count, 1), {
            "loss": loss,
            "mae": Mean.of(jnp.abs(error), mask),
            "repeat_last_mse": Mean.of(repeat**2, mask),
            "repeat_last_mae": Mean.of(jnp.abs(repeat), mask),
        }

    def check(self, outputs: jax.ShapeDtypeStruct, batch: Batch, ids: np.ndarray) -> None:
        """Raise InputError if a field is absent or a raw target is not finite, naming the example."""
        for name in (self.target, self.history):
            if name not in batch:
                raise InputError(f"Forecast needs the batch field {name!r}; the source gives {sorted(batch)}")
        bad = ~np.isfinite(np.asarray(batch[self.target]))
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise InputError(
                f"field {self.target!r} of example {ids[row]} holds NaN or infinity ({int(bad.sum())} such "
                "values): fill the gaps, or leave out the windows that have one"
            )


def _among_best(logits: jax.Array, label: jax.Array, top: int) -> jax.Array:
    """Is the label among the ``top`` best classes, bool ``[batch, ...]``; of equal ones the first is."""
    _, best = jax.lax.top_k(logits, top)
    return (best == label[..., None]).any(-1)


def _ranked(logits: jax.Array, label: jax.Array, top: int) -> jax.Array:
    """The same by counting those before it: a mesh would send all logits to every device for ``top_k``."""
    own = jnp.take_along_axis(logits, label[..., None], axis=-1)
    place, label = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1), label[..., None]
    before = (logits > own) | ((logits == own) & (place < label))
    return (before & (place != label)).sum(-1) < top


def _heavier(label: jax.Array, *mixed: jax.Array) -> jax.Array:
    """The label that counts; of two that ``data.Mixup`` has mixed the one with more weight."""
    if not mixed:
        return label
    other, mix = mixed
    return jnp.where(mix >= 0.5, label, other)


def _error(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """``outputs - target`` in float32 at least: half precision would round the target too."""
    if outputs.shape != target.shape:  # (8, 1) - (8,) would broadcast to (8, 8)
        raise InputError(
            f"outputs {outputs.shape} and target {target.shape} must have one shape: set the model's "
            "output sizes to those of the target"
        )
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    return outputs.astype(dtype) - target.astype(dtype)
