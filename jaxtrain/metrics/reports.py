"""Task reports: what ``python -m jaxtrain evaluate`` reports in addition to the loss's own metrics.

A report is a function ``(outputs, batch) -> metrics`` for one task. The shipped losses name theirs (their
attribute ``report``); ``Experiment(report=...)`` names it for a loss of your own. Nothing is guessed from the
shapes of outputs and labels.

A report's attribute ``columns`` names the figures by class that are shown as a table.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.chunked_logits import ChunkedLogits, full_logits
from jaxtrain.core.errors import InputError
from jaxtrain.core.outputs import select_output
from jaxtrain.core.types import Batch, Metrics
from jaxtrain.metrics.counts import (
    BinaryCounts,
    ClassCounts,
    ConfusionMatrix,
    RegionCounts,
    count_labels,
    ratio,
    weighted_means,
)
from jaxtrain.metrics.figures import LEFT_OUT, report_figures  # noqa: F401 - the doctests
from jaxtrain.metrics.mean import Bits, Mean, Perplexity, RootMean, Total, expand_mask
from jaxtrain.metrics.r2 import R2
from jaxtrain.metrics.task_inputs import (
    check_class_shapes,
    check_threshold,
    logit_of,
    prediction_error,
    same_shape,
    zero_or_one,
)

MATRIX_CLASSES = 1000
"""Most classes for which ``Classification`` also counts the confusion matrix."""

Unit = Literal["token", "byte"]


@dataclasses.dataclass(frozen=True)
class Classification:
    """Report of a model with one score for each class: precision, recall and F1 by class, and their means.

    The figures are those of ``ClassCounts``. ``confusion`` is added for up to ``MATRIX_CLASSES`` classes: int
    ``[classes, classes]``, a row for each true class. Labels outside the classes are not counted;
    ``labels_left_out`` says how many there were.

    Attributes:
      label: name of the batch field with the class indices, int ``[batch, ...]``, or one-hot, in the shape of
        the outputs (a row of zeros has no class and is not counted).
      ignore: a label that counts nowhere, such as 255.
      output: the name or position of the logits ``[batch, ..., classes]`` among several outputs.

    >>> metrics = Classification()(jnp.array([[2.0, 1.0], [0.0, 3.0]]), {"label": jnp.array([0, 0])})
    >>> figures = report_figures(metrics)
    >>> figures["macro_recall"], figures["confusion"].tolist()
    (0.25, [[1, 1], [0, 0]])
    """

    label: str = "label"
    ignore: int | None = None
    output: str | int | None = None

    columns: ClassVar[tuple[str, ...]] = ("precision", "recall", "f1", "support")
    counts: ClassVar[type[ClassCounts]] = ClassCounts

    def __call__(self, outputs: Any, batch: Batch) -> Metrics:
        """Return the metrics of one batch."""
        logits, label, mask = class_scores(self, outputs, batch)
        metrics: Metrics = {"classes": self.counts.of(logits, label, mask, self.ignore)}
        if logits.shape[-1] <= MATRIX_CLASSES:
            metrics["confusion"] = ConfusionMatrix.of(logits, label, mask, self.ignore)
        left_out = count_labels(label, logits.shape[-1], mask, self.ignore).left_out
        return {**metrics, LEFT_OUT: Total(left_out)}


@dataclasses.dataclass(frozen=True)
class Segmentation(Classification):
    """Report of a model that scores the classes of each pixel: IoU by class and their mean.

    Also reports the figures of ``Classification`` over pixels.

    Attributes:
      label: name of the batch field with the classes, int ``[batch, height, width]``.
      ignore: a label that counts nowhere, often 255.
      output: the name or position of the logits ``[batch, height, width, classes]`` among several outputs.

    >>> logits, label = jnp.array([[[[2.0, 1.0], [0.0, 3.0]]]]), jnp.array([[[0, 255]]])
    >>> report_figures(Segmentation(ignore=255)(logits, {"label": label}))["mean_iou"]
    1.0
    """

    columns: ClassVar[tuple[str, ...]] = ("precision", "recall", "f1", "iou", "support")
    counts: ClassVar[type[ClassCounts]] = RegionCounts


@dataclasses.dataclass(frozen=True)
class Binary:
    """Report of a model with one logit: accuracy, and precision, recall and F1 of the positive class.

    Attributes:
      label: name of the batch field with 0 or 1, of any dtype: ``[batch, ...]``, or with a last axis of 1.
      threshold: the probability above which a prediction is positive, in (0, 1).
      ignore: a label that counts nowhere. Labels other than 0 and 1 are not counted either, and
        ``labels_left_out`` says how many there were.
      output: the name or position of the logits, ``[batch, ...]`` or with a last axis of 1, among several
        outputs.

    >>> batch = {"label": jnp.array([1, 1, 0])}
    >>> report_figures(Binary()(jnp.array([[2.0], [-1.0], [-3.0]]), batch))["recall"]
    0.5
    """

    label: str = "label"
    threshold: float = 0.5
    ignore: int | None = None
    output: str | int | None = None

    columns: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_threshold(self.threshold, "report")

    def __call__(self, outputs: Any, batch: Batch) -> Metrics:
        """Return the metrics of one batch."""
        logits, label, included, left_out = binary_logits(self, outputs, batch)
        positive = logits > logit_of(self.threshold)
        return {"binary": BinaryCounts.of(positive, label, included), LEFT_OUT: Total(left_out)}


@dataclasses.dataclass(frozen=True)
class MultiLabel(Binary):
    """Report of a model with one logit for each of several labels: precision, recall and F1 by label.

    ``accuracy`` is over all labels, ``exact_match`` over examples whose labels are all right; the macro
    averages are over all labels, the micro averages count all labels together, and the weighted averages
    are weighted by the number of positive labels.

    Attributes:
      label: name of the batch field with 0 or 1, of any dtype: ``[batch, ..., labels]``.
      threshold: the probability above which a prediction is positive, in (0, 1).
      ignore: a label that counts nowhere, as in ``Binary``.
      output: the name or position of the logits ``[batch, ..., labels]`` among several outputs.

    >>> batch = {"label": jnp.array([[1, 0], [1, 1]])}
    >>> figures = report_figures(MultiLabel()(jnp.array([[2.0, -1.0], [3.0, -2.0]]), batch))
    >>> figures["recall"].tolist(), figures["exact_match"]
    ([1.0, 0.0], 0.5)
    """

    columns: ClassVar[tuple[str, ...]] = ("precision", "recall", "f1", "support")

    def __call__(self, outputs: Any, batch: Batch) -> Metrics:
        """Return the metrics of one batch."""
        logits, label, included, left_out = binary_logits(self, outputs, batch)
        if logits.ndim < 2:
            raise InputError(
                f"MultiLabel takes outputs [batch, labels], not {list(logits.shape)}: use metrics.Binary"
            )
        positive, axes = logits > logit_of(self.threshold), tuple(range(logits.ndim - 1))
        right = ((positive == label) | ~included).all(-1)
        return {
            "labels": LabelCounts.of(positive, label, included, axes),
            "exact_match": Mean.of(right, included.any(-1)),
            LEFT_OUT: Total(left_out),
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelCounts(BinaryCounts):
    """``BinaryCounts`` of several labels, with macro and micro averages.

    >>> yes = jnp.array([[True, True], [True, False]])
    >>> LabelCounts.of(yes, yes, axis=0).compute()["macro_recall"]
    1.0
    """

    def compute(self) -> Any:
        """Return ``accuracy``, the figures of ``BinaryCounts`` by label, and their averages."""
        by_label = super().compute()
        pooled = BinaryCounts(*(np.sum(getattr(self, f.name)) for f in dataclasses.fields(self))).compute()
        names = ("precision", "recall", "f1")
        macro = {f"macro_{name}": float(ratio(by_label[name].sum(), by_label[name].size)) for name in names}
        micro = {f"micro_{name}": pooled[name] for name in names}
        weighted = weighted_means({name: by_label[name] for name in names}, by_label["support"])
        shown = {name: by_label[name] for name in (*names, "support")}
        return {"accuracy": pooled["accuracy"], **shown, **macro, **micro, **weighted}


@dataclasses.dataclass(frozen=True)
class Regression:
    """Report of a model that predicts numbers: ``mae``, ``mse``, ``rmse`` and ``r2``.

    The errors are means over all elements. ``r2`` is that of each output, the last axis, averaged
    (``metrics.R2``).

    Attributes:
      target: name of the batch field with the targets, ``[batch, ...]``, in the shape of the outputs.
      output: the name or position of the predictions among several outputs.

    >>> batch = {"target": jnp.array([1.0, 2.0, 3.0])}
    >>> report_figures(Regression()(jnp.array([1.0, 2.0, 4.0]), batch))["r2"]
    0.5
    """

    target: str = "target"
    output: str | int | None = None

    columns: ClassVar[tuple[str, ...]] = ()

    def __call__(self, outputs: Any, batch: Batch) -> Metrics:
        """Return the metrics of one batch."""
        prediction = select_output(outputs, self.output, "report.output")
        target, mask = batch_field(batch, self.target, "target"), batch.get("mask")
        error = prediction_error(prediction, target)
        squared = error**2
        return {
            "mae": Mean.of(jnp.abs(error), mask),
            "mse": Mean.of(squared, mask),
            "rmse": RootMean.of(squared, mask),
            "r2": R2.of(prediction, target, mask),
        }


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Report of a model that predicts the next token: ``perplexity``, and ``bits_per_token`` or ``_byte``.

    Attributes:
      label: name of the batch field with the next tokens, int ``[batch, length]``.
      ignore: a label that counts nowhere, such as that of padding. Labels outside the vocabulary are not
        counted either, and ``labels_left_out`` says how many there were.
      unit: what a token is: ``"byte"`` reports ``bits_per_byte``, ``"token"`` ``bits_per_token``.
      output: the name or position of the logits ``[batch, length, vocab]`` among several outputs.

    >>> batch = {"label": jnp.zeros((1, 3), int)}
    >>> figures = report_figures(LanguageModel(unit="byte")(jnp.zeros((1, 3, 8)), batch))
    >>> round(figures["perplexity"], 4), round(figures["bits_per_byte"], 4)
    (8.0, 3.0)
    """

    label: str = "label"
    ignore: int | None = None
    unit: Unit = "token"
    output: str | int | None = None

    chunked: ClassVar[bool] = True
    """Marks a report that accepts ``ChunkedLogits``."""
    columns: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise InputError(f"report.unit is {self.unit!r}: it must be token or byte")

    def __call__(self, outputs: Any, batch: Batch) -> Metrics:
        """Return the metrics of one batch."""
        nll, included, left_out = self.token_losses(outputs, batch)
        return {
            "perplexity": Perplexity.of(nll, included),
            f"bits_per_{self.unit}": Bits.of(nll, included),
            LEFT_OUT: Total(left_out),
        }

    def token_losses(self, outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return each token's loss in nats and whether it counts, ``[batch, length]``; how many do not."""
        logits = select_output(outputs, self.output, "report.output")
        label = batch_field(batch, self.label, "label")
        check_class_shapes(logits.shape, label.shape, self.label)
        label, included, left_out = count_labels(label, logits.shape[-1], batch.get("mask"), self.ignore)

        def surprise(logits: jax.Array, label: jax.Array) -> jax.Array:
            logp = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
            return -jnp.take_along_axis(logp, label[..., None], axis=-1)[..., 0]

        chunks = isinstance(logits, ChunkedLogits)
        nll = logits.map_chunks(surprise, label) if chunks else surprise(logits, label)
        return nll, included, left_out


def class_scores(
    report: Classification, outputs: Any, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return logits ``[batch, ..., classes]``, labels ``[batch, ...]`` and their mask."""
    logits = full_logits(select_output(outputs, report.output, "report.output"))
    label, mask = batch_field(batch, report.label, "label"), batch.get("mask")
    if label.shape == logits.shape and label.ndim > 1:  # one-hot
        has_class = label.astype(bool).any(-1)
        mask = has_class if mask is None else has_class & (expand_mask(mask, has_class.ndim) > 0)
        label = label.argmax(-1)
    check_class_shapes(logits.shape, label.shape, report.label)
    return logits, label, mask


def binary_logits(
    report: Binary, outputs: Any, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return float32 logits, bool labels, which of them count, and how many were left out."""
    logits = select_output(outputs, report.output, "report.output")
    logits, label = same_shape(logits, batch_field(batch, report.label, "label"), report.label)
    positive, wanted, wrong = zero_or_one(label, report.ignore)
    if "mask" in batch:
        wanted &= expand_mask(batch["mask"], label.ndim) > 0
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    return logits.astype(wide), positive, wanted & ~wrong, (wanted & wrong).sum(dtype=jnp.int32)


def batch_field(batch: Batch, name: str, setting: str) -> jax.Array:
    if name not in batch:
        fields = ", ".join(sorted(set(batch) - {"mask"}))
        raise InputError(f"report.{setting} is {name!r}: the batch has the fields {fields}")
    return jnp.asarray(batch[name])
