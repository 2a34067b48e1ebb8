"""NaN and infinity among the examples: legal where ``preprocess`` fills them or the loss leaves them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Batch, Model
from jaxtrain.data import compose
from jaxtrain.experiment import Experiment
from jaxtrain.program.check_contract import made_up
from jaxtrain.program.loader import EXAMPLE_ID, Check
from jaxtrain.step.gradients import evaluate_loss

CHUNK = 2**22  # numbers checked at a time, so that no temporary array is as large as the data
SHOWN = 5  # example ids in a message
TRIED = 256  # examples with NaN that preprocess and the loss are tried on at a time


def check_finite(exp: Experiment, model: Model, note: Callable[[str], None] = lambda line: None) -> Check:
    """Make a check for NaN and infinity.

    They are legal where ``exp.preprocess`` fills them, and in a field that the model does not read, such as a
    target, where the loss of these examples and its gradient are finite.

    Args:
      exp: the experiment.
      model: its model.
      note: called with a line for what the loss leaves out.

    Raises:
      InputError: by the check, for any other NaN or infinity.
    """

    def check(batch: Batch, ids: np.ndarray) -> None:
        for field, rows in not_finite(batch).items():
            where = f"field {field!r} of {format_ids(ids[rows])} holds NaN or infinity"
            try:
                prepared = _prepared(exp, batch, rows)
            except Exception as error:  # a user's stage, which may need fields that a raw batch lacks
                where += f" (preprocess cannot be tried on them: {type(error).__name__}: {first_line(error)})"
            else:
                if not any(map(not_finite, prepared)):
                    continue
                if all(_left_out(exp, model, part) for part in prepared):
                    note(f"{where}, which the loss leaves out")
                    continue
            raise InputError(
                f"{where}: fill the gaps in the source or by a stage of preprocess, leave these examples out "
                "(data.Subset), give the loss a mask that also keeps its gradient finite, or --set "
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


def _prepared(exp: Experiment, batch: Batch, rows: np.ndarray) -> list[Batch]:
    """Return these rows after ``preprocess``, in parts of one size."""
    prepare: Callable[[Any], Any] = jax.jit(lambda raw: compose(*exp.preprocess)(raw, None))
    size, parts = min(TRIED, len(rows)), []
    for start in range(0, len(rows), size):
        some = rows[np.minimum(np.arange(start, start + size), len(rows) - 1)]
        raw = {EXAMPLE_ID: some.astype(np.int32), **{name: array[some] for name, array in batch.items()}}
        parts.append(jax.device_get(prepare(raw)))
    return parts


def _left_out(exp: Experiment, model: Model, batch: Batch) -> bool:
    """Return whether the model runs without the fields with NaN, and loss and gradient are finite with them.

    Args:
      exp: its loss is computed for made-up outputs.
      model: traced without these fields.
      batch: examples after ``preprocess``.
    """
    gaps = not_finite(batch)
    finite = {name: array for name, array in batch.items() if name not in gaps}

    def outputs(batch: Batch) -> Any:
        params, extra = model.init(jax.random.key(0), batch)
        return model.apply(params, extra, batch, train=False, key=None)[0]

    def loss(outputs: Any) -> jax.Array:
        return evaluate_loss(exp.loss, outputs, batch)[0]

    try:
        tried = jax.tree.map(made_up, jax.eval_shape(outputs, finite))
        found = jax.device_get(jax.jit(jax.value_and_grad(loss, allow_int=True))(tried))
    except Exception:  # the model reads such a field, or a model or loss of the user's own cannot be tried
        return False
    floats = [x for x in jax.tree.leaves(found) if jnp.issubdtype(np.asarray(x).dtype, jnp.inexact)]
    return all(np.isfinite(x).all() for x in floats)
