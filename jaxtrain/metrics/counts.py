"""Counts of predicted and actual classes, and precision, recall, F1 and IoU computed from them.

Figures are those of scikit-learn with ``zero_division=0``: a class that is never predicted has precision 0,
one that has no examples recall 0. Macro averages are over the classes that occur as label or as prediction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.metrics.mean import expand_mask

LARGEST_MATRIX = 46_340
"""Most classes of a ``ConfusionMatrix``: with more it has over 2**31 cells."""


class Labels(NamedTuple):
    """Class labels of a batch, and which of them count.

    Attributes:
      label: int32 ``[batch, ...]``, 0 where it does not count.
      included: bool ``[batch, ...]``.
      left_out: int32 ``[]``, how many labels, neither masked nor ignored, are outside the classes.
    """

    label: jax.Array
    included: jax.Array
    left_out: jax.Array


def count_labels(
    label: jax.Array, classes: int, mask: jax.Array | None = None, ignore: int | None = None
) -> Labels:
    """Return the labels that count: not masked, not ``ignore``, and in ``0..classes - 1``.

    Args:
      label: int or bool ``[batch, ...]``.
      classes: the number of classes.
      mask: bool ``[batch]`` or ``[batch, ...]``.
      ignore: a label that counts nowhere, such as 255.

    >>> count_labels(jnp.array([1, -1, 255]), 2, ignore=255).included.tolist()
    [True, False, False]
    """
    if not (jnp.issubdtype(label.dtype, jnp.integer) or label.dtype == bool):
        raise InputError(f"labels are {label.dtype}: class labels must be integers")
    label = label.astype(jnp.int32)
    wanted = jnp.ones(label.shape, bool)
    if mask is not None:
        wanted &= jnp.broadcast_to(expand_mask(mask, label.ndim) > 0, label.shape)
    if ignore is not None:
        wanted &= label != ignore
    included = wanted & (label >= 0) & (label < classes)
    return Labels(jnp.where(included, label, 0), included, (wanted & ~included).sum(dtype=jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassCounts:
    """Three counts for each class: right predictions, predictions and labels.

    Enough for precision, recall, F1 and IoU, in memory proportional to the number of classes.

    Attributes:
      hits: labels predicted right, int32 ``[classes]``.
      predicted: predictions, int32 ``[classes]``.
      actual: labels, int32 ``[classes]``.

    >>> counts = ClassCounts.of(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0]))
    >>> counts.compute()["recall"].tolist()
    [0.5, 0.0]
    """

    hits: Any
    predicted: Any
    actual: Any

    @classmethod
    def of(
        cls, logits: jax.Array, label: jax.Array, mask: jax.Array | None = None, ignore: int | None = None
    ) -> Self:
        """Count the predictions of one batch, except where the label is masked, ``ignore`` or no class.

        Args:
          logits: float ``[batch, ..., classes]``.
          label: int ``[batch, ...]``.
          mask: bool ``[batch]`` or ``[batch, ...]``; where it is false, logits and label are ignored.
          ignore: a label that counts nowhere, such as 255.
        """
        classes = logits.shape[-1]
        label, included, _ = count_labels(label, classes, mask, ignore)
        guess = logits.argmax(-1).astype(jnp.int32)

        def count(index: jax.Array, rows: jax.Array) -> jax.Array:
            return jnp.zeros(classes, jnp.int32).at[index.reshape(-1)].add(rows.reshape(-1).astype(jnp.int32))

        return cls(count(label, included & (guess == label)), count(guess, included), count(label, included))

    def merge(self, other: Self) -> Self:
        """Return the sum of both."""
        return type(self)(
            add_counts(self.hits, other.hits),
            add_counts(self.predicted, other.predicted),
            add_counts(self.actual, other.actual),
        )

    def compute(self) -> Any:
        """Return figures by class and over all classes.

        By class, ``[classes]``: ``precision``, ``recall`` and ``f1``, 0 where undefined, and ``support``, the
        number of labels. Over all: ``accuracy``, and of the three figures the means over the classes that
        occur as label or as prediction (``macro_precision``, ...), the figures of all counts together
        (``micro_``, here the accuracy) and the means weighted by support (``weighted_``). These ten are NaN
        if nothing counts.
        """
        by_class = class_figures(self.hits, self.predicted, self.actual)
        del by_class["iou"]
        support = np.asarray(self.actual, np.int64)
        accuracy = float(ratio(self.hits.sum(), support.sum())) if support.sum() else float("nan")
        averages = {f"macro_{name}": self._mean(values) for name, values in by_class.items()}
        averages |= {f"micro_{name}": accuracy for name in by_class}
        averages |= weighted_means(by_class, support)
        return {"accuracy": accuracy, **averages, **by_class, "support": support}

    def _mean(self, by_class: np.ndarray) -> float:
        """Return the mean over the classes that occur; NaN if none does."""
        occurs = np.asarray(self.predicted) + np.asarray(self.actual) > 0
        return float(np.mean(by_class[occurs])) if occurs.any() else float("nan")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RegionCounts(ClassCounts):
    """``ClassCounts`` of the pixels of a segmentation, which also compute intersection over union.

    >>> counts = RegionCounts.of(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0]))
    >>> counts.compute()["iou"].tolist()
    [0.5, 0.0]
    """

    def compute(self) -> Any:
        """Return the figures of ``ClassCounts``, ``iou`` by class and ``mean_iou``.

        ``iou`` is 0 for a class that does not occur; ``mean_iou`` is the mean over those that do, NaN if none
        does.
        """
        iou = class_figures(self.hits, self.predicted, self.actual)["iou"]
        return {"mean_iou": self._mean(iou), **super().compute(), "iou": iou}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanIoU(RegionCounts):
    """The mean intersection over union as one number, to report during training.

    It is computed from the counts of all batches together; it is not a mean of batch results.

    >>> MeanIoU.of(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0])).compute()
    0.25
    """

    def compute(self) -> float:
        """Return the ``mean_iou`` of ``RegionCounts``."""
        mean_iou: float = super().compute()["mean_iou"]
        return mean_iou


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfusionMatrix:
    """Counts of (true class, predicted class): int32 ``[classes, classes]``.

    Labels that are negative, above the classes or ``ignore`` are not counted. ``ClassCounts`` computes
    precision, recall and F1.

    >>> ConfusionMatrix.of(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0])).compute().tolist()
    [[1, 1], [0, 0]]
    """

    counts: Any

    @classmethod
    def of(
        cls, logits: jax.Array, label: jax.Array, mask: jax.Array | None = None, ignore: int | None = None
    ) -> Self:
        """Count the predictions of one batch. The arguments are those of ``ClassCounts.of``.

        Raises:
          InputError: more than 46,340 classes, whose matrix has more than 2**31 cells.
        """
        classes = logits.shape[-1]
        if classes > LARGEST_MATRIX:
            raise InputError(
                f"a confusion matrix of {classes:,} classes has {classes**2:,} cells: use "
                "metrics.ClassCounts, which counts by class"
            )
        label, included, _ = count_labels(label, classes, mask, ignore)
        cell = (label * classes + logits.argmax(-1).astype(jnp.int32)).reshape(-1)
        weight = included.reshape(-1).astype(jnp.int32)
        counts = jnp.zeros(classes * classes, jnp.int32).at[cell].add(weight)
        return cls(counts.reshape(classes, classes))

    def merge(self, other: Self) -> Self:
        """Return the sum of both."""
        return type(self)(add_counts(self.counts, other.counts))

    def compute(self) -> Any:
        """Return the counts: int ``[classes, classes]``, a row for each true class."""
        return np.asarray(self.counts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BinaryCounts:
    """Right and wrong decisions between two classes, of one question or of several: int32 ``[...]``.

    >>> counts = BinaryCounts.of(jnp.array([True, True, False]), jnp.array([True, False, False]))
    >>> counts.compute()["precision"].item()
    0.5
    """

    true_positives: Any
    false_positives: Any
    false_negatives: Any
    true_negatives: Any

    @classmethod
    def of(
        cls, positive: jax.Array, label: jax.Array, included: jax.Array | None = None, axis: Any = None
    ) -> Self:
        """Count the decisions of one batch.

        Args:
          positive: the predictions, bool ``[batch, ...]``.
          label: the truth, bool ``[batch, ...]``.
          included: bool ``[batch, ...]``; where it is false, nothing is counted.
          axis: the axes to count over; None is all.
        """
        included = jnp.ones(label.shape, bool) if included is None else included
        pairs = ((positive, label), (positive, ~label), (~positive, label), (~positive, ~label))
        return cls(*((guess & truth & included).sum(axis, dtype=jnp.int32) for guess, truth in pairs))

    def merge(self, other: Self) -> Self:
        """Return the sum of both."""
        mine, theirs = ([getattr(x, f.name) for f in dataclasses.fields(x)] for x in (self, other))
        return type(self)(*map(add_counts, mine, theirs))

    def compute(self) -> Any:
        """Return figures of the counts' shape: of the positive class and over both classes.

        ``precision``, ``recall`` and ``f1`` of the positive class, 0 where undefined; ``support``, the number
        of positive labels; ``accuracy``, NaN where nothing counts; and the four counts.
        """
        names = [field.name for field in dataclasses.fields(self)]
        counts = {name: np.asarray(getattr(self, name), np.int64) for name in names}
        hits, wrong, missed, rejected = counts.values()
        total = hits + wrong + missed + rejected
        return {
            "accuracy": np.where(total > 0, ratio(hits + rejected, total), np.nan),
            "precision": ratio(hits, hits + wrong),
            "recall": ratio(hits, hits + missed),
            "f1": ratio(2 * hits, 2 * hits + wrong + missed),
            "support": hits + missed,
            **counts,
        }


def class_figures(hits: Any, predicted: Any, actual: Any) -> dict[str, Any]:
    """Return ``precision``, ``recall``, ``f1`` and ``iou`` by class from counts ``[classes]``."""
    hits, predicted, actual = (np.asarray(x, np.int64) for x in (hits, predicted, actual))
    return {
        "precision": ratio(hits, predicted),
        "recall": ratio(hits, actual),
        "f1": ratio(2 * hits, predicted + actual),
        "iou": ratio(hits, predicted + actual - hits),
    }


def weighted_means(by_class: Mapping[str, Any], support: np.ndarray) -> dict[str, float]:
    """Return the means of figures ``[classes]`` weighted by the number of labels; NaN without labels.

    >>> weighted_means({"recall": np.array([0.5, 1.0])}, np.array([3, 1]))
    {'weighted_recall': 0.625}
    """
    total = support.sum()
    return {
        f"weighted_{name}": float((values * support).sum() / total) if total else float("nan")
        for name, values in by_class.items()
    }


def add_counts(left: Any, right: Any) -> Any:
    """Add two counts; on the host in int64, where int32 would overflow at 2^31 pixels."""
    if isinstance(left, np.ndarray | np.generic):
        return np.add(left, right, dtype=np.int64)
    return left + right


def ratio(top: Any, bottom: Any) -> Any:
    """Return ``top / bottom`` in float64, and 0 where ``bottom`` is 0."""
    top, bottom = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
