"""Weight averages: functions ``State -> State`` for ``post_update=``, applied after every update."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import State


@dataclasses.dataclass(frozen=True)
class EMA:
    """Maintain an exponential moving average of parameters and batch statistics.

    Pass it in ``post_update=`` of an ``Experiment``, or of ``make_init`` and ``make_train_step``. The average
    is stored in ``state.extra["ema"]``; evaluation uses it in place of the parameters.

    Attributes:
      decay: in [0, 1); after every update ``average = decay * average + (1 - decay) * params``.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"ema.decay is {self.decay}: it must be in [0, 1)")

    def init(self, state: State) -> State:
        """Add the average to the state, starting at the initial values.

        They are copied, because a donated buffer must not appear twice in a state.
        """
        return state.replace(extra={**state.extra, "ema": _copy(_averaged(state))})

    def __call__(self, state: State) -> State:
        """Update the average with the parameters of ``state``."""
        ema = jax.tree.map(
            lambda old, new: self.decay * old + (1 - self.decay) * new,
            state.extra["ema"],
            _averaged(state),
        )
        return state.replace(extra={**state.extra, "ema": ema})


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """Average the weights with a slow copy every few steps, and continue from the average.

    The slow copy holds all float parameters and batch statistics. Every ``every`` steps
    ``slow = d * slow + (1 - d) * fast`` and then ``fast = slow``, with ``d = decay**every * (t / T)**power``
    at step t of a run of T steps: weak averaging at first, strong averaging at the end. The last step of the
    run sets ``fast = slow``; it updates ``slow`` only if it is a multiple of ``every``. Optimizer state is
    not changed. The method is from arXiv:1907.08610, the growing ``d`` from arXiv:2404.00498.

    It goes into ``post_update=`` and depends on the length of the run: ``build(steps)`` returns the function
    ``State -> State``, which stores the copy in ``state.extra["lookahead"]``. Evaluation uses the parameters,
    not the copy.

    Attributes:
      every: steps between two averagings, at least 1.
      decay: the weight of the slow copy per step at the end of the run, in [0, 1].
      power: how fast that weight grows over the run, at least 0; 0 is constant.

    >>> Lookahead(every=5).build(steps=100)
    LookaheadStage(config=Lookahead(every=5, decay=0.95, power=3.0), steps=100)
    """

    every: int = 5
    decay: float = 0.95
    power: float = 3.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"lookahead.every is {self.every}: it must be at least 1")
        if not 0 <= self.decay <= 1:
            raise InputError(f"lookahead.decay is {self.decay}: it must be in [0, 1]")
        if self.power < 0:
            raise InputError(f"lookahead.power is {self.power}: it must not be negative")

    def build(self, steps: int) -> LookaheadStage:
        """Return the stage for a run of ``steps`` updates."""
        return LookaheadStage(self, steps)


@dataclasses.dataclass(frozen=True)
class LookaheadStage:
    """``Lookahead`` for a run of ``steps`` updates, in the form that ``post_update=`` takes."""

    config: Lookahead
    steps: int

    def init(self, state: State) -> State:
        """Add the slow weights to the state, starting at the initial values.

        They are copied, because a donated buffer must not appear twice in a state.
        """
        return state.replace(extra={**state.extra, "lookahead": _copy(_averaged(state))})

    def __call__(self, state: State) -> State:
        """Set both weights to their average if this step is due; else return ``state`` unchanged."""
        every, decay, power = self.config.every, self.config.decay, self.config.power
        due = state.step % every == 0

        def average(slow: Any, fast: Any) -> tuple[Any, Any]:
            slow_weight = decay**every * (state.step / self.steps) ** power
            fast_weight = jnp.where(due, 1 - slow_weight, 0)  # 0 at the end of the run: take ``slow`` alone
            slow = jax.tree.map(functools.partial(_interpolate, fast_weight), slow, fast)
            return slow, _copy(slow)

        # A branch, so that the steps between two averagings do not touch the weights.
        slow, fast = jax.lax.cond(
            due | (state.step >= self.steps),
            average,
            lambda slow, fast: (slow, fast),
            state.extra["lookahead"],
            _averaged(state),
        )
        params = fast.pop("params")
        return state.replace(params=params, extra={**state.extra, **fast, "lookahead": slow})


def _interpolate(fast_weight: jax.Array, slow: jax.Array, fast: jax.Array) -> jax.Array:
    """Return ``slow`` moved towards ``fast``; exactly ``slow`` if both are equal (frozen weights)."""
    if not jnp.issubdtype(slow.dtype, jnp.floating):
        return fast
    return slow + fast_weight.astype(slow.dtype) * (fast - slow)


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.copy(), tree)


def _averaged(state: State) -> dict[str, Any]:
    """Return the parts of the state that are averaged: params and, if there are any, batch statistics."""
    stats = {k: v for k, v in state.extra.items() if k == "batch_stats"}
    return {"params": state.params, **stats}
