"""The guard inside a train step: a bad update is not applied.

Bad is an update whose loss, gradient norm or update norm is not finite, or whose batch has a label that is no
class. The loop hears of it from ``metrics["guard"]`` (``jaxtrain.train.bad_updates``); in a loop of your own:

>>> import optax
>>> from jaxtrain.losses import CrossEntropy
>>> from jaxtrain.models import MLP
>>> from jaxtrain.step.factories import make_init, make_train_step
>>> model, tx = MLP(widths=(4,), classes=2), optax.sgd(0.1)
>>> batch = {"image": jnp.eye(2), "label": jnp.array([0, 2])}
>>> state = make_init(model, tx)(jax.random.key(0), batch)
>>> step = jax.jit(make_train_step(model, CrossEntropy(), tx, guard="stop"))
>>> after, metrics = step(state, batch, jax.random.key(1))
>>> bad_figures(metrics["guard"].figures())
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
from jaxtrain.metrics import Mean

Policy = Literal["stop", "skip", "off"]
GUARD = "guard"  # of the figures among a step's metrics
BAD_LABELS = "labels_out_of_range"
FIGURES = ("loss", "grad_norm", "update_norm", BAD_LABELS)

Step = Callable[[State, Batch, jax.Array], tuple[State, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Figures:
    """What an update is judged by: ``values``, float ``[4]`` in the order of ``FIGURES``."""

    values: Any

    def merge(self, other: Self) -> Self:
        """Of both: a sum is not finite where either was not."""
        return type(self)(self.values + other.values)

    def figures(self) -> dict[str, float]:
        """The values by name, on the host."""
        return dict(zip(FIGURES, np.asarray(self.values).tolist(), strict=True))

    def compute(self) -> float:
        """1 for a bad update, 0 for a good one."""
        return float(bool(bad_figures(self.figures())))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Total:
    """A count that adds up over microbatches."""

    total: Any

    def merge(self, other: Self) -> Self:
        """Both together."""
        return type(self)(self.total + other.total)

    def compute(self) -> float:
        """The count as a Python float."""
        return float(self.total)


class CountBadLabels:
    """A loss that also counts the labels which are no classes, where ``loss.outside`` can tell."""

    def __init__(self, loss_fn: Any) -> None:
        self._loss_fn = loss_fn

    def __call__(self, outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        """As the loss, with the metric ``labels_out_of_range`` beside its own."""
        loss, metrics = self._loss_fn(outputs, batch)
        return loss, {**metrics, BAD_LABELS: Total(self._loss_fn.outside(outputs, batch))}

    def __getattr__(self, name: str) -> Any:  # a step factory may want to know the loss's settings
        return getattr(self._loss_fn, name)


def count_bad_labels(loss_fn: Any) -> Any:
    """``loss_fn``, counting labels out of range if it has ``outside(outputs, batch) -> int []``."""
    return CountBadLabels(loss_fn) if hasattr(loss_fn, "outside") else loss_fn


def guard_step(train_step: Step, policy: Policy) -> Step:
    """``train_step``, whose bad updates leave the state as it was, except for ``state.step``.

    ``state.step`` is the position in the data, and goes on. The figures are added to the metrics as
    ``guard``. An overflow that ``optim.LossScale`` handles is no fault: it has no gradient norm and changes
    no parameter.

    The update is computed as it would be without the guard, bit for bit, because a barrier keeps XLA from
    fusing the two. On CPUs that needs ``sharding.KEEP_BARRIERS``, without which the last bits may differ.

    Args:
      train_step: pure ``(state, batch, key) -> (state, metrics)``; its metrics ``loss`` and ``grad_norm``,
        where it has them, are two of the figures. ``count_bad_labels`` adds a fourth, the labels.
      policy: with ``"skip"`` the metrics of a bad update count for nothing, and ``skipped`` (0 or 1) is
        reported; with ``"off"`` the step is returned as it is.
    """
    if policy == "off":
        return train_step

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        new, metrics = jax.lax.optimization_barrier(train_step(state, batch, key))
        outside = metrics.get(BAD_LABELS)
        metrics = {name: metric for name, metric in metrics.items() if name != BAD_LABELS}
        values = jnp.stack(
            [
                _figure(metrics.get("loss")),
                _figure(metrics.get("grad_norm")),
                optax.tree.norm(jax.tree.map(_change, new.params, state.params)),
                _figure(outside),
            ]
        )
        good = jnp.isfinite(values).all() & (values[-1] == 0)
        kept = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        if policy == "skip":
            metrics = _counted(metrics, good)
        return kept.replace(step=new.step), {**metrics, GUARD: Figures(values)}

    return step


def bad_figures(figures: Mapping[str, float]) -> list[str]:
    """What is wrong with an update, in words, the likeliest cause first; empty for a good one.

    >>> bad_figures({"loss": 0.3, "grad_norm": float("inf"), "update_norm": 0.1, "labels_out_of_range": 0.0})
    ['grad_norm is inf']
    """
    outside = figures[BAD_LABELS]
    labels = (
        [f"{outside:.0f} label{'s are' if outside > 1 else ' is'} no class of the model"] if outside else []
    )
    return labels + [
        f"{name} is {figures[name]}" for name in FIGURES[:-1] if not math.isfinite(figures[name])
    ]


def _figure(metric: Any) -> jax.Array:
    """A metric of one step as a scalar that is finite where the metric is; 0 where there is none."""
    if isinstance(metric, Mean):
        return jnp.asarray(metric.total / jnp.maximum(metric.count, 1))
    total = jnp.float32(0)
    for leaf in jax.tree.leaves(metric):
        total += leaf.sum()
    return total


def _change(after: jax.Array, before: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(after.dtype, jnp.float32)
    return after.astype(dtype) - before.astype(dtype)


def _counted(metrics: Metrics, good: jax.Array) -> Metrics:
    """``metrics`` of a good update; of a bad one sums and counts of nothing. And ``skipped``."""
    scaled = metrics.get("skipped", Mean.of(jnp.array(False)))  # by the loss scale
    skipped = Mean(jnp.where(good, scaled.total, scaled.count), scaled.count)
    kept = jax.tree.map(lambda x: jnp.where(good, x, jnp.zeros_like(x)), metrics)
    return {**kept, "skipped": skipped}
