"""Checks of the examples' values: NaN, labels and tokens out of range, and images that look wrong.

All of a source in memory is looked at, and the first batch of any other. What comes later in a stream is
seen by the guard of the train step (``jaxtrain.step.guard``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Batch, Model
from jaxtrain.data import Arrays, Normalise, Source, compose
from jaxtrain.experiment import Experiment
from jaxtrain.program.loader import Check

AT_ONCE = 2**22  # numbers looked at together, so that no array of the data's own size is made
SHOWN = 5  # ids in a line
TRIED = 256  # examples with NaN that preprocess is tried on


def check_values(check: Check, exp: Experiment, sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Look at every example that is in memory, and at the first of those that are not.

    Returns:
      What was found and is no error, a line each: NaN with another guard than ``"stop"``.

    Raises:
      InputError: a value that the model or the loss cannot take; NaN that ``preprocess`` does not fill.
    """
    lines = []
    for name, source in sources.items():
        whole = isinstance(source, Arrays)
        ids = np.arange(len(source)) if whole else np.zeros(1, np.int64)
        fields = source.fields if isinstance(source, Arrays) else source.gather(ids)
        with_split_name(name, check)(fields, ids)
        try:
            if whole:
                with_split_name(name, check_finite(exp))(fields, ids)
        except InputError as error:
            if exp.guard == "stop":
                raise
            lines.append(f"{error} (guard={exp.guard} goes on all the same)")
    return tuple(lines)


def check_first(name: str, exp: Experiment) -> Check | None:
    """What a loader that streams split ``name`` asks of its first batch; None where nothing is asked."""
    return with_split_name(name, check_finite(exp)) if exp.guard == "stop" else None


def check_finite(exp: Experiment) -> Check:
    """A check that raises InputError for NaN or infinity which ``exp.preprocess`` leaves there."""

    def check(batch: Batch, ids: np.ndarray) -> None:
        for field, rows in not_finite(batch).items():
            if _filled_by_preprocess(exp, batch, rows[:TRIED]):
                continue
            raise InputError(
                f"field {field!r} of {format_ids(ids[rows])} holds NaN or infinity: fill the gaps in the "
                "source or by a stage of preprocess, leave these examples out (data.Subset), or --set "
                "guard=skip to pass over batches whose loss is NaN"
            )

    return check


def not_finite(batch: Batch) -> dict[str, np.ndarray]:
    """The rows of each field that hold NaN or infinity, for fields that have such.

    Args:
      batch: arrays with a common leading axis; those of whole numbers cannot have any.

    >>> not_finite({"x": np.array([[0.0, 1.0], [np.nan, 1.0]]), "label": np.array([0, 1])})
    {'x': array([1])}
    """
    found = {}
    for name, array in batch.items():
        if not jnp.issubdtype(array.dtype, jnp.inexact):  # bfloat16 is one too
            continue
        rows = max(1, AT_ONCE // max(1, array[:1].size))
        bad = [
            start + np.flatnonzero(~np.isfinite(part).reshape(len(part), -1).all(axis=1))
            for start in range(0, len(array), rows)
            for part in (array[start : start + rows],)
        ]
        where = np.concatenate(bad) if bad else np.zeros(0, int)
        if len(where):
            found[name] = where
    return found


def format_ids(ids: np.ndarray) -> str:
    """Example ids for a line.

    >>> format_ids(np.array([7])), format_ids(np.arange(100, 2000))
    ('example 7', '1,900 examples (100, 101, 102, 103, 104, ...)')
    """
    if len(ids) == 1:
        return f"example {ids[0]}"
    shown = ", ".join(map(str, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")
    return f"{len(ids):,} examples ({shown})"


def value_check(model: Model, loss: Any, outputs: Any) -> Check:
    """What the model and the loss have to say about raw batches, in one function ``(batch, ids)``."""

    def check(batch: Batch, ids: np.ndarray) -> None:
        if model.check is not None:
            model.check(batch, ids)
        if hasattr(loss, "check"):
            loss.check(outputs, batch, ids)

    return check


def image_notes(exp: Experiment, source: Source) -> tuple[str, ...]:
    """What looks wrong with the field ``image`` and may be meant, a line each.

    Nothing here is an error, because a model of one's own may want just that: an image with its channels
    first (the shipped models refuse it); bytes or large numbers that nothing brings near 1; and numbers
    in 0..1 that ``Normalise`` divides by 255 once more. Images of other than 1 to 4 channels are taken for
    channels-last unless only the first axis looks like channels.

    Args:
      exp: whose stages are looked at.
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
            "[height, width, channel] (.transpose(0, 2, 3, 1) in the source makes that)"
        )
    floats = np.issubdtype(image.dtype, np.floating)
    most = float(np.abs(image).max()) if image.size else 0.0
    if not exp.preprocess and most > (255 if floats else 1):
        lines.append(
            f"image is {image.dtype} with values up to {most:.6g} and preprocess is empty, so the model is "
            "given them as they are (data.Normalise brings them near 0)"
        )
    for stage in exp.preprocess:
        if isinstance(stage, Normalise) and floats and 0 < most <= 1 and stage.scale > 1:
            lines.append(
                f"image is {image.dtype} with values up to {most:.6g}, and Normalise divides them by "
                f"{stage.scale:g}: its scale is 1 for images in 0..1"
            )
    return tuple(lines)


def with_split_name(name: str, check: Check) -> Check:
    """``check`` whose errors begin with the split."""

    def look(batch: Batch, ids: np.ndarray) -> None:
        try:
            check(batch, ids)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    return look


def _filled_by_preprocess(exp: Experiment, batch: Batch, rows: np.ndarray) -> bool:
    """Does ``preprocess`` leave no NaN in these rows? Compiles it, which only data with NaN needs."""
    prepare: Callable[[Any], Any] = jax.jit(lambda raw: compose(*exp.preprocess)(raw, None))
    try:
        return not not_finite(jax.device_get(prepare({name: array[rows] for name, array in batch.items()})))
    except Exception:  # a stage of the user's own, which may want what is not in the batch yet
        return False
