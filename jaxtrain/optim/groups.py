"""Parameters by their path (``block0/conv/kernel``): which are decayed, and groups with other settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.core.errors import InputError

SHOWN = 4  # paths in an error, to show what paths look like


@dataclasses.dataclass(frozen=True)
class Group:
    """Some of the parameters, and what is different for them; goes into ``groups=`` of an optimizer.

    The first group whose path is found counts; parameters of no group follow the optimizer alone. While a
    group stands still (``lr`` of 0, or after ``until``), its parameters count for nothing: no decay, no new
    momentum, and no part in the global norm that ``clip`` bounds.

    Attributes:
      path: regular expression, searched in the path of a parameter, such as ``norm.*/bias``.
      lr: multiplies the rate, at least 0; 0 freezes.
      weight_decay: multiplies the decay, at least 0, for parameters that the optimizer decays at all.
      until: fraction of the run in [0, 1] after which the parameters stay as they are. The group is updated
        ``round(until * steps)`` times.

    >>> from jaxtrain.optim import SGD
    >>> tx = SGD(lr=0.1, groups=(Group("bias", lr=2.0),)).build()
    >>> params = {"kernel": jnp.zeros(()), "bias": jnp.zeros(())}
    >>> updates, _ = tx.update({"kernel": jnp.ones(()), "bias": jnp.ones(())}, tx.init(params), params)
    >>> {name: round(float(update), 3) for name, update in updates.items()}
    {'bias': -0.2, 'kernel': -0.1}
    """

    path: str
    lr: float = 1.0
    weight_decay: float = 1.0
    until: float = 1.0

    def __post_init__(self) -> None:
        _compile(self.path, "groups path")
        if self.lr < 0 or self.weight_decay < 0:
            raise InputError(f"optimizer.groups: {self}: lr and weight_decay must not be negative")
        if not 0 <= self.until <= 1:
            raise InputError(f"optimizer.groups: {self}: until is a fraction of the run, in [0, 1]")


class GroupState(NamedTuple):
    """``step``: updates so far, an int32 scalar; ``inner``: the state of the optimizer."""

    step: jax.Array
    inner: Any


def apply_groups(
    inner: optax.GradientTransformation, groups: Sequence[Group], steps: int | None
) -> optax.GradientTransformation:
    """``inner`` with groups; ``inner`` itself where there are none.

    Args:
      inner: uses its ``params`` for weight decay only, and scales linearly with the rate at its end.
      groups: the first that matches a parameter counts.
      steps: the run's updates; needed for a group with ``until`` below 1.

    Raises:
      InputError: no length where one is needed; from ``init``, a group that no parameter belongs to.
    """
    if not groups:
        return inner
    named, groups = groups, (*groups, Group(""))  # the last takes what no other names, and changes nothing
    ends = {group: _end(group, steps) for group in groups}

    def init(params: Any) -> GroupState:
        _check_used(named, params)
        return GroupState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(grads: Any, state: GroupState, params: Any = None) -> tuple[Any, GroupState]:
        def held(group: Group, x: jax.Array) -> jax.Array:
            """``x`` while the group moves, else zeros."""
            end = ends[group]
            if end is None:
                return x
            return jnp.zeros_like(x) if end == 0 else jnp.where(state.step < end, x, jnp.zeros_like(x))

        of = _assign(groups, grads)
        grads = jax.tree.map(held, of, grads)
        if params is not None:
            # All that the chain does with params is to add decay * param: a multiple of the parameter is a
            # multiple of its decay, and of a parameter that stands still the chain sees zeros only.
            params = jax.tree.map(lambda group, p: held(group, p) * group.weight_decay, of, params)
        updates, inner_state = inner.update(grads, state.inner, params)
        # Held once more: the momentum of a group that has stopped only fades.
        updates = jax.tree.map(lambda group, u: held(group, u * group.lr), of, updates)
        return updates, GroupState(state.step + 1, inner_state)

    return optax.GradientTransformation(init, update)


def matches(pattern: str) -> Callable[[Any], Any]:
    """Params → booleans: does the path (``block0/conv/kernel``) match?"""
    found = _compile(pattern, "decay")

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: bool(found.search(_text(path))), params)

    return mask


def _end(group: Group, steps: int | None) -> int | None:
    """The number of updates after which the group stands still; None is never."""
    if group.lr == 0:
        return 0
    if group.until == 1:
        return None
    if steps is None:
        raise InputError(f"optimizer.groups: {group}: until depends on the run's length: build(steps=...)")
    return round(group.until * steps)


def _assign(groups: Sequence[Group], tree: Any) -> Any:
    """The group of each leaf; one must match."""

    def first(path: Any, _: Any) -> Group:
        return next(group for group in groups if re.search(group.path, _text(path)))

    return jax.tree_util.tree_map_with_path(first, tree)


def _check_used(groups: Sequence[Group], params: Any) -> None:
    """A group that nothing belongs to is a typing error that training would hide."""
    paths = [_text(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    used = set(jax.tree.leaves(_assign((*groups, Group("")), params)))
    for group in groups:
        if group in used:
            continue
        if any(re.search(group.path, path) for path in paths):
            raise InputError(
                f"optimizer.groups: every parameter that {group.path!r} finds belongs to a group before it: "
                "put the narrower group first"
            )
        more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
        raise InputError(
            f"optimizer.groups: no parameter's path has {group.path!r} in it: there are "
            f"{', '.join(paths[:SHOWN])}{more}"
        )


def _text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _compile(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"optimizer.{field}={pattern!r} is no regular expression: {error}") from error
