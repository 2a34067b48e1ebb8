"""Parameter groups: different settings for parameters selected by their path (``block0/conv/kernel``)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.core.errors import InputError

MAX_LISTED = 4  # paths in an error message, to show what paths look like


@dataclasses.dataclass(frozen=True)
class Group:
    """Other settings for some of the parameters; an entry of ``groups=`` of an optimizer.

    A parameter belongs to the first group whose ``path`` matches; parameters in no group use the optimizer's
    settings. A frozen group (``lr=0``, or after ``until``) gets no updates, no weight decay and no new
    momentum, and its gradients do not count in the global norm that ``clip`` limits.

    Attributes:
      path: regular expression, searched in the path of a parameter, such as ``norm.*/bias``.
      lr: factor of the learning rate, at least 0; 0 freezes the parameters.
      weight_decay: factor of the weight decay, at least 0. It does not add decay to parameters that the
        optimizer's ``decay`` excludes.
      until: fraction of the run in [0, 1] after which the group is frozen: it is updated
        ``round(until * steps)`` times. 1 never freezes it.

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
    """``step``: number of updates so far, int32 ``[]``; ``inner``: the state of the wrapped optimizer."""

    step: jax.Array
    inner: Any


def apply_groups(
    inner: optax.GradientTransformation, groups: Sequence[Group], steps: int | None
) -> optax.GradientTransformation:
    """Return ``inner`` with the settings of ``groups``; ``inner`` itself if there are none.

    Args:
      inner: an optax transformation that uses ``params`` for weight decay only, and whose last step is
        scaling by the learning rate.
      groups: a parameter belongs to the first one that matches.
      steps: number of updates in the run; needed for a group with ``until`` below 1.

    Raises:
      InputError: ``steps`` is None and needed; from ``init``, no parameter belongs to a group.
    """
    if not groups:
        return inner
    given, groups = groups, (*groups, Group(""))  # the last matches everything else and changes nothing
    ends = {group: _end(group, steps) for group in groups}

    def init(params: Any) -> GroupState:
        _check_used(given, params)
        return GroupState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(grads: Any, state: GroupState, params: Any = None) -> tuple[Any, GroupState]:
        def zero_if_frozen(group: Group, x: jax.Array) -> jax.Array:
            end = ends[group]
            if end is None:
                return x
            return jnp.zeros_like(x) if end == 0 else jnp.where(state.step < end, x, jnp.zeros_like(x))

        assigned = _assign(groups, grads)
        grads = jax.tree.map(zero_if_frozen, assigned, grads)
        if params is not None:
            # The chain uses params only to add decay * param, so scaling a parameter scales its decay, and
            # for a frozen parameter the chain sees nothing but zeros.
            params = jax.tree.map(
                lambda group, p: zero_if_frozen(group, p) * group.weight_decay, assigned, params
            )
        updates, inner_state = inner.update(grads, state.inner, params)
        # Zeroed again, because the momentum of a group that was just frozen takes time to fade.
        updates = jax.tree.map(lambda group, u: zero_if_frozen(group, u * group.lr), assigned, updates)
        return updates, GroupState(state.step + 1, inner_state)

    return optax.GradientTransformation(init, update)


def matches(pattern: str) -> Callable[[Any], Any]:
    """Return a function params → booleans: is ``pattern`` found in the path (``block0/conv/kernel``)?"""
    regex = _compile(pattern, "decay")

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: bool(regex.search(_path_text(path))), params)

    return mask


def _end(group: Group, steps: int | None) -> int | None:
    """Return the number of updates after which the group is frozen; None for never."""
    if group.lr == 0:
        return 0
    if group.until == 1:
        return None
    if steps is None:
        raise InputError(
            f"optimizer.groups: {group}: until needs the length of the run: use build(steps=...)"
        )
    return round(group.until * steps)


def _assign(groups: Sequence[Group], tree: Any) -> Any:
    """Return the group of each leaf; at least one group must match."""

    def first(path: Any, _: Any) -> Group:
        return next(group for group in groups if re.search(group.path, _path_text(path)))

    return jax.tree_util.tree_map_with_path(first, tree)


def _check_used(groups: Sequence[Group], params: Any) -> None:
    """Raise InputError for a group without parameters: a misspelt path that training would hide."""
    paths = [_path_text(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    used = set(jax.tree.leaves(_assign((*groups, Group("")), params)))
    for group in groups:
        if group in used:
            continue
        if any(re.search(group.path, path) for path in paths):
            raise InputError(
                f"optimizer.groups: every parameter that {group.path!r} matches belongs to an earlier group: "
                "put the narrower group first"
            )
        more = f" and {len(paths) - MAX_LISTED} more" if len(paths) > MAX_LISTED else ""
        raise InputError(
            f"optimizer.groups: {group.path!r} matches no parameter's path; the paths are "
            f"{', '.join(paths[:MAX_LISTED])}{more}"
        )


def _path_text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _compile(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"optimizer.{field}={pattern!r} is not a regular expression: {error}") from error
