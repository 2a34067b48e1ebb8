"""Dynamic loss scaling, which keeps float16 gradients within the range of the type."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Metrics, State
from jaxtrain.metrics import Mean

NAME = "loss_scale"  # in State.extra
MAX_SCALE = 2.0**126  # if no gradient ever overflows (all are zero), the float32 scale would


@dataclasses.dataclass(frozen=True)
class LossScale:
    """Multiply the loss by a scale and divide the gradient by it (Micikevicius et al., arXiv:1710.03740).

    float16 rounds values below about 6e-8 to zero and values above 65,504 to infinity. The scale grows until
    a gradient overflows; that update is skipped and the scale is lowered. Pass it as ``loss_scale=`` to
    ``make_init`` and ``make_train_step``; an ``Experiment`` with ``precision="float16"`` does. Its state is
    ``state.extra["loss_scale"]``: ``scale``, float32 ``[]``, and ``good``, int32 ``[]``, the number of finite
    gradients in a row since the scale last changed.

    Attributes:
      initial: the first scale, at least 1.
      period: finite gradients in a row after which the scale is multiplied by ``factor``; at least 1.
      factor: above 1. When a gradient is not finite the scale is divided by it, to no less than 1. A power of
        two makes scaling exact.

    >>> scaling = LossScale(initial=8.0, period=2)
    >>> state = scaling.init()
    >>> for finite in (True, True, False, False):
    ...     state = scaling.update(state, jnp.array(finite))
    ...     print(float(state["scale"]), int(state["good"]))
    8.0 1
    16.0 0
    8.0 0
    4.0 0
    """

    initial: float = 2.0**15
    period: int = 2000
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not (1 <= self.initial < math.inf and self.period >= 1 and 1 < self.factor < math.inf):
            raise InputError(f"{self}: initial and period must be at least 1, and factor above 1")

    def init(self) -> dict[str, jax.Array]:
        """Return the state at step 0."""
        return {"scale": jnp.float32(self.initial), "good": jnp.int32(0)}

    def update(self, state: dict[str, jax.Array], finite: jax.Array) -> dict[str, jax.Array]:
        """Return the state after a gradient; ``finite: bool []`` is whether all its elements are finite."""
        scale, good = state["scale"], state["good"] + 1
        due = good >= self.period
        grown = jnp.minimum(scale * self.factor, MAX_SCALE)
        lowered = jnp.maximum(scale / self.factor, 1.0)
        return {
            "scale": jnp.where(finite, jnp.where(due, grown, scale), lowered),
            "good": jnp.where(finite & ~due, good, 0),
        }

    def guard(self, old: State, new: State, grads: Any, norm: jax.Array) -> tuple[State, Metrics]:
        """Return ``new`` if all of ``grads`` are finite, else ``old``; update the step and the scale.

        A skipped update still advances ``step``, which is the position in the data; params, optimizer state
        and the model's statistics are those of ``old``.

        Args:
          old: the state before the update.
          new: the state after it.
          grads: the unscaled gradient.
          norm: norm of ``grads``, float ``[]``.

        Returns:
          The state, and the metrics ``loss_scale``, ``skipped`` (0 or 1) and ``grad_norm``. The norm of a
          skipped update is left out, unless the scale was already 1: then the scale is not the cause.
        """
        finite = jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        state = old.extra[NAME]
        chosen = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
        extra = {**chosen.extra, NAME: self.update(state, finite)}
        counted = finite | (state["scale"] <= 1)
        return chosen.replace(step=new.step, extra=extra), {
            "grad_norm": MeanOfUpdates(jnp.where(counted, norm, 0), counted.astype(norm.dtype)),
            "loss_scale": Mean.of(state["scale"]),
            "skipped": Mean.of(~finite),
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanOfUpdates(Mean):
    """A mean over the updates that were not skipped; 0 if all were.

    >>> MeanOfUpdates(jnp.float32(0), jnp.float32(0)).compute()
    0.0
    """

    def compute(self) -> float:
        """Return the mean as a Python float."""
        return super().compute() if float(self.count) else 0.0
