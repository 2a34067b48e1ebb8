"""Learning rate schedules: frozen dataclasses whose ``build(steps)`` returns ``step -> rate``."""

from __future__ import annotations

import dataclasses

import optax

from jaxtrain.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Base class of learning rate schedules.

    Update k of the run, counted from 0, uses the rate of step k. So with a warm-up from 0 the first update
    has rate 0, and the final value, that of step ``steps``, is approached and not used.
    """

    def build(self, steps: int) -> optax.Schedule:
        """Return the optax schedule for a run of ``steps`` updates."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """Constant rate, after an optional linear warm-up.

    Attributes:
      value: the rate, at least 0.
      warmup: fraction of the run in [0, 1) during which the rate rises from 0 to ``value``.
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
      peak: the highest rate, at least 0.
      end: the rate at the end of the run, at least 0.
      warmup: fraction of the run in [0, 1) during which the rate rises.
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
    """Linear warm-up from 0 to ``peak``, then cosine decay to ``end`` (half a period; arXiv:1608.03983).

    Attributes:
      peak: the highest rate, at least 0.
      end: the rate at the end of the run, at least 0.
      warmup: fraction of the run in [0, 1) during which the rate rises.
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
    """One-cycle policy: linear rise to ``peak``, then linear decay (Smith & Topin, arXiv:1708.07120).

    Attributes:
      peak: the highest rate, at least 0.
      start: the first rate, as a fraction of ``peak``.
      end: the rate at the end of the run, as a fraction of ``peak``.
      warmup: fraction of the run in [0, 1) during which the rate rises.
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


def rate(lr: Rate, steps: int | None) -> float | optax.Schedule:
    """Return ``lr`` as optax takes it: the number itself, or the schedule for a run of ``steps`` updates."""
    if not isinstance(lr, Schedule):
        return lr
    if steps is None:
        raise InputError(f"lr={type(lr).__name__} needs the length of the run: use build(steps=...)")
    return lr.build(steps)


def _join(rise: int, low: float, peak: float, fall: optax.Schedule) -> optax.Schedule:
    if rise == 0:
        return fall
    return optax.join_schedules([optax.linear_schedule(low, peak, rise), fall], [rise])


def _warmup_steps(fraction: float, steps: int) -> int:
    if not 0 <= fraction < 1:
        raise InputError(f"lr.warmup is {fraction}: it is a fraction of the run, in [0, 1)")
    return round(fraction * steps)
