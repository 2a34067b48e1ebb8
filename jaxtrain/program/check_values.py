"""Checks of the examples' values: NaN, labels and tokens out of range, and images that look wrong.

Sources in memory are checked in full, streams in their first batch. The guard of the train step
(``jaxtrain.step.guard``) covers the rest of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Model
from jaxtrain.data import Arrays, Normalise, Series, Source, compose
from jaxtrain.experiment import Experiment
from jaxtrain.program.loader import Check

CHUNK = 2**22  # numbers checked at a time, so that no temporary array is as large as the data
SHOWN = 5  # example ids in a message
TRIED = 256  # examples with NaN that preprocess is tried on


def check_values(check: Check, exp: Experiment, sources: Mapping[str, Source]) -> tuple[str, ...]:
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
        with_split_name(name, check)(fields, ids)
        try:
            if in_memory:
                with_split_name(name, check_finite(exp))(fields, ids)
        except InputError as error:
            if exp.guard == "stop":
                raise
            lines.append(f"{error} (guard={exp.guard} trains all the same)")
    return tuple(lines)


def check_first(name: str, exp: Experiment) -> Check | None:
    """The check of the first batch of a streamed split: no NaN with ``guard="stop"``, else None."""
    return with_split_name(name, check_finite(exp)) if exp.guard == "stop" else None


def check_finite(exp: Experiment) -> Check:
    """Make a check that raises InputError for NaN or infinity that ``exp.preprocess`` does not fill."""

    def check(batch: Batch, ids: np.ndarray) -> None:
        for field, rows in not_finite(batch).items():
            if _filled_by_preprocess(exp, batch, rows[:TRIED]):
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


def value_check(model: Model, loss: Any, outputs: Any) -> Check:
    """Make the check ``(batch, ids)`` of raw batches by the model and the loss."""

    def check(batch: Batch, ids: np.ndarray) -> None:
        if model.check is not None:
            model.check(batch, ids)
        if hasattr(loss, "check"):
            loss.check(outputs, batch, ids)

    return check


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
    try:
        return not not_finite(jax.device_get(prepare({name: array[rows] for name, array in batch.items()})))
    except Exception:  # a user's stage, which may need fields that a raw batch lacks
        return False
