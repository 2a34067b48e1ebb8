"""The few types every part shares. Imports jax only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Batch = Mapping[str, Any]
"""Named arrays with a common leading axis, such as ``image: uint8 [batch, height, width, channel]``.

Reserved names: ``mask: bool [batch]``, false on rows that only pad the last evaluation batch; and in training
``example_id: int32 [batch]`` and ``epoch: int32 [batch]``, the place of each example in its source and the
pass that it is seen in, for stages that need to know.
"""

Metrics = dict[str, Any]
"""Named mergeable metrics (``jaxtrain.metrics``): sums and counts, never finished averages."""


Names = tuple[str | None, ...]
"""Logical axes of an array, one for each dimension, such as ``("embed", "mlp")``."""

NOT_MODEL_STATE = frozenset({"ema", "lookahead", "masks", "loss_scale"})
"""Names in ``State.extra`` that belong to the training, not to the model's own statistics."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes while training, as one pytree of arrays.

    Static things (the model, the loss, the optimizer) are closed over by the step, so sharding,
    ``jax.eval_shape``, donation and checkpoints need no special cases.

    Attributes:
      step: int32 scalar, the number of updates applied so far.
      params: what the optimizer updates.
      extra: named pytrees that are not optimized: ``batch_stats``, ``ema``, ...
      opt_state: the optax state.
    """

    step: jax.Array
    params: Any
    extra: dict[str, Any]
    opt_state: Any

    def replace(self, **changes: Any) -> State:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


class Model(NamedTuple):
    """A model as two pure functions; any such pair trains, Flax or not.

    Attributes:
      init: ``(key, batch) -> (params, extra)``.
      apply: ``(params, extra, batch, *, train, key) -> (outputs, extra)``. ``key`` may be None when
        ``train`` is false; ``extra`` comes back with its statistics updated when ``train`` is true.
      check: ``(raw batch, example ids)``, which raises InputError for values that the model cannot take, such
        as a token outside the vocabulary; called on the host. None accepts everything.
      axes: ``batch -> {regular expression: names}``, the logical axes of each parameter whose path the
        expression finds, one name or None for each dimension (``jaxtrain.sharding.Rule``). None names none.
      flops: ``batch -> float``, the floating-point operations of an update on a prepared batch of those
        shapes, for a model that has a formula for them (``GPT.update_flops``), which may answer None. They
        are else counted in the program.
    """

    init: Callable[..., tuple[Any, dict[str, Any]]]
    apply: Callable[..., tuple[Any, dict[str, Any]]]
    check: Callable[[Batch, Any], None] | None = None
    axes: Callable[[Batch], Mapping[str, Names]] | None = None
    flops: Callable[[Batch], float | None] | None = None


def leaf_paths(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path, in its order.

    >>> leaf_paths({"head": {"bias": 0, "kernel": 1}})
    {'head/bias': 0, 'head/kernel': 1}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


Prepare = Callable[[Batch, jax.Array | None], Batch]
"""A pure ``(batch, key) -> batch``, part of the compiled step: cast, normalise, augment."""


def split_extra(extra: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state's ``extra`` as what is the model's, and the rest (``NOT_MODEL_STATE``).

    >>> split_extra({"batch_stats": 1, "ema": 2})
    ({'batch_stats': 1}, {'ema': 2})
    """
    own = {name: tree for name, tree in extra.items() if name not in NOT_MODEL_STATE}
    return own, {name: tree for name, tree in extra.items() if name in NOT_MODEL_STATE}
