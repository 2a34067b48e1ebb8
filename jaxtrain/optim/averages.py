"""Averages of the weights: stages that run after each update (``post_update=`` of ``make_train_step``)."""

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
    """An exponential moving average of params and batch statistics, kept in ``state.extra["ema"]``.

    Pass it in ``post_update=`` of ``make_init`` and ``make_train_step``; evaluation then uses the average.

    Attributes:
      decay: in [0, 1); the average is ``decay * average + (1 - decay) * params`` after every update.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"ema.decay is {self.decay}: it must be in [0, 1)")

    def init(self, state: State) -> State:
        """The average starts at the initial values (copies: a donated buffer must not appear twice)."""
        return state.replace(extra={**state.extra, "ema": _copy(_averaged(state))})

    def __call__(self, state: State) -> State:
        """One update of the average."""
        ema = jax.tree.map(
            lambda old, new: self.decay * old + (1 - self.decay) * new,
            state.extra["ema"],
            _averaged(state),
        )
        return state.replace(extra={**state.extra, "ema": ema})


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """Every few steps, move a slow copy of the weights towards them and go on from there.

    The copy is of all float parameters and batch statistics. Every ``every`` steps
    ``slow = d * slow + (1 - d) * fast`` and ``fast = slow``, with ``d = decay**every * (t / T)**power``
    at step t of a run of T: almost free steps at first, strong averaging at the end. The last step of the
    run sets ``fast = slow`` without moving ``slow``, unless its turn has come too. Optimizer state is left
    alone. The idea is from arXiv:1907.08610, this form with a growing ``d`` from arXiv:2404.00498.

    An ``after`` stage that must know the run's length: ``build(steps)`` gives the stage itself, which keeps
    ``state.extra["lookahead"]``. Evaluation uses the weights as they are.

    Attributes:
      every: steps between two meetings, at least 1.
      decay: in [0, 1]; the share per step that the copy keeps of itself, when the run ends.
      power: how fast that share grows over the run, at least 0.

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
        """The stage for a run of ``steps`` updates."""
        return LookaheadStage(self, steps)


@dataclasses.dataclass(frozen=True)
class LookaheadStage:
    """``Lookahead`` for a run of ``steps`` updates: goes into ``post_update=``, as an ``EMA`` does."""

    config: Lookahead
    steps: int

    def init(self, state: State) -> State:
        """The slow weights start at the initial values (copies: a donated buffer must not appear twice)."""
        return state.replace(extra={**state.extra, "lookahead": _copy(_averaged(state))})

    def __call__(self, state: State) -> State:
        """After one update: at a meeting both weights become the average, else nothing happens."""
        every, decay, power = self.config.every, self.config.decay, self.config.power
        turn = state.step % every == 0

        def meet(slow: Any, fast: Any) -> tuple[Any, Any]:
            kept = decay**every * (state.step / self.steps) ** power
            share = jnp.where(turn, 1 - kept, 0)  # 0 at the run's end: only the slow weights count
            slow = jax.tree.map(functools.partial(_towards, share), slow, fast)
            return slow, _copy(slow)

        # A branch, so that the steps between two meetings do not touch the weights.
        slow, fast = jax.lax.cond(
            turn | (state.step >= self.steps),
            meet,
            lambda slow, fast: (slow, fast),
            state.extra["lookahead"],
            _averaged(state),
        )
        params = fast.pop("params")
        return state.replace(params=params, extra={**state.extra, **fast, "lookahead": slow})


def _towards(share: jax.Array, slow: jax.Array, fast: jax.Array) -> jax.Array:
    """A part of the way: exactly ``slow`` where both are the same, so that frozen weights stay frozen."""
    if not jnp.issubdtype(slow.dtype, jnp.floating):
        return fast
    return slow + share.astype(slow.dtype) * (fast - slow)


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.copy(), tree)


def _averaged(state: State) -> dict[str, Any]:
    stats = {k: v for k, v in state.extra.items() if k == "batch_stats"}
    return {"params": state.params, **stats}
