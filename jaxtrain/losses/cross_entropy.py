"""Softmax cross-entropy: one class for each example, pixel or token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.chunked_logits import ChunkedLogits
from jaxtrain.core.errors import InputError
from jaxtrain.core.outputs import select_output
from jaxtrain.core.types import Batch, Metrics
from jaxtrain.metrics import Classification, LanguageModel, Mean, MeanIoU, Segmentation
from jaxtrain.metrics.mean import expand_mask
from jaxtrain.metrics.task_inputs import check_class_shapes

Task = Literal["classification", "segmentation", "language_model"]


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy with integer labels, in nats; also reports ``accuracy``.

    Attributes:
      smoothing: label smoothing s in [0, 1): the target is ``(1 - s) * one_hot + s / classes``
        (Szegedy et al. 2016, arXiv:1512.00567, section 7). It is part of the loss that training minimises and
        reports; evaluations report the cross-entropy without it as ``loss``, and with it as
        ``smoothed_loss``.
      top: above 1, also report ``top{top}``: the fraction of labels among the ``top`` highest logits.
      label: name of the batch field with the class indices, ``int [batch, ...]`` in ``[0, classes)``.
      iou: also report ``mean_iou``, the intersection over union averaged over classes, for semantic
        segmentation: labels ``int [batch, height, width]``.
      ignore: a label that counts nowhere, neither in the loss nor in a metric, such as 255 or -1. None: every
        label must be a class.
      output: the name or position of the logits, where the model returns several outputs.
      task: what ``python -m jaxtrain evaluate`` reports: ``"classification"``, ``"segmentation"`` or
        ``"language_model"`` (``jaxtrain.metrics``); with ``iou`` always segmentation.

    The model's outputs are logits ``float [batch, ..., classes]``; the loss is computed in float32 or wider.

    ``data.Mixup`` adds the fields ``label_mixed``, the second label, and ``mix``, the weight of the first
    label, float ``[batch]``. The loss is then the weighted mean of the losses of both labels, and accuracy is
    that of the label with the larger weight. Where one of the two is ``ignore``, the pair counts nowhere.

    For a model that returns ``ChunkedLogits`` the logits are computed chunk by chunk and never stored all at
    once, except with ``iou``.

    >>> batch = {"label": jnp.array([0, 1])}
    >>> loss, metrics = CrossEntropy()(jnp.array([[9.0, 0.0], [9.0, 0.0]]), batch)
    >>> metrics["accuracy"].compute()
    0.5
    >>> loss, _ = CrossEntropy(ignore=-1)(jnp.zeros((2, 4)), {"label": jnp.array([0, -1])})
    >>> round(float(loss), 4)
    1.3863
    """

    smoothing: float = 0.0
    top: int = 1
    label: str = "label"
    iou: bool = False
    ignore: int | None = None
    output: str | int | None = None
    task: Task = dataclasses.field(default="classification", metadata={"operational": True})

    chunked: ClassVar[bool] = True
    """Marks a loss that accepts ``ChunkedLogits``."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise InputError(f"loss.smoothing is {self.smoothing}: it must be in [0, 1)")
        if self.top < 1:
            raise InputError(f"loss.top is {self.top}: it must be at least 1")
        if self.task not in get_args(Task):
            raise InputError(f"loss.task is {self.task!r}: it must be one of {', '.join(get_args(Task))}")

    @property
    def report(self) -> Classification | LanguageModel:
        """The report of the loss's task."""
        reports = {"classification": Classification, "language_model": LanguageModel}
        kind = Segmentation if self.iou else reports.get(self.task, Segmentation)
        return kind(label=self.label, ignore=self.ignore, output=self.output)

    def __call__(self, outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Return the loss and its metrics.

        Args:
          outputs: logits, float ``[batch, ..., classes]``, or several outputs with these as ``output``.
          batch: has the label field, and optionally ``mask``, ``label_mixed`` and ``mix``.

        Raises:
          InputError: the label's shape is not that of the outputs without the last axis.
        """
        metrics = self._metrics(outputs, batch)
        loss = metrics["loss"]
        # max(): a batch whose every row is masked has loss 0, not NaN.
        return loss.total / jnp.maximum(loss.count, 1), metrics

    def eval_metrics(self, outputs: Any, batch: Batch) -> Metrics:
        """Return the metrics of an evaluation: ``loss`` without smoothing, ``smoothed_loss`` with it."""
        return self._metrics(outputs, batch, evaluates=True)

    def _metrics(self, outputs: Any, batch: Batch, evaluates: bool = False) -> Metrics:
        outputs = select_output(outputs, self.output, "loss.output")
        label, mask = batch[self.label], batch.get("mask")
        check_class_shapes(outputs.shape, label.shape, self.label)
        targets = [label]
        if "label_mixed" in batch:
            targets += [batch["label_mixed"], batch["mix"].reshape(-1, *(1,) * (label.ndim - 1))]
        if self.ignore is not None:
            targets[:2], mask = self._drop_ignored(targets[:2], mask)
            label = targets[0]
        if isinstance(outputs, ChunkedLogits) and self.iou:
            outputs = outputs.full()
        per_label = functools.partial(self._per_label, evaluates=evaluates)
        if isinstance(outputs, ChunkedLogits):
            rows = outputs.map_chunks(
                functools.partial(per_label, in_top=_in_top_by_counting),
                *(jnp.broadcast_to(x, label.shape) for x in targets),
            )
        else:
            rows = per_label(outputs, *targets, in_top=_in_top_by_sorting)
        metrics: Metrics = {name: Mean.of(values, mask) for name, values in rows.items()}
        if self.iou and not isinstance(outputs, ChunkedLogits):
            metrics["mean_iou"] = MeanIoU.of(outputs, _main_label(*targets), mask)
        return metrics

    def _drop_ignored(
        self, labels: list[jax.Array], mask: jax.Array | None
    ) -> tuple[list[jax.Array], jax.Array]:
        """Return the labels with class 0 in place of ``ignore``, and the mask without those places."""
        labels = [_widened(label) for label in labels]
        included = jnp.stack([label != self.ignore for label in labels]).all(0)
        if mask is not None:
            included &= expand_mask(mask, included.ndim) > 0
        return [jnp.where(label == self.ignore, 0, label) for label in labels], included

    def _per_label(
        self,
        logits: jax.Array,
        label: jax.Array,
        *mixed: jax.Array,
        in_top: Callable[..., jax.Array],
        evaluates: bool,
    ) -> dict[str, jax.Array]:
        """Return the loss and the hits of each label: float ``[batch, ...]``."""
        logp = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))

        def mean_nll(smoothing: float) -> jax.Array:
            nll = _nll(logp, label, smoothing)
            if not mixed:
                return nll
            other, mix = mixed
            return mix * nll + (1 - mix) * _nll(logp, other, smoothing)

        nll = mean_nll(self.smoothing)
        main = _main_label(label, *mixed)
        rows = {"loss": nll, "accuracy": (logits.argmax(-1) == main).astype(nll.dtype)}
        if self.top > 1:
            rows[f"top{self.top}"] = in_top(logits, main, self.top).astype(nll.dtype)
        if evaluates and self.smoothing:
            rows |= {"loss": mean_nll(0.0), "smoothed_loss": nll}
        return rows

    def outside(self, outputs: Any, batch: Batch) -> jax.Array:
        """Return how many labels are neither masked, ``ignore`` nor in ``0..classes - 1``: int32 ``[]``.

        It covers what ``check`` cannot see: labels changed by augmentation, and training loops that do not
        call ``check``.

        Args:
          outputs: logits, ``[batch, ..., classes]``; only the shape is used.
          batch: has the label field, and optionally ``label_mixed`` and ``mask``.
        """
        classes = select_output(outputs, self.output, "loss.output").shape[-1]
        count, mask = jnp.int32(0), batch.get("mask")
        for name in (self.label, "label_mixed"):
            label = batch.get(name)
            if label is not None and jnp.issubdtype(label.dtype, jnp.integer):
                label = _widened(label)
                bad = (label < 0) | (label >= classes)
                if self.ignore is not None:
                    bad &= label != self.ignore
                if mask is not None:
                    bad &= expand_mask(mask, bad.ndim) > 0
                count += bad.sum(dtype=jnp.int32)
        return count

    def check(self, outputs: Any, batch: Batch, ids: np.ndarray) -> None:
        """Raise InputError for a raw label that is no class and not ``ignore``, naming the example.

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
        classes = select_output(outputs, self.output, "loss.output").shape[-1]
        label = np.asarray(batch[self.label])
        if not np.issubdtype(label.dtype, np.integer):
            raise InputError(f"field {self.label!r} is {label.dtype}: class labels must be integers")
        if self.top > classes:
            raise InputError(f"loss.top={self.top} is more than the model's {classes} classes: lower it")
        bad = (label < 0) | (label >= classes)
        if self.ignore is not None:
            bad &= label.astype(np.int64) != self.ignore
        if bad.any():
            rows = np.unique(np.argwhere(bad)[:, 0])
            more = ", ".join(f"{ids[row]}" for row in rows[1:6]) + (", ..." if len(rows) > 6 else "")
            count = f"{int(bad.sum())} such" + (f", also in example {more}" if more else "")
            fix = "fix the labels or set the model's classes; loss.ignore leaves a label out"
            if classes == 1:
                fix = "one logit for two classes takes BinaryCrossEntropy"
            raise InputError(
                f"label {label[bad][0]} of example {ids[rows[0]]} in field {self.label!r} is outside the "
                f"model's {classes} classes 0..{classes - 1} ({count}): {fix}"
            )


def _nll(logp: jax.Array, label: jax.Array, smoothing: float) -> jax.Array:
    """Return the loss of each label, float ``[batch, ...]``."""
    nll = -jnp.take_along_axis(logp, label[..., None], axis=-1)[..., 0]
    if smoothing:
        nll = (1 - smoothing) * nll - smoothing * logp.mean(-1)
    return nll


def _widened(label: jax.Array) -> jax.Array:
    """Return labels as signed int32 at least: uint8 cannot hold 256, and XLA would compare with 0."""
    return label if label.dtype == jnp.int64 else label.astype(jnp.int32)


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
