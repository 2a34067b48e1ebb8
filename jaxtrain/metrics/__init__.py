"""Metrics that merge exactly: sums and counts on the device, divided only when they are read.

So results do not depend on how examples are split into batches: ragged last batches, padding, gradient
accumulation and sharding need no weighting.

A metric is any pytree with ``merge(other)`` and ``compute()``. ``compute`` returns a number, or a table: an
array or a dict. Task reports (``Classification``, ``Binary``, ``MultiLabel``, ``Segmentation``,
``Regression``, ``LanguageModel``) say what an evaluation reports in addition to the loss's own metrics.
"""

from jaxtrain.metrics.counts import (
    BinaryCounts,
    ClassCounts,
    ConfusionMatrix,
    MeanIoU,
    RegionCounts,
)
from jaxtrain.metrics.figures import report_figures
from jaxtrain.metrics.mean import Bits, Mean, Perplexity, RootMean, Total, merge
from jaxtrain.metrics.r2 import R2
from jaxtrain.metrics.reports import (
    MATRIX_CLASSES,
    Binary,
    Classification,
    LanguageModel,
    MultiLabel,
    Regression,
    Segmentation,
)

__all__ = [
    "MATRIX_CLASSES",
    "R2",
    "Binary",
    "BinaryCounts",
    "Bits",
    "ClassCounts",
    "Classification",
    "ConfusionMatrix",
    "LanguageModel",
    "Mean",
    "MeanIoU",
    "MultiLabel",
    "Perplexity",
    "RegionCounts",
    "Regression",
    "RootMean",
    "Segmentation",
    "Total",
    "merge",
    "report_figures",
]
