"""Optimizers: frozen dataclasses whose ``build(steps)`` returns an optax transformation."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from jaxtrain.core.errors import InputError
from jaxtrain.optim.groups import Group, apply_groups, matches
from jaxtrain.optim.schedules import Rate, Schedule, rate


@dataclasses.dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD``: decay is added to the gradient.

    ``g = grad + weight_decay * param``, ``buffer = g + momentum * buffer``, ``param -= lr * buffer``; with
    ``nesterov``, ``param -= lr * (g + momentum * buffer)``.

    Attributes:
      lr: learning rate: a number, at least 0, or a schedule such as ``optim.Cosine(peak=0.1)``.
      momentum: in [0, 1); 0 uses no buffer.
      nesterov: Nesterov momentum; ``momentum`` must be above 0.
      weight_decay: at least 0; ``weight_decay * param`` is added to the gradient.
      decay: regular expression; only parameters in whose path it is found are decayed. The default excludes
        biases and normalisation scales.
      clip: clip gradients to this global norm (L2, over all parameters), above 0. None: no clipping.
      groups: settings for some of the parameters that differ from these (``optim.Group``).

    Example:
      >>> import jax
      >>> SGD(lr=0.1).build().init({"kernel": jax.numpy.zeros(3)})  # doctest: +ELLIPSIS
      (...)
    """

    lr: Rate
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay: str = "kernel|embedding"
    clip: float | None = None
    groups: tuple[Group, ...] = ()

    def build(self, steps: int | None = None) -> optax.GradientTransformation:
        """Return the transformation; a schedule and ``Group.until`` need ``steps``, the run's updates."""
        _check(self, momentum=self.momentum)
        if self.nesterov and not self.momentum:
            raise InputError("optimizer.nesterov needs momentum: set optimizer.momentum above 0")
        chain = optax.chain(
            _clip(self.clip),
            optax.add_decayed_weights(self.weight_decay, matches(self.decay))
            if self.weight_decay
            else optax.identity(),
            optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity(),
            optax.scale_by_learning_rate(rate(self.lr, steps)),
        )
        return apply_groups(chain, self.groups, steps)


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, arXiv:1412.6980), without weight decay.

    Attributes:
      lr: learning rate: a number, at least 0, or a schedule such as ``optim.Cosine(peak=0.1)``.
      b1, b2: decay rates of the first and second moment, in [0, 1).
      eps: added to the square root of the second moment, for numerical stability.
      clip: clip gradients to this global norm (L2, over all parameters), above 0. None: no clipping.
      groups: settings for some of the parameters that differ from these (``optim.Group``).
    """

    lr: Rate = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float | None = None
    groups: tuple[Group, ...] = ()

    def build(self, steps: int | None = None) -> optax.GradientTransformation:
        """Return the transformation; a schedule and ``Group.until`` need ``steps``, the run's updates."""
        _check(self, b1=self.b1, b2=self.b2)
        chain = optax.chain(
            _clip(self.clip),
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.scale_by_learning_rate(rate(self.lr, steps)),
        )
        return apply_groups(chain, self.groups, steps)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101), as ``torch.optim.AdamW``.

    Attributes:
      lr: learning rate: a number, at least 0, or a schedule such as ``optim.Cosine(peak=0.1)``.
      b1, b2: decay rates of the first and second moment, in [0, 1).
      eps: added to the square root of the second moment, for numerical stability.
      weight_decay: at least 0; each update also subtracts ``lr * weight_decay * param``.
      decay: regular expression; only parameters in whose path it is found are decayed. The default excludes
        biases and normalisation scales.
      clip: clip gradients to this global norm (L2, over all parameters), above 0. None: no clipping.
      groups: settings for some of the parameters that differ from these (``optim.Group``).
    """

    lr: Rate = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay: str = "kernel|embedding"
    clip: float | None = None
    groups: tuple[Group, ...] = ()

    def build(self, steps: int | None = None) -> optax.GradientTransformation:
        """Return the transformation; a schedule and ``Group.until`` need ``steps``, the run's updates."""
        _check(self, b1=self.b1, b2=self.b2)
        chain = optax.chain(
            _clip(self.clip),
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, matches(self.decay)),
            optax.scale_by_learning_rate(rate(self.lr, steps)),
        )
        return apply_groups(chain, self.groups, steps)


def _clip(norm: float | None) -> optax.GradientTransformation:
    return optax.identity() if norm is None else optax.clip_by_global_norm(norm)


def _check(config: Any, **below_one: float) -> None:
    """Raise InputError for a setting that is out of range."""
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
    if not isinstance(config.groups, tuple | list) or not all(isinstance(g, Group) for g in config.groups):
        raise InputError(f"optimizer.groups is {config.groups!r}: it must be a tuple of optim.Group")
    if isinstance(config, Adam) and any(group.weight_decay != 1 for group in config.groups):
        raise InputError("optimizer.groups: Adam has no weight decay to multiply: use AdamW")
