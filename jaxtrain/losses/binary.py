"""Binary cross-entropy: yes or no for each example, or for each of several labels."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.outputs import select_output
from jaxtrain.core.types import Batch, Metrics
from jaxtrain.metrics import Binary, Mean, MultiLabel
from jaxtrain.metrics.mean import expand_mask
from jaxtrain.metrics.task_inputs import check_threshold, logit_of, same_shape, zero_or_one

Task = Literal["binary", "multi_label"]


@dataclasses.dataclass(frozen=True)
class BinaryCrossEntropy:
    """Sigmoid cross-entropy with labels of 0 and 1, in nats; also reports ``accuracy``.

    The mean over all labels of all examples. It is computed from logits, in float32 or wider, so large logits
    neither overflow nor give log 0.

    Attributes:
      smoothing: label smoothing s in [0, 1): the target is ``(1 - s) * label + s / 2``. Evaluations report
        the cross-entropy without it as ``loss``, and with it as ``smoothed_loss``.
      threshold: the probability above which a prediction is positive, in (0, 1), for ``accuracy``.
      pos_weight: weight of the positive term, above 0: ``-pos_weight * y * log p - (1 - y) * log(1 - p)``.
      label: name of the batch field with the labels 0 and 1, of any dtype: ``[batch]``, ``[batch, 1]`` or
        ``[batch, labels]``.
      ignore: a label that counts nowhere, such as -1. None: every label must be 0 or 1.
      output: the name or position of the logits, where the model returns several outputs.
      task: what ``python -m jaxtrain evaluate`` reports: ``"binary"``, all labels together, or
        ``"multi_label"``, by label (``jaxtrain.metrics``).

    The model's outputs are logits, ``float [batch, ...]`` like the labels but for a last axis of 1.
    With ``data.Mixup`` the loss is the weighted mean of the losses of both labels, and accuracy is that of
    the label with the larger weight.

    >>> batch = {"label": jnp.array([1, 0])}
    >>> loss, metrics = BinaryCrossEntropy()(jnp.array([[0.0], [-2.0]]), batch)
    >>> round(float(loss), 4), metrics["accuracy"].compute()
    (0.41, 0.5)
    """

    smoothing: float = 0.0
    threshold: float = 0.5
    pos_weight: float = 1.0
    label: str = "label"
    ignore: int | None = None
    output: str | int | None = None
    task: Task = dataclasses.field(default="binary", metadata={"operational": True})

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise InputError(f"loss.smoothing is {self.smoothing}: it must be in [0, 1)")
        if not 0 < self.pos_weight < float("inf"):
            raise InputError(f"loss.pos_weight is {self.pos_weight}: it must be above 0")
        check_threshold(self.threshold, "loss")
        if self.task not in get_args(Task):
            raise InputError(f"loss.task is {self.task!r}: it must be one of {', '.join(get_args(Task))}")

    @property
    def report(self) -> Binary:
        """The report of the loss's task."""
        kind = Binary if self.task == "binary" else MultiLabel
        return kind(label=self.label, threshold=self.threshold, ignore=self.ignore, output=self.output)

    def __call__(self, outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Return the loss and its metrics.

        Args:
          outputs: logits, float ``[batch, ...]``, or several outputs with these as ``output``.
          batch: has the label field, and optionally ``mask``, ``label_mixed`` and ``mix``.
        """
        metrics = self._metrics(outputs, batch)
        loss = metrics["loss"]
        return loss.total / jnp.maximum(loss.count, 1), metrics

    def eval_metrics(self, outputs: Any, batch: Batch) -> Metrics:
        """Return the metrics of an evaluation: ``loss`` without smoothing, ``smoothed_loss`` with it."""
        return self._metrics(outputs, batch, evaluates=True)

    def _metrics(self, outputs: Any, batch: Batch, evaluates: bool = False) -> Metrics:
        logits = select_output(outputs, self.output, "loss.output")
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        fields = [batch[name] for name in (self.label, "label_mixed") if name in batch or name == self.label]
        pairs = [same_shape(logits, label, self.label) for label in fields]
        logits = pairs[0][0]
        labels = [zero_or_one(label, self.ignore) for _, label in pairs]
        included = labels[0].wanted & labels[-1].wanted
        if "mask" in batch:
            included &= expand_mask(batch["mask"], included.ndim) > 0

        def mean_nll(smoothing: float) -> jax.Array:
            each = [self._nll(logits, label.positive, smoothing) for label in labels]
            return each[0] if len(each) == 1 else mix * each[0] + (1 - mix) * each[1]

        main = labels[0].positive
        if len(labels) == 2:
            mix = batch["mix"].reshape(-1, *(1,) * (logits.ndim - 1)).astype(logits.dtype)
            main = jnp.where(mix >= 0.5, main, labels[1].positive)
        nll = mean_nll(self.smoothing)
        rows = {"loss": nll, "accuracy": (logits > logit_of(self.threshold)) == main}
        if evaluates and self.smoothing:
            rows |= {"loss": mean_nll(0.0), "smoothed_loss": nll}
        return {name: Mean.of(values, included) for name, values in rows.items()}

    def _nll(self, logits: jax.Array, positive: jax.Array, smoothing: float) -> jax.Array:
        """Return the loss of each label, float ``[batch, ...]``."""
        target = (1 - smoothing) * positive.astype(logits.dtype) + smoothing / 2
        yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        return -self.pos_weight * target * yes - (1 - target) * no

    def outside(self, outputs: Any, batch: Batch) -> jax.Array:
        """Return how many labels, not masked and not ``ignore``, are neither 0 nor 1: int32 ``[]``.

        Args:
          outputs: not used.
          batch: has the label field, and optionally ``label_mixed`` and ``mask``.
        """
        count, mask = jnp.int32(0), batch.get("mask")
        for name in (self.label, "label_mixed"):
            if name in batch:
                wrong = zero_or_one(batch[name], self.ignore).wrong
                if mask is not None:
                    wrong &= expand_mask(mask, wrong.ndim) > 0
                count += wrong.sum(dtype=jnp.int32)
        return count

    def check(self, outputs: Any, batch: Batch, ids: np.ndarray) -> None:
        """Raise InputError if a raw label is neither 0, 1 nor ``ignore``, naming the example.

        Args:
          outputs: not used.
          batch: raw host data with the label field.
          ids: int ``[batch]``, the positions of the examples in the source, for the message.
        """
        if self.label not in batch:
            raise InputError(
                f"BinaryCrossEntropy needs the batch field {self.label!r}; the batch has {sorted(batch)}"
            )
        label = np.asarray(batch[self.label])
        bad = (label != 0) & (label != 1)
        if self.ignore is not None and label.dtype != bool:
            bad &= label.astype(np.float64) != self.ignore
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise InputError(
                f"label {label[bad][0]} of example {ids[row]} in field {self.label!r} is neither 0 nor 1 "
                f"({int(bad.sum())} such): fix the labels, or set loss.ignore for a label that does not count"
            )
