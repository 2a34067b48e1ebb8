"""Losses: functions ``(outputs, batch) -> (loss, metrics)``; ``loss`` is a scalar, the mean over examples.

Any function with this signature works as ``Experiment.loss``. The losses here are frozen dataclasses, so that
the config records their settings. Rows where ``batch["mask"]`` is false are excluded from loss and metrics. A
loss may define two more methods: ``check(outputs, batch, ids)`` checks host data, after ``preprocess``,
before anything is compiled, and ``outside(outputs, batch)`` counts bad labels inside the compiled step, after
augmentation (``step.guard``).
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
    """Softmax cross-entropy with integer labels, in nats; also reports ``accuracy``.

    Attributes:
      smoothing: label smoothing s in [0, 1): the target is ``(1 - s) * one_hot + s / classes``
        (Szegedy et al. 2016, arXiv:1512.00567, section 7).
      top: above 1, also report ``top{top}``: the fraction of labels among the ``top`` highest logits.
      label: name of the batch field with the class indices, ``int [batch, ...]`` in ``[0, classes)``.
      iou: also report ``mean_iou``, the intersection over union averaged over classes, for semantic
        segmentation: labels ``int [batch, height, width]``.

    The model's outputs are logits ``float [batch, ..., classes]``; the loss is computed in float32 or wider.

    ``data.Mixup`` adds the fields ``label_mixed``, the second label, and ``mix``, the weight of the first
    label, float ``[batch]``. The loss is then the weighted mean of the losses of both labels, and accuracy is
    that of the label with the larger weight.

    For a model that returns ``ChunkedLogits`` the logits are computed chunk by chunk and never stored all at
    once, except with ``iou``.

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
    """Marks a loss that accepts ``ChunkedLogits``."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise InputError(f"loss.smoothing is {self.smoothing}: it must be in [0, 1)")
        if self.top < 1:
            raise InputError(f"loss.top is {self.top}: it must be at least 1")

    def __call__(self, outputs: jax.Array | ChunkedLogits, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Return the loss and its metrics.

        Args:
          outputs: logits, float ``[batch, ..., classes]``.
          batch: has the label field, and optionally ``mask``, ``label_mixed`` and ``mix``.

        Raises:
          InputError: the label's shape is not that of the outputs without the last axis.
        """
        label, mask = batch[self.label], batch.get("mask")
        _check_label_shape(self.label, label.shape, outputs.shape)
        targets = [label]
        if "label_mixed" in batch:
            targets += [batch["label_mixed"], batch["mix"].reshape(-1, *(1,) * (label.ndim - 1))]
        if isinstance(outputs, ChunkedLogits) and (self.iou or label.shape != outputs.shape[:-1]):
            outputs = outputs.full()
        if isinstance(outputs, ChunkedLogits):
            rows = outputs.map_chunks(
                functools.partial(self._per_label, in_top=_in_top_by_counting),
                *(jnp.broadcast_to(x, label.shape) for x in targets),
            )
        else:
            rows = self._per_label(outputs, *targets, in_top=_in_top_by_sorting)
        metrics: Metrics = {name: Mean.of(values, mask) for name, values in rows.items()}
        if self.iou and not isinstance(outputs, ChunkedLogits):
            metrics["mean_iou"] = MeanIoU.of(outputs, _main_label(*targets), mask)
        loss = metrics["loss"]
        # max(): a batch whose every row is masked has loss 0, not NaN.
        return loss.total / jnp.maximum(loss.count, 1), metrics

    def _per_label(
        self, logits: jax.Array, label: jax.Array, *mixed: jax.Array, in_top: Callable[..., jax.Array]
    ) -> dict[str, jax.Array]:
        """Return the loss and the hits of each label: float ``[batch, ...]``."""
        logp = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        nll = self._nll(logp, label)
        if mixed:
            other, mix = mixed
            nll = mix * nll + (1 - mix) * self._nll(logp, other)
            label = _main_label(label, *mixed)
        rows = {"loss": nll, "accuracy": (logits.argmax(-1) == label).astype(nll.dtype)}
        if self.top > 1:
            rows[f"top{self.top}"] = in_top(logits, label, self.top).astype(nll.dtype)
        return rows

    def _nll(self, logp: jax.Array, label: jax.Array) -> jax.Array:
        """Return the loss of each label, float ``[batch, ...]``."""
        nll = -jnp.take_along_axis(logp, label[..., None], axis=-1)[..., 0]
        if self.smoothing:
            nll = (1 - self.smoothing) * nll - self.smoothing * logp.mean(-1)
        return nll

    def outside(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Return how many labels, not masked, are outside ``0..classes - 1``: int32 ``[]``.

        It covers what ``check`` cannot see: labels changed by augmentation, and training loops that do not
        call ``check``.

        Args:
          outputs: logits, ``[batch, ..., classes]``; only the shape is used.
          batch: has the label field, and optionally ``label_mixed`` and ``mask``.
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
        """Raise InputError if a raw label is outside ``0..classes - 1``, naming the example.

        XLA raises no error: an index out of range gives NaN, clamps or wraps, depending on the operation.

        Args:
          outputs: shape of the logits, ``[batch, ..., classes]``.
          batch: raw host data with the label field.
          ids: int ``[batch]``, the positions of the examples in the source, for the message.
        """
        if self.label not in batch:
            raise InputError(
                f"CrossEntropy needs the batch field {self.label!r}; the batch has {sorted(batch)}"
            )
        label, classes = np.asarray(batch[self.label]), outputs.shape[-1]
        if not np.issubdtype(label.dtype, np.integer):
            raise InputError(f"field {self.label!r} is {label.dtype}: class labels must be integers")
        if self.top > classes:
            raise InputError(f"loss.top={self.top} is more than the model's {classes} classes: lower it")
        bad = (label < 0) | (label >= classes)
        if bad.any():
            rows = np.unique(np.argwhere(bad)[:, 0])
            more = ", ".join(f"{ids[row]}" for row in rows[1:6]) + (", ..." if len(rows) > 6 else "")
            count = f"{int(bad.sum())} such" + (f", also in example {more}" if more else "")
            raise InputError(
                f"label {label[bad][0]} of example {ids[rows[0]]} in field {self.label!r} is outside the "
                f"model's {classes} classes 0..{classes - 1} ({count}): fix the labels or set "
                "the model's classes"
            )


@dataclasses.dataclass(frozen=True)
class MSE:
    """Mean squared error over all elements; also reports ``rmse``, its root, and ``mae``, the absolute error.

    Attributes:
      target: name of the batch field with the targets, ``float [batch, ...]``, in the shape of the outputs.

    >>> loss, _ = MSE()(jnp.array([[1.0], [3.0]]), {"target": jnp.array([[0.0], [0.0]])})
    >>> float(loss)
    5.0
    """

    target: str = "target"

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Return the loss and its metrics for ``outputs: float [batch, ...]``."""
        error, mask = _error(outputs, batch[self.target]), batch.get("mask")
        loss = Mean.of(error**2, mask)
        mae, rmse = Mean.of(jnp.abs(error), mask), RootMean.of(error**2, mask)
        return loss.total / jnp.maximum(loss.count, 1), {"loss": loss, "mae": mae, "rmse": rmse}


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Mean squared error of a forecast; also reports ``mae`` and the error of a naive forecast.

    The naive forecast repeats the last observed row. A useful model has ``loss`` below ``repeat_last_mse``
    and ``mae`` below ``repeat_last_mae``; these are over the same windows and in the same units.

    Attributes:
      target: name of the batch field with ``float [batch, horizon, variables]``, in the shape of the outputs.
      history: name of the batch field with ``float [batch, window, variables]``, the rows before the target.

    >>> batch = {"series": jnp.array([[[7.0], [1.0]]]), "target": jnp.array([[[2.0], [3.0]]])}
    >>> loss, metrics = Forecast()(jnp.array([[[2.0], [2.0]]]), batch)
    >>> float(loss), metrics["repeat_last_mse"].compute()
    (0.5, 2.5)
    """

    target: str = "target"
    history: str = "series"

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Return the loss and its metrics for ``outputs: float [batch, horizon, variables]``."""
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


def _in_top_by_sorting(logits: jax.Array, label: jax.Array, top: int) -> jax.Array:
    """Return whether the label is among the ``top`` best classes, bool ``[batch, ...]``.

    Of classes with equal logits the first is the better one.
    """
    _, best = jax.lax.top_k(logits, top)
    return (best == label[..., None]).any(-1)


def _in_top_by_counting(logits: jax.Array, label: jax.Array, top: int) -> jax.Array:
    """Return the same from the number of better classes.

    On a mesh ``top_k`` would gather all logits on every device; this does not.
    """
    own = jnp.take_along_axis(logits, label[..., None], axis=-1)
    index, label = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1), label[..., None]
    before = (logits > own) | ((logits == own) & (index < label))
    return (before & (index != label)).sum(-1) < top


def _main_label(label: jax.Array, *mixed: jax.Array) -> jax.Array:
    """Return the label for accuracy: after ``data.Mixup`` the one with the larger weight."""
    if not mixed:
        return label
    other, mix = mixed
    return jnp.where(mix >= 0.5, label, other)


def _error(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """Return ``outputs - target`` in float32 or wider, since half precision would round the target."""
    if outputs.shape != target.shape:  # (8, 1) - (8,) would broadcast to (8, 8)
        raise InputError(
            f"outputs {outputs.shape} and target {target.shape} must have the same shape: set the model's "
            "output sizes to those of the target"
        )
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    return outputs.astype(dtype) - target.astype(dtype)


def _check_label_shape(field: str, label: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    """Raise InputError unless there is one class index for each row of logits: JAX may broadcast others."""
    if label == outputs[:-1]:
        return
    fix = "give one class index for each row of logits"
    if label == (*outputs[:-1], 1):
        fix = "remove the last axis: label.squeeze(-1)"
    elif label == outputs:
        fix = "it looks one-hot: use class indices, label.argmax(-1)"
    raise InputError(
        f"field {field!r} has shape {list(label)} for logits {list(outputs)}: CrossEntropy needs integers "
        f"{list(outputs[:-1])}; {fix}, in the source or in preprocess"
    )
