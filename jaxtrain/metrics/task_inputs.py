"""Outputs and labels as losses and reports take them: checks of their shapes, and labels of 0 and 1."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError


def check_class_shapes(logits: tuple[int, ...], label: tuple[int, ...], field: str) -> None:
    """Raise InputError unless there is one class index for each row of logits: JAX may broadcast others.

    Args:
      logits: their shape, ``[batch, ..., classes]``.
      label: that of the labels, ``[batch, ...]``.
      field: the name of the batch field with the labels.
    """
    if label == logits[:-1]:
        return
    fix = "give one class index for each row of logits"
    if logits[-1:] == (1,):
        fix = "one logit for two classes takes BinaryCrossEntropy and metrics.Binary"
    elif label == (*logits[:-1], 1):
        fix = "remove the last axis, label.squeeze(-1), in the source or in preprocess"
    elif label == logits:
        fix = "it looks one-hot: use class indices, label.argmax(-1), in the source or in preprocess"
    raise InputError(
        f"field {field!r} has shape {list(label)} for logits {list(logits)}, which take class indices "
        f"{list(logits[:-1])}: {fix}"
    )


def same_shape(logits: jax.Array, label: jax.Array, field: str) -> tuple[jax.Array, jax.Array]:
    """Return both without a last axis of 1 that only one of them has, or raise InputError.

    >>> [x.shape for x in same_shape(jnp.zeros((8, 1)), jnp.zeros(8), "label")]
    [(8,), (8,)]
    """
    if logits.shape == (*label.shape, 1):
        logits = logits[..., 0]
    if label.shape == (*logits.shape, 1):
        label = label[..., 0]
    if logits.shape != label.shape:
        raise InputError(
            f"outputs {list(logits.shape)} and labels {list(label.shape)} in field {field!r} must have the "
            "same shape: one logit for each label of 0 or 1 (one score for each class: CrossEntropy and "
            "metrics.Classification)"
        )
    return logits, label


class BinaryLabels(NamedTuple):
    """Labels of 0 and 1: bool arrays ``[batch, ...]``.

    Attributes:
      positive: the label is 1.
      wanted: the label is not the ignored one.
      wrong: the label is wanted, and neither 0 nor 1.
    """

    positive: jax.Array
    wanted: jax.Array
    wrong: jax.Array


def zero_or_one(label: jax.Array, ignore: int | None) -> BinaryLabels:
    """Read labels of 0 and 1, of any dtype.

    >>> zero_or_one(jnp.array([0.0, 1.0, -1.0]), ignore=-1).wanted.tolist()
    [True, True, False]
    """
    if label.dtype == bool:
        return BinaryLabels(label, jnp.ones(label.shape, bool), jnp.zeros(label.shape, bool))
    if jnp.issubdtype(label.dtype, jnp.integer):
        label = label.astype(jnp.int32)  # ``ignore`` may not fit a smaller or unsigned type
    wanted = jnp.ones(label.shape, bool) if ignore is None else label != ignore
    return BinaryLabels(label == 1, wanted, wanted & (label != 0) & (label != 1))


def prediction_error(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """Return ``outputs - target`` in float32 or wider, since half precision would round the target."""
    if outputs.shape != target.shape:  # (8, 1) - (8,) would broadcast to (8, 8)
        raise InputError(
            f"outputs {outputs.shape} and target {target.shape} must have the same shape: set the model's "
            "output sizes to those of the target"
        )
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    return outputs.astype(dtype) - target.astype(dtype)


def check_threshold(threshold: float, setting: str) -> None:
    """Raise InputError unless ``threshold`` is in (0, 1)."""
    if not 0 < threshold < 1:
        raise InputError(f"{setting}.threshold is {threshold}: it is a probability, in (0, 1)")


def logit_of(probability: float) -> float:
    """Return the logit whose sigmoid is ``probability``.

    >>> logit_of(0.5)
    0.0
    """
    return math.log(probability / (1 - probability))
