"""Dynamic loss scaling: gradients of float16 activations, held within its range."""

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
LARGEST = 2.0**126  # where no gradient ever overflows, as when all are zero, float32 would


@dataclasses.dataclass(frozen=True)
class LossScale:
    """The loss times a scale, and the gradient divided by it (Micikevicius et al., arXiv:1710.03740).

    float16 rounds what is below about 6e-8 to zero and what is above 65,504 to infinity. The scale grows
    until a gradient overflows: that update is skipped, and the scale falls. Pass it as ``loss_scale=`` to
    ``make_init`` and ``make_train_step``; the state holds ``extra["loss_scale"]``: ``scale``, float32 ``[]``,
    and ``good``, int32 ``[]``, the finite gradients in a row since the scale last changed.

    Attributes:
      initial: the first scale, at least 1.
      period: finite gradients in a row after which the scale is multiplied by ``factor``, at least 1.
      factor: above 1; the scale is divided by it when a gradient is not finite, but never below 1. With a
        power of two scaling rounds nothing.

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
        """The state at step 0."""
        return {"scale": jnp.float32(self.initial), "good": jnp.int32(0)}

    def update(self, state: dict[str, jax.Array], finite: jax.Array) -> dict[str, jax.Array]:
        """The state after a gradient that was ``finite: bool []`` or not."""
        scale, good = state["scale"], state["good"] + 1
        due = good >= self.period
        grown = jnp.minimum(scale * self.factor, LARGEST)
        lowered = jnp.maximum(scale / self.factor, 1.0)
        return {
            "scale": jnp.where(finite, jnp.where(due, grown, scale), lowered),
            "good": jnp.where(finite & ~due, good, 0),
        }

    def guard(self, old: State, new: State, grads: Any, norm: jax.Array) -> tuple[State, Metrics]:
        """``new`` if all of ``grads`` are finite, else ``old`` at the step of ``new``; the scale is updated.

        Of a skipped update only the step counts, which is the position in the data: params, optimizer state
        and the model's statistics stay as they were.

        Args:
          old: the state before the update.
          new: the state after it.
          grads: the unscaled gradient.
          norm: its norm, float ``[]``.

        Returns:
          The state, and the metrics ``loss_scale``, ``skipped`` (0 or 1) and ``grad_norm``. A skipped update
          has no norm, unless the scale was 1 already: then it is not to blame, and the norm is reported.
        """
        finite = jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        state = old.extra[NAME]
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
        extra = {**kept.extra, NAME: self.update(state, finite)}
        counted = finite | (state["scale"] <= 1)
        return kept.replace(step=new.step, extra=extra), {
            "grad_norm": OfUpdates(jnp.where(counted, norm, 0), counted.astype(norm.dtype)),
            "loss_scale": Mean.of(state["scale"]),
            "skipped": Mean.of(~finite),
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfUpdates(Mean):
    """A mean over the updates that were made, and 0 where all were skipped.

    >>> OfUpdates(jnp.float32(0), jnp.float32(0)).compute()
    0.0
    """

    def compute(self) -> float:
        """The average as a Python float."""
        return super().compute() if float(self.count) else 0.0
