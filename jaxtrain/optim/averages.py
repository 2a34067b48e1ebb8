"""Weight averages: functions ``State -> State`` for ``post_update=``, applied after every update."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import State

EMAStart = Literal["ramp", "debias", "initial"]
"""What the average of the first updates is (``EMA.start``)."""


@dataclasses.dataclass(frozen=True)
class EMA:
    """Maintain an exponential moving average of parameters and batch statistics.

    Pass it in ``post_update=`` of an ``Experiment``, or of ``make_init`` and ``make_train_step``. The average
    is stored in ``state.extra["ema"]`` with ``updates``, the number of updates in it; evaluation uses it in
    place of the parameters. After update t (from 1; skipped updates do not count)
    ``average = d * average + (1 - d) * params``. The average of bfloat16 and float16 arrays is float32, in
    which small changes are not rounded off. Integers, booleans and random keys are not averaged: the average
    has those of the state.

    Attributes:
      decay: in [0, 1), the value of d after many updates. It averages over about ``1 / (1 - decay)`` updates.
      start: how d begins, since an average over 1,000 updates that starts at the initial parameters still
        consists of them after 150. ``"ramp"``: ``d = min(decay, t / (9 + t))``, so the average is over about
        the last tenth of the updates so far (TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``).
        ``"debias"``: ``d = decay * (1 - decay**(t-1)) / (1 - decay**t)``, the average of the parameters after
        each update without the initial ones, early ones included (Adam, arXiv:1412.6980, section 3).
        ``"initial"``: ``d = decay`` from the initial parameters on.

    >>> state = State(jnp.int32(0), {"w": jnp.float32(0)}, {}, ())
    >>> for start in ("ramp", "debias", "initial"):
    ...     ema, average = EMA(0.999, start), EMA(0.999, start).init(state)
    ...     for value in (10.0, 20.0):
    ...         average = ema(average.replace(params={"w": jnp.float32(value)}))
    ...     print(start, round(float(average.extra["ema"]["params"]["w"]), 2))
    ramp 18.0
    debias 15.0
    initial 0.03
    """

    decay: float = 0.999
    start: EMAStart = "ramp"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"ema.decay is {self.decay}: it must be in [0, 1)")
        if self.start not in typing.get_args(EMAStart):
            raise InputError(
                f"ema.start is {self.start!r}: it must be one of {', '.join(typing.get_args(EMAStart))}"
            )

    def init(self, state: State) -> State:
        """Add the average to the state, starting at the initial values.

        They are copied, because a donated buffer must not appear twice in a state.
        """
        ema = {**_precise(_averaged(state)), "updates": jnp.int32(0)}
        return state.replace(extra={**state.extra, "ema": ema})

    def __call__(self, state: State) -> State:
        """Update the average with the parameters of ``state``."""
        old = dict(state.extra["ema"])
        updates = old.pop("updates") + 1
        weight = functools.partial(self._weight, updates)
        ema = jax.tree.map(lambda old, new: _interpolate(weight, old, new), old, _averaged(state))
        return state.replace(extra={**state.extra, "ema": {**ema, "updates": updates}})

    def _weight(self, updates: jax.Array, dtype: Any) -> jax.Array:
        """``1 - d`` of update number ``updates``, float ``[]``."""
        t = updates.astype(dtype)
        if self.start == "ramp":
            return jnp.maximum(1 - self.decay, 9 / (9 + t))
        if self.start == "debias":
            log_decay = math.log(self.decay) if self.decay else -math.inf
            return (1 - self.decay) / -jnp.expm1(t * log_decay)  # 1 - decay**t would lose digits
        return jnp.full((), 1 - self.decay, dtype)


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """Average the weights with a slow copy every few steps, and continue from the average.

    The slow copy holds all float parameters and batch statistics (bfloat16 and float16 as float32). Every
    ``every`` steps ``slow = d * slow + (1 - d) * fast`` and then ``fast = slow``, with
    ``d = decay**every * (t / T)**power`` at step t of a run of T steps: weak averaging at first, strong
    averaging at the end. The last step of the run sets ``fast = slow``; it updates ``slow`` only if it is a
    multiple of ``every``. Optimizer state and integers are not averaged, and an update that the guard or the
    loss scale skips changes nothing. The method is from arXiv:1907.08610, the growing ``d`` from
    arXiv:2404.00498.

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
        return state.replace(extra={**state.extra, "lookahead": _precise(_averaged(state))})

    def __call__(self, state: State) -> State:
        """Set both weights to their average if this step is due; else return ``state`` unchanged."""
        every, decay, power = self.config.every, self.config.decay, self.config.power
        due = state.step % every == 0

        def average(slow: Any, fast: Any) -> tuple[Any, Any]:
            slow_weight = decay**every * (state.step / self.steps) ** power
            fast_weight = jnp.where(due, 1 - slow_weight, 0)  # 0 at the end of the run: take ``slow`` alone
            slow = jax.tree.map(
                lambda slow, fast: _interpolate(lambda _: fast_weight, slow, fast), slow, fast
            )
            return slow, jax.tree.map(_as_dtype_of, slow, fast)

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


def _interpolate(weight: Callable[[Any], jax.Array], old: jax.Array, new: jax.Array) -> jax.Array:
    """Return ``old`` moved towards ``new``; exactly ``old`` if both are equal (frozen weights).

    Args:
      weight: dtype to compute in, float32 or wider -> how far to move, in [0, 1].
      old, new: arrays of one dtype, or of float32 and half precision; of integers, booleans and random keys
        ``new`` is returned.
    """
    if not jnp.issubdtype(old.dtype, jnp.inexact):
        return new
    dtype = jnp.promote_types(jnp.finfo(old.dtype).dtype, jnp.float32)
    return old + weight(dtype).astype(old.dtype) * (new - old)


def _precise(tree: Any) -> Any:
    """Return a copy with floats of half precision as float32: an average of them would stop changing."""

    def copy(x: jax.Array) -> jax.Array:
        half = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
        return x.astype(jnp.float32) if half else x.copy()

    return jax.tree.map(copy, tree)


def _as_dtype_of(x: jax.Array, other: jax.Array) -> jax.Array:
    """A copy of ``x`` with the dtype of ``other``."""
    return x.copy() if x.dtype == other.dtype else x.astype(other.dtype)


def _averaged(state: State) -> dict[str, Any]:
    """Return the parts of the state that are averaged: params and, if there are any, batch statistics."""
    stats = {k: v for k, v in state.extra.items() if k == "batch_stats"}
    return {"params": state.params, **stats}
