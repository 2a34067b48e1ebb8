"""Checks of the examples' values: NaN, labels and tokens out of range, and images that look wrong.

Values are checked as the model gets them, after ``preprocess``. Sources in memory are checked in full, and so
are streams in evaluation. Of a stream in training all fields of the first batch are checked, and of later
batches those that no stage changes; the guard of the train step (``jaxtrain.step.guard``) covers the rest.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Model
from jaxtrain.data import Arrays, Normalise, Series, Source, holdout
from jaxtrain.experiment import Experiment
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID, Check
from jaxtrain.program.missing_values import check_finite
from jaxtrain.program.prepared import NotComputed, Preprocess


class ValueCheck:
    """Checks raw batches by the model and the loss.

    Args:
      model: its ``check``.
      loss: its ``check``, if it has one.
      outputs: shapes of the model's outputs.
      preprocess: of the experiment.
    """

    def __init__(self, model: Model, loss: Any, outputs: Any, preprocess: Preprocess) -> None:
        self.model, self._preprocess, self._checks = model, preprocess, []
        if model.check is not None:
            self._checks.append(model.check)
        if hasattr(loss, "check"):
            self._checks.append(functools.partial(loss.check, outputs))

    def __call__(self, batch: Batch, ids: np.ndarray) -> None:
        """Check all fields; raise InputError for a value that the model or the loss does not accept."""
        self._check(self._preprocess(batch), ids)

    def unchanged(self, batch: Batch, ids: np.ndarray) -> None:
        """Check the fields that ``preprocess`` does not change, which costs no computation."""
        self._check(self._preprocess(batch, compute=False), ids)

    def _check(self, batch: Batch, ids: np.ndarray) -> None:
        for check in self._checks:
            with contextlib.suppress(NotComputed):
                check(batch, ids)


def value_checks(
    exp: Experiment, model: Model, outputs: Any, sources: Mapping[str, Source]
) -> dict[str, ValueCheck]:
    """Make the check of each split, by name; ``outputs`` are the shapes of the model's outputs."""
    one = sources["train"].gather(np.zeros(1, np.int64))
    raw = {name: jax.ShapeDtypeStruct((exp.batch, *x.shape[1:]), x.dtype) for name, x in one.items()}
    ids = jax.ShapeDtypeStruct((exp.batch,), np.int32)
    train = Preprocess(exp.preprocess, {**raw, EXAMPLE_ID: ids, EPOCH: ids}, exp.augment)
    other = Preprocess(exp.preprocess, {**raw, EXAMPLE_ID: ids})
    splits = {name: train if name == "train" else other for name in sources}
    return {name: ValueCheck(model, exp.loss, outputs, each) for name, each in splits.items()}


def check_values(
    checks: Mapping[str, ValueCheck], exp: Experiment, sources: Mapping[str, Source]
) -> tuple[str, ...]:
    """Check every example of a source in memory, and the first example of any other.

    Returns:
      Warnings, one per line: NaN that the loss leaves out, or where ``exp.guard`` is not ``"stop"``.

    Raises:
      InputError: a value that the model or the loss does not accept, NaN among them.
    """
    lines = list[str]()
    for name, source in sources.items():
        in_memory = isinstance(source, Arrays)
        ids = np.arange(len(source)) if in_memory else np.zeros(1, np.int64)
        fields = source.fields if isinstance(source, Arrays) else source.gather(ids)
        indices = source_indices(exp, name)
        with_split_name(name, checks[name], indices)(fields, ids)
        try:
            if in_memory:
                noted = functools.partial(_add_note, lines, name)
                with_split_name(name, check_finite(exp, checks[name].model, noted), indices)(fields, ids)
        except InputError as error:
            if exp.guard == "stop":
                raise
            lines.append(f"{error} (guard={exp.guard} trains all the same)")
    return tuple(lines)


def _add_note(lines: list[str], split: str, text: str) -> None:
    lines.append(f"{split}: {text}")


def source_indices(exp: Experiment, split: str) -> np.ndarray | None:
    """Return the indices of a split's examples in ``exp.train`` where a part of it is held out, else None."""
    if not exp.holdout or split == "test":
        return None
    train, valid = holdout(len(exp.train), exp.holdout)
    return train if split == "train" else valid


def check_first(exp: Experiment, check: ValueCheck) -> Check:
    """The check of the first batch of a stream: all fields and, with ``guard="stop"``, also NaN."""

    def check_both(batch: Batch, ids: np.ndarray) -> None:
        if exp.guard == "stop":
            check_finite(exp, check.model)(batch, ids)
        check(batch, ids)

    return check_both


def series_notes(source: Source) -> tuple[str, ...]:
    """Warnings about gaps in the times of a ``Series``, one per line."""
    return source.notes() if isinstance(source, Series) else ()


def image_notes(exp: Experiment, source: Source) -> tuple[str, ...]:
    """Warnings about a suspicious field ``image``, one per line.

    They are not errors, because a custom model may expect such images: channels first (the shipped models
    refuse them); bytes or large numbers without normalisation; numbers in 0..1 that ``Normalise`` divides by
    255 again. Images with other than 1 to 4 channels count as channels-last unless only the first axis
    looks like channels.

    Args:
      exp: its ``preprocess`` stages are checked.
      source: its training examples, of which the first two are read.
    """
    batch = source.gather(np.arange(min(2, len(source))))
    image = batch.get("image")
    if image is None or image.ndim != 4:
        return ()
    lines, shape = [], image.shape[1:]
    if shape[0] in (1, 3, 4) and shape[2] > 4 and shape[1] > 4:
        lines.append(
            f"image {list(shape)} looks like [channel, height, width]: stages such as Flip and Crop take "
            "[height, width, channel] (use .transpose(0, 2, 3, 1) in the source)"
        )
    floats = np.issubdtype(image.dtype, np.floating)
    most = float(np.abs(image).max()) if image.size else 0.0
    if not exp.preprocess and most > (255 if floats else 1):
        lines.append(
            f"image is {image.dtype} with values up to {most:.6g} and preprocess is empty: the model gets "
            "raw values (data.Normalise brings them near 0)"
        )
    for stage in exp.preprocess:
        if isinstance(stage, Normalise) and floats and 0 < most <= 1 and stage.scale > 1:
            lines.append(
                f"image is {image.dtype} with values up to {most:.6g}, and Normalise divides them by "
                f"{stage.scale:g}: use scale=1 for images in 0..1"
            )
    return tuple(lines)


def with_split_name(name: str, check: Check, indices: np.ndarray | None = None) -> Check:
    """Make ``check`` prefix its errors with the name of the split, and name examples as their source does.

    Args:
      name: of the split.
      check: the check.
      indices: of the split's examples in their source (``source_indices``); None: all, in order.
    """

    def named_check(batch: Batch, ids: np.ndarray) -> None:
        try:
            check(batch, ids if indices is None else indices[ids])
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    return named_check
