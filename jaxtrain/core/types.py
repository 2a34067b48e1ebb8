"""Types shared by every room. Imports jax only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Batch = Mapping[str, Any]
"""Named arrays with a common leading axis, such as ``image: uint8 [batch, height, width, channel]``.

Reserved names: ``example_id: int32 [batch]``, each example's index in its source; in evaluation
``mask: bool [batch]``, false on rows that only pad the last batch; and in training ``epoch: int32 [batch]``,
the epoch that the example is part of.
"""

Metrics = dict[str, Any]
"""Named mergeable metrics (``jaxtrain.metrics``): sums and counts, never finished averages."""


Names = tuple[str | None, ...]
"""Logical axes of an array, one for each dimension, such as ``("embed", "mlp")``."""

NOT_MODEL_STATE = frozenset({"ema", "lookahead", "masks", "loss_scale"})
"""Names in ``State.extra`` that belong to training, not to the model's statistics."""

RANGES = "int8_ranges"
"""Name in ``State.extra`` of the ranges of activations (``compress.fake_quantize``)."""

TEACHER = "teacher"
"""Name in ``State.extra`` of the ``params`` and ``extra`` of a teacher (``compress.Distil``).

It is not in checkpoints: it is read again from the teacher's own run or artifact.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes during training, as one pytree of arrays.

    Static objects (the model, the loss, the optimizer) are closed over by the step, so sharding,
    ``jax.eval_shape``, donation and checkpoints need no special cases.

    Attributes:
      step: int32 scalar, the number of batches consumed, skipped updates included.
      params: what the optimizer updates.
      extra: named pytrees that are not optimized: ``batch_stats``, ``ema``, ...
      opt_state: the optax state.
    """

    step: jax.Array
    params: Any
    extra: dict[str, Any]
    opt_state: Any

    def replace(self, **changes: Any) -> State:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


class Model(NamedTuple):
    """A model as two pure functions; any such pair trains, Flax or not.

    Attributes:
      init: ``(key, batch) -> (params, extra)``.
      apply: ``(params, extra, batch, *, train, key) -> (outputs, extra)``. ``key`` may be None when
        ``train`` is false; ``extra`` comes back with its statistics updated when ``train`` is true.
      check: ``(batch, example ids)``, called on the host with the fields after ``preprocess``, which raises
        InputError for values that the model cannot take, such as a token outside the vocabulary. None accepts
        everything.
      axes: ``batch -> {regular expression: names}``, the logical axes of each parameter whose path the
        expression matches, one name or None for each dimension (``jaxtrain.sharding.Rule``).
      flops: ``batch -> float | None``, floating-point operations of an update on a prepared batch of those
        shapes, for a model with a formula for them (``GPT.update_flops``). Without it, or where it returns
        None, they are counted in the program.
      dropped: returns the names of outputs that ``init`` has seen the model write and that ``apply`` does not
        return (Flax's sown collections). None is the same as none.
    """

    init: Callable[..., tuple[Any, dict[str, Any]]]
    apply: Callable[..., tuple[Any, dict[str, Any]]]
    check: Callable[[Batch, Any], None] | None = None
    axes: Callable[[Batch], Mapping[str, Names]] | None = None
    flops: Callable[[Batch], float | None] | None = None
    dropped: Callable[[], tuple[str, ...]] | None = None


def without_teacher(state: State) -> State:
    """Return the state that a checkpoint holds: ``state`` without its teacher."""
    return state.replace(extra={name: tree for name, tree in state.extra.items() if name != TEACHER})


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by path, in its order.

    >>> leaf_paths({"head": {"bias": 0, "kernel": 1}})
    {'head/bias': 0, 'head/kernel': 1}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


Prepare = Callable[[Batch, jax.Array | None], Batch]
"""A pure ``(batch, key) -> batch``, part of the compiled step: cast, normalise, augment."""


def split_extra(extra: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a state's ``extra`` into the model's statistics and the rest (``NOT_MODEL_STATE``).

    >>> split_extra({"batch_stats": 1, "ema": 2})
    ({'batch_stats': 1}, {'ema': 2})
    """
    own = {name: tree for name, tree in extra.items() if name not in NOT_MODEL_STATE}
    return own, {name: tree for name, tree in extra.items() if name in NOT_MODEL_STATE}
