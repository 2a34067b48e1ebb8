"""The guard inside a train step: a bad update is not applied.

An update is bad when its loss, gradient norm or update norm is not finite, or when its batch has a label out
of range. The loop reads this from ``metrics["guard"]`` (``jaxtrain.train.bad_updates``), and so can yours:

>>> import optax
>>> from jaxtrain.losses import CrossEntropy
>>> from jaxtrain.models import MLP
>>> from jaxtrain.step import make_init, make_train_step
>>> model, tx = MLP(widths=(4,), classes=2), optax.sgd(0.1)
>>> batch = {"image": jnp.eye(2), "label": jnp.array([0, 2])}
>>> state = make_init(model, tx)(jax.random.key(0), batch)
>>> step = jax.jit(make_train_step(model, CrossEntropy(), tx, guard="stop"))
>>> after, metrics = step(state, batch, jax.random.key(1))
>>> bad_values(metrics["guard"].by_name())
['1 label is no class of the model', 'loss is nan']
>>> all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params)))
True
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.core.types import Batch, Metrics, State
from jaxtrain.metrics import Mean, Total

Policy = Literal["stop", "skip", "off"]
GUARD = "guard"  # the name of the guard's values among a step's metrics
BAD_LABELS = "labels_out_of_range"
GUARD_VALUES = ("loss", "grad_norm", "update_norm", BAD_LABELS)

Step = Callable[[State, Batch, jax.Array], tuple[State, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardValues:
    """What the guard checks of an update: ``values``, float ``[4]`` in the order of ``GUARD_VALUES``."""

    values: Any

    def merge(self, other: Self) -> Self:
        """Add the values of both: a sum is not finite where one of the two is not."""
        return type(self)(self.values + other.values)

    def by_name(self) -> dict[str, float]:
        """Return the values by name, on the host."""
        return dict(zip(GUARD_VALUES, np.asarray(self.values).tolist(), strict=True))

    def compute(self) -> float:
        """Return 1 for a bad update, 0 for a good one."""
        return float(bool(bad_values(self.by_name())))


class CountBadLabels:
    """A loss that also counts labels out of range, by ``loss.outside(outputs, batch) -> int []``."""

    def __init__(self, loss_fn: Any) -> None:
        self._loss_fn = loss_fn

    def __call__(self, outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Return the loss and its metrics, with ``labels_out_of_range`` added."""
        loss, metrics = self._loss_fn(outputs, batch)
        return loss, {**metrics, BAD_LABELS: Total(self._loss_fn.outside(outputs, batch))}

    def __getattr__(self, name: str) -> Any:  # a step factory may read settings of the loss
        return getattr(self._loss_fn, name)


def count_bad_labels(loss_fn: Any) -> Any:
    """Make ``loss_fn`` count labels out of range if it has ``outside(outputs, batch) -> int []``."""
    return CountBadLabels(loss_fn) if hasattr(loss_fn, "outside") else loss_fn


def guard_step(train_step: Step, policy: Policy, norm: Callable[[Any], jax.Array] = optax.tree.norm) -> Step:
    """Make ``train_step`` leave the state unchanged on a bad update, except for ``state.step``.

    ``state.step`` is the position in the data, and always advances. The values it checks are added to the
    metrics as ``guard``. An overflow that ``optim.LossScale`` handles is not bad: it reports no gradient norm
    and changes no parameter.

    On CPUs a good update is bit-for-bit that of the step without a guard, because a barrier keeps XLA from
    fusing update and selection. That needs the compiler options ``sharding.KEEP_BARRIERS``; without them the
    last bits may differ. On other platforms XLA fuses them, and the last bits may differ.

    Args:
      train_step: pure ``(state, batch, key) -> (state, metrics)``. Its metrics ``loss`` and ``grad_norm``,
        where it has them, the norm of the update and the labels that ``count_bad_labels`` counts are
        checked.
      policy: ``"skip"`` drops the metrics of a bad update and reports ``skipped`` (0 or 1); ``"off"``
        returns ``train_step`` unchanged.
      norm: the L2 norm of a tree of arrays, for the update's. Runs on GPUs have ``merged_norm``, which takes
        fewer launches (``program.update``); ``make_train_step`` has not.
    """
    if policy == "off":
        return train_step

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        new, metrics = jax.lax.platform_dependent(
            train_step(state, batch, key), cpu=jax.lax.optimization_barrier, default=lambda result: result
        )
        bad_labels = metrics.get(BAD_LABELS)
        metrics = {name: metric for name, metric in metrics.items() if name != BAD_LABELS}
        difference = jax.tree.map(_difference, new.params, state.params)
        values = [
            _scalar(metrics.get("loss")),
            _scalar(metrics.get("grad_norm")),
            norm(difference),
            _scalar(bad_labels),
        ]
        good = values[-1] == 0
        for value in values:
            good &= jnp.isfinite(value)
        guarded = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        if policy == "skip":
            metrics = _drop_unless(good, metrics)
        return guarded.replace(step=new.step), {**metrics, GUARD: GuardValues(jnp.stack(values))}

    return step


def bad_values(values: Mapping[str, float]) -> list[str]:
    """Describe what is wrong with an update, the likeliest cause first; empty for a good one.

    >>> bad_values({"loss": 0.3, "grad_norm": float("inf"), "update_norm": 0.1, "labels_out_of_range": 0.0})
    ['grad_norm is inf']
    """
    count = values[BAD_LABELS]
    labels = [f"{count:.0f} label{'s are' if count > 1 else ' is'} no class of the model"] if count else []
    return labels + [
        f"{name} is {values[name]}" for name in GUARD_VALUES[:-1] if not math.isfinite(values[name])
    ]


def _scalar(metric: Any) -> jax.Array:
    """Reduce a metric of one step to a scalar that is finite exactly when the metric is; 0 for None."""
    if isinstance(metric, Mean):
        return jnp.asarray(metric.total / jnp.maximum(metric.count, 1))
    total = jnp.float32(0)
    for leaf in jax.tree.leaves(metric):
        total += leaf.sum()
    return total


def _difference(after: jax.Array, before: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(after.dtype, jnp.float32)
    return after.astype(dtype) - before.astype(dtype)


def _drop_unless(good: jax.Array, metrics: Metrics) -> Metrics:
    """Zero the sums and counts of a bad update, and report ``skipped``."""
    overflowed = metrics.get("skipped", Mean.of(jnp.array(False)))  # skipped by the loss scale
    skipped = Mean(jnp.where(good, overflowed.total, overflowed.count), overflowed.count)
    counted = jax.tree.map(lambda x: jnp.where(good, x, jnp.zeros_like(x)), metrics)
    return {**counted, "skipped": skipped}
