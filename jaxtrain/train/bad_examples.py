"""Find the examples and the field that made an update bad, when the guard ends a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.data import compose
from jaxtrain.program import Program
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID
from jaxtrain.program.missing_values import format_ids, not_finite


@dataclasses.dataclass(frozen=True)
class BadField:
    """What is wrong with one field of a batch.

    Attributes:
      field: the field's name.
      examples: int ``[k]``, indices into ``experiment.train``.
      what: ``holds NaN or infinity``, or ``is 7, 9``.
      stage: ``augment`` or ``preprocess`` made it; the source's own values are fine.
    """

    field: str
    examples: np.ndarray
    what: str
    stage: bool

    @property
    def text(self) -> str:
        """The fault as a part of an error line."""
        where = " after augment and preprocess" if self.stage else ""
        return f"field {self.field!r} of {format_ids(self.examples)} {self.what}{where}"

    @property
    def record(self) -> dict[str, Any]:
        """The fault as JSON."""
        made_by = "augment or preprocess" if self.stage else "the source"
        return {"examples": self.examples.tolist(), "what": self.what, "made_by": made_by}


def locate(program: Program, step: int) -> list[BadField]:
    """Find fields of update ``step`` that hold NaN, infinity or a label outside the classes.

    Gathers the batch again and applies its stages as ``step.make_train_step`` does. Each process checks the
    global batch.

    Args:
      program: the run.
      step: the update, from 1.

    Returns:
      One entry per bad field; empty where none is.
    """
    indices, raw = program.example_ids(step), program.raw_batch(step)
    bad = _bad_fields(program, _apply_stages(program, raw, step), indices, stage=True)
    # Raw values alone prove nothing: a stage may fill gaps, or map labels 1..10 to 0..9.
    from_source = _bad_fields(program, raw, indices, stage=False) if bad else []
    same = {(found.field, *found.examples.tolist()): found for found in from_source}
    return [same.get((found.field, *found.examples.tolist()), found) for found in bad]


def _apply_stages(program: Program, raw: dict[str, Any], step: int) -> dict[str, np.ndarray]:
    exp = program.experiment
    prepare = compose(lambda batch, _: batch, *exp.augment, *exp.preprocess)
    with jax.transfer_guard("allow"):
        data = jax.random.key_data(program.key).addressable_data(0)  # the key is replicated
        key = jax.random.wrap_key_data(jnp.asarray(np.asarray(data)), impl=jax.random.key_impl(program.key))
        key, _ = jax.random.split(jax.random.fold_in(key, step - 1))
        batch: dict[str, np.ndarray] = jax.device_get(jax.jit(prepare)(raw, key))
    return batch


def _bad_fields(program: Program, batch: dict[str, Any], indices: np.ndarray, stage: bool) -> list[BadField]:
    rest = {name: array for name, array in batch.items() if name not in (EXAMPLE_ID, EPOCH)}
    found = [
        BadField(name, indices[rows], "holds NaN or infinity", stage)
        for name, rows in not_finite(rest).items()
    ]
    loss = program.experiment.loss
    outputs = program.abstract_outputs
    shapes = jax.tree.leaves(outputs, is_leaf=lambda x: hasattr(x, "shape"))  # ChunkedLogits is a leaf
    if hasattr(loss, "outside") and len(shapes) == 1:
        for name in (getattr(loss, "label", "label"), "label_mixed"):
            label = rest.get(name)
            if label is None or not np.issubdtype(label.dtype, np.integer):
                continue
            bad = (label < 0) | (label >= shapes[0].shape[-1])
            if (ignore := getattr(loss, "ignore", None)) is not None:
                bad &= label.astype(np.int64) != ignore
            rows = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))
            if len(rows):
                values = ", ".join(map(str, np.unique(label[bad])[:5]))
                what = f"is {values}, no class of 0..{shapes[0].shape[-1] - 1},"
                found.append(BadField(name, indices[rows], what.rstrip(",") if not stage else what, stage))
    return found
