"""Optimizers and schedules as frozen dataclasses with ``build(steps)`` → an optax transformation.

>>> import optax
>>> tx = SGD(lr=OneCycle(peak=0.4), momentum=0.9, nesterov=True).build(steps=1000)
>>> isinstance(tx, optax.GradientTransformation)
True
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxtrain.errors import InputError
from jaxtrain.types import State


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate over the run; subclasses say which. ``build(steps)`` gives ``step -> rate``.

    Update k of the run, from 0, uses the rate of step k: a warm-up from 0 makes the first update empty, and
    the final value belongs to step ``steps``, which no update uses.
    """

    def build(self, steps: int) -> optax.Schedule:
        """The optax schedule for a run of ``steps`` updates."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """The same rate throughout, after an optional linear warm-up.

    Attributes:
      value: the rate.
      warmup: fraction of the run in [0, 1) that rises from 0 to ``value``.
    """

    value: float
    warmup: float = 0.0

    def build(self, steps: int) -> optax.Schedule:
        rise = _warmup_steps(self.warmup, steps)
        return _join(rise, 0.0, self.value, optax.constant_schedule(self.value))


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """Linear warm-up from 0 to ``peak``, then linear decay to ``end``.

    Attributes:
      peak: the highest rate.
      end: the rate that is reached as the run ends.
      warmup: fraction of the run in [0, 1).
    """

    peak: float
    end: float = 0.0
    warmup: float = 0.0

    def build(self, steps: int) -> optax.Schedule:
        rise = _warmup_steps(self.warmup, steps)
        fall = optax.linear_schedule(self.peak, self.end, max(1, steps - rise))
        return _join(rise, 0.0, self.peak, fall)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up from 0 to ``peak``, then half a cosine to ``end`` (arXiv:1608.03983).

    Attributes:
      peak: the highest rate.
      end: the rate that is reached as the run ends.
      warmup: fraction of the run in [0, 1).
    """

    peak: float
    end: float = 0.0
    warmup: float = 0.0

    def build(self, steps: int) -> optax.Schedule:
        rise = _warmup_steps(self.warmup, steps)
        alpha = self.end / self.peak if self.peak else 0.0
        fall = optax.cosine_decay_schedule(self.peak, max(1, steps - rise), alpha)
        return _join(rise, 0.0, self.peak, fall)


@dataclasses.dataclass(frozen=True)
class OneCycle(Schedule):
    """Up in a line, down in a line: Smith's one-cycle policy (arXiv:1708.07120).

    Attributes:
      peak: the highest rate.
      start: the first rate, as a fraction of ``peak``.
      end: the rate that is reached as the run ends, as a fraction of ``peak``.
      warmup: fraction of the run in [0, 1) spent rising.
    """

    peak: float
    start: float = 0.2
    end: float = 0.01
    warmup: float = 0.25

    def build(self, steps: int) -> optax.Schedule:
        rise = _warmup_steps(self.warmup, steps)
        fall = optax.linear_schedule(self.peak, self.peak * self.end, max(1, steps - rise))
        return _join(rise, self.peak * self.start, self.peak, fall)


Rate = float | Schedule


@dataclasses.dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum, as PyTorch defines it (decay added to the gradient).

    Attributes:
      lr: a number or a schedule.
      momentum: in [0, 1); 0 keeps no buffer.
      nesterov: look ahead along the momentum, which must be above 0.
      weight_decay: added to the gradient as ``weight_decay * param``.
      decay: regular expression; only parameters whose path it finds are decayed. Biases and
        normalisation scales are left out by default.
      clip: largest global gradient norm; None leaves gradients alone.

    Example:
      >>> SGD(lr=0.1).build().init({"kernel": jax.numpy.zeros(3)})  # doctest: +ELLIPSIS
      (...)
    """

    lr: Rate
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay: str = "kernel|embedding"
    clip: float | None = None

    def build(self, steps: int | None = None) -> optax.GradientTransformation:
        """The transformation; ``steps`` (the run's updates) is needed when ``lr`` is a schedule."""
        _check(self, momentum=self.momentum)
        if self.nesterov and not self.momentum:
            raise InputError("optimizer.nesterov needs a momentum: set optimizer.momentum above 0")
        return optax.chain(
            _clip(self.clip),
            optax.add_decayed_weights(self.weight_decay, _mask(self.decay))
            if self.weight_decay
            else optax.identity(),
            optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity(),
            optax.scale_by_learning_rate(rate(self.lr, steps)),
        )


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam (arXiv:1412.6980).

    Attributes:
      lr: a number or a schedule.
      b1, b2: decay rates of the two moments, in [0, 1).
      eps: added to the denominator.
      clip: largest global gradient norm; None leaves gradients alone.
    """

    lr: Rate = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float | None = None

    def build(self, steps: int | None = None) -> optax.GradientTransformation:
        """The transformation; ``steps`` (the run's updates) is needed when ``lr`` is a schedule."""
        _check(self, b1=self.b1, b2=self.b2)
        return optax.chain(
            _clip(self.clip),
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.scale_by_learning_rate(rate(self.lr, steps)),
        )


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101): decay is scaled by the rate, as in PyTorch.

    Attributes:
      lr: a number or a schedule.
      b1, b2: decay rates of the two moments, in [0, 1).
      eps: added to the denominator.
      weight_decay: each update also subtracts ``lr * weight_decay * param``.
      decay: regular expression; only parameters whose path it finds are decayed.
      clip: largest global gradient norm; None leaves gradients alone.
    """

    lr: Rate = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay: str = "kernel|embedding"
    clip: float | None = None

    def build(self, steps: int | None = None) -> optax.GradientTransformation:
        """The transformation; ``steps`` (the run's updates) is needed when ``lr`` is a schedule."""
        _check(self, b1=self.b1, b2=self.b2)
        return optax.chain(
            _clip(self.clip),
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, _mask(self.decay)),
            optax.scale_by_learning_rate(rate(self.lr, steps)),
        )


@dataclasses.dataclass(frozen=True)
class EMA:
    """An exponential moving average of params and batch statistics, kept in ``state.extra["ema"]``.

    Pass it in ``after=`` of ``make_init`` and ``make_train_step``; evaluation then uses the average.

    Attributes:
      decay: in [0, 1); the average is ``decay * average + (1 - decay) * params`` after every update.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"ema.decay is {self.decay}: it must be in [0, 1)")

    def init(self, state: State) -> State:
        """The average starts at the initial values (copies: a donated buffer must not appear twice)."""
        return state.replace(extra={**state.extra, "ema": jax.tree.map(lambda x: x.copy(), _averaged(state))})

    def __call__(self, state: State) -> State:
        """One update of the average."""
        ema = jax.tree.map(
            lambda old, new: self.decay * old + (1 - self.decay) * new,
            state.extra["ema"],
            _averaged(state),
        )
        return state.replace(extra={**state.extra, "ema": ema})


def rate(lr: Rate, steps: int | None) -> float | optax.Schedule:
    """``lr`` as optax takes it: the number itself, or the schedule built for ``steps`` updates."""
    if not isinstance(lr, Schedule):
        return lr
    if steps is None:
        raise InputError(f"lr={type(lr).__name__} depends on the run's length: build(steps=...)")
    return lr.build(steps)


def _averaged(state: State) -> dict[str, Any]:
    stats = {k: v for k, v in state.extra.items() if k == "batch_stats"}
    return {"params": state.params, **stats}


def _join(rise: int, low: float, peak: float, fall: optax.Schedule) -> optax.Schedule:
    if rise == 0:
        return fall
    return optax.join_schedules([optax.linear_schedule(low, peak, rise), fall], [rise])


def _warmup_steps(fraction: float, steps: int) -> int:
    if not 0 <= fraction < 1:
        raise InputError(f"lr.warmup is {fraction}: it is a fraction of the run, in [0, 1)")
    return round(fraction * steps)


def _clip(norm: float | None) -> optax.GradientTransformation:
    return optax.identity() if norm is None else optax.clip_by_global_norm(norm)


def _mask(pattern: str) -> Callable[[Any], Any]:
    """Params → booleans: does the path (``block0/conv/kernel``) match?"""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise InputError(f"optimizer.decay={pattern!r} is no regular expression: {error}") from error

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: bool(found.search(jax.tree_util.keystr(path, simple=True, separator="/"))),
            params,
        )

    return mask


def _check(config: Any, **below_one: float) -> None:
    """Refuse by name what could only train in the wrong direction, or not at all."""
    if not isinstance(config.lr, Schedule) and config.lr < 0:
        raise InputError(f"optimizer.lr is {config.lr}: it must not be negative")
    for name in ("value", "peak", "start", "end"):
        if getattr(config.lr, name, 0) < 0:
            raise InputError(f"optimizer.lr.{name} is {getattr(config.lr, name)}: it must not be negative")
    for name, value in below_one.items():
        if not 0 <= value < 1:
            raise InputError(f"optimizer.{name} is {value}: it must be in [0, 1)")
    if getattr(config, "weight_decay", 0) < 0:
        raise InputError(f"optimizer.weight_decay is {config.weight_decay}: it must not be negative")
    if config.clip is not None and config.clip <= 0:
        raise InputError(f"optimizer.clip is {config.clip}: it must be above 0, or None for no clipping")
