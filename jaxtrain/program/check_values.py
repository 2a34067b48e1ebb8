"""Checks of the examples' values: NaN, labels and tokens out of range, and images that look wrong.

Values are checked as the model gets them, after ``preprocess``. Sources in memory are checked in full, and so
are streams in evaluation. Of a stream in training all fields of the first batch are checked, and of later
batches those that no stage changes; the guard of the train step (``jaxtrain.step.guard``) covers the rest.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Model
from jaxtrain.data import Arrays, Normalise, Series, Source, compose
from jaxtrain.experiment import Experiment
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID, Check
from jaxtrain.program.prepared import NotComputed, Preprocess

CHUNK = 2**22  # numbers checked at a time, so that no temporary array is as large as the data
SHOWN = 5  # example ids in a message
TRIED = 256  # examples with NaN that preprocess is tried on at a time


class ValueCheck:
    """Checks raw batches by the model and the loss.

    Args:
      model: its ``check``.
      loss: its ``check``, if it has one.
      outputs: shapes of the model's outputs.
      preprocess: of the experiment.
    """

    def __init__(self, model: Model, loss: Any, outputs: Any, preprocess: Preprocess) -> None:
        self._preprocess, self._checks = preprocess, []
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
    checks: Mapping[str, Check], exp: Experiment, sources: Mapping[str, Source]
) -> tuple[str, ...]:
    """Check every example of a source in memory, and the first example of any other.

    Returns:
      Warnings, one per line: NaN, where ``exp.guard`` is not ``"stop"``.

    Raises:
      InputError: a value that the model or the loss does not accept; NaN that ``preprocess`` does not fill.
    """
    lines = []
    for name, source in sources.items():
        in_memory = isinstance(source, Arrays)
        ids = np.arange(len(source)) if in_memory else np.zeros(1, np.int64)
        fields = source.fields if isinstance(source, Arrays) else source.gather(ids)
        with_split_name(name, checks[name])(fields, ids)
        try:
            if in_memory:
                with_split_name(name, check_finite(exp))(fields, ids)
        except InputError as error:
            if exp.guard == "stop":
                raise
            lines.append(f"{error} (guard={exp.guard} trains all the same)")
    return tuple(lines)


def check_first(exp: Experiment, check: Check) -> Check:
    """The check of the first batch of a stream: all fields and, with ``guard="stop"``, no NaN."""

    def check_both(batch: Batch, ids: np.ndarray) -> None:
        if exp.guard == "stop":
            check_finite(exp)(batch, ids)
        check(batch, ids)

    return check_both


def check_finite(exp: Experiment) -> Check:
    """Make a check that raises InputError for NaN or infinity that ``exp.preprocess`` does not fill."""

    def check(batch: Batch, ids: np.ndarray) -> None:
        for field, rows in not_finite(batch).items():
            if _filled_by_preprocess(exp, batch, rows):
                continue
            raise InputError(
                f"field {field!r} of {format_ids(ids[rows])} holds NaN or infinity: fill the gaps in the "
                "source or by a stage of preprocess, leave these examples out (data.Subset), or --set "
                "guard=skip to skip batches whose loss is NaN"
            )

    return check


def not_finite(batch: Batch) -> dict[str, np.ndarray]:
    """Find the rows with NaN or infinity, by field; fields without any are left out.

    Args:
      batch: arrays with a common leading axis; integer arrays have none.

    >>> not_finite({"x": np.array([[0.0, 1.0], [np.nan, 1.0]]), "label": np.array([0, 1])})
    {'x': array([1])}
    """
    bad_rows = {}
    for name, array in batch.items():
        if not jnp.issubdtype(array.dtype, jnp.inexact):  # unlike np.inexact, this includes bfloat16
            continue
        rows = max(1, CHUNK // max(1, array[:1].size))
        bad = [
            start + np.flatnonzero(~np.isfinite(part).reshape(len(part), -1).all(axis=1))
            for start in range(0, len(array), rows)
            for part in (array[start : start + rows],)
        ]
        where = np.concatenate(bad) if bad else np.zeros(0, int)
        if len(where):
            bad_rows[name] = where
    return bad_rows


def format_ids(ids: np.ndarray) -> str:
    """Format example ids for a message.

    >>> format_ids(np.array([7])), format_ids(np.arange(100, 2000))
    ('example 7', '1,900 examples (100, 101, 102, 103, 104, ...)')
    """
    if len(ids) == 1:
        return f"example {ids[0]}"
    shown = ", ".join(map(str, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")
    return f"{len(ids):,} examples ({shown})"


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


def with_split_name(name: str, check: Check) -> Check:
    """Make ``check`` prefix its errors with the name of the split."""

    def named_check(batch: Batch, ids: np.ndarray) -> None:
        try:
            check(batch, ids)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    return named_check


def _filled_by_preprocess(exp: Experiment, batch: Batch, rows: np.ndarray) -> bool:
    """Does ``preprocess`` leave no NaN in these rows? Compiles it, so this is only for data with NaN."""
    prepare: Callable[[Any], Any] = jax.jit(lambda raw: compose(*exp.preprocess)(raw, None))
    size = min(TRIED, len(rows))
    try:
        for start in range(0, len(rows), size):
            some = rows[np.minimum(np.arange(start, start + size), len(rows) - 1)]
            raw = {EXAMPLE_ID: some.astype(np.int32), **{name: array[some] for name, array in batch.items()}}
            if not_finite(jax.device_get(prepare(raw))):
                return False
        return True
    except Exception:  # a user's stage, which may need fields that a raw batch lacks
        return False
