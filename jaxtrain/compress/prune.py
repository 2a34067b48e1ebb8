"""Magnitude pruning: a function ``State -> State`` for ``post_update=`` that sets small weights to zero."""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import State, leaf_paths

MASKS = "masks"  # in State.extra
AVERAGES = ("ema", "lookahead")  # in State.extra; each holds averaged parameters under "params"
MAX_LISTED = 4  # paths in an error message, to show what paths look like


@dataclasses.dataclass(frozen=True)
class Prune:
    """Set the weights with the smallest magnitudes to zero, more and more of them, and keep them at zero.

    It goes into ``post_update=`` of an ``Experiment``; its place among the stages does not matter. Every
    selected array is pruned by itself (uniform sparsity): of its ``n`` elements, ``floor(sparsity * n)`` are
    zero in the end. The sparsity grows as in Zhu and Gupta 2017 (arXiv:1710.01878), equation 1 with initial
    sparsity 0: after round ``r`` of ``rounds`` it is ``sparsity * (1 - (1 - r / rounds)**3)``. Of equal
    magnitudes the first in row-major order is pruned, so the masks do not depend on the mesh. A weight that
    is pruned stays pruned.

    Pruned weights are exactly zero after every update, whatever the optimizer's momentum is, and so are those
    of ``optim.EMA`` and ``optim.Lookahead``; an update that the guard or the loss scale skips leaves the
    weights and the masks as they were, and a round that is skipped is made up for at the next update. The
    gradients of pruned weights are still part of ``grad_norm`` and of the norm that ``clip`` limits. With
    ``--init-from`` a run that prunes, too, starts with the masks of the other run.

    ``build(steps)`` returns the function ``State -> State``. Its state is ``state.extra["masks"]``:
    ``params``, bool arrays by path (True is kept), and ``round``, int32 ``[]``, the rounds so far.

    Attributes:
      sparsity: the part of each selected array that is zero at the end, in (0, 1); with ``pattern``, that of
        the pattern.
      start, end: the rounds are spread evenly over this part of the run: fractions in [0, 1], ``start <=
        end``. The last round is after update ``round(end * steps)``, at least 1.
      rounds: how often weights are selected, at least 1. With 1 all are pruned at ``end``.
      pattern: ``"n:m"``, such as ``"2:4"``: of each ``m`` consecutive weights along the input axis of a dense
        or convolution kernel (axis -2), at least ``m - n`` are zero (Mishra et al. 2021, arXiv:2104.08378).
        Arrays whose axis -2 is not a multiple of ``m`` are left as they are. None: no pattern.
      include: regular expression, searched in the path of each parameter, such as ``block0/conv/kernel``. The
        default selects the kernels, not biases, norms and embeddings.

    >>> stage = Prune(sparsity=0.75, start=0, end=0, rounds=1).build(steps=10)
    >>> state = State(jnp.int32(1), {"kernel": jnp.array([3.0, -1.0, 2.0, 1.0])}, {}, ())
    >>> stage(stage.init(state)).params["kernel"].tolist()
    [3.0, 0.0, 0.0, 0.0]
    """

    sparsity: float = 0.5
    start: float = 0.1
    end: float = 0.6
    rounds: int = 20
    pattern: str | None = None
    include: str = "kernel$"

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise InputError(f"prune.sparsity is {self.sparsity}: it must be in (0, 1)")
        if not 0 <= self.start <= self.end <= 1:
            raise InputError(
                f"prune.start is {self.start} and prune.end {self.end}: they must be fractions of the run, "
                "0 <= start <= end <= 1"
            )
        if self.rounds < 1:
            raise InputError(f"prune.rounds is {self.rounds}: it must be at least 1")
        try:
            re.compile(self.include)
        except re.error as error:
            raise InputError(
                f"prune.include={self.include!r} is not a regular expression: {error}"
            ) from error
        if self.pattern is None:
            return
        kept, group = self._parse_pattern()
        if Fraction(str(self.sparsity)) != 1 - Fraction(kept, group):
            raise InputError(
                f"prune.pattern={self.pattern} has sparsity {1 - kept / group:g} and prune.sparsity is "
                f"{self.sparsity:g}: set prune.sparsity={1 - kept / group:g}"
            )

    def _parse_pattern(self) -> tuple[int, int]:
        """Return n and m of the pattern ``n:m``."""
        found = re.fullmatch(r"(\d+):(\d+)", str(self.pattern))
        kept, group = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < kept < group:
            raise InputError(f'prune.pattern is {self.pattern!r}: it must be "n:m" with 0 < n < m, or None')
        return kept, group

    def build(self, steps: int) -> PruneStage:
        """Return the stage for a run of ``steps`` updates."""
        first, last = round(self.start * steps), round(self.end * steps)
        ends = [
            max(1, first + math.ceil((last - first) * number / self.rounds))
            for number in range(1, self.rounds + 1)
        ]
        return PruneStage(self, tuple(ends))

    def counts(self, size: int) -> list[int]:
        """Return how many of ``size`` elements are zero after each round, 0 to ``rounds``.

        >>> Prune(sparsity=0.29, rounds=2).counts(100)
        [0, 25, 29]
        """
        final = Fraction(str(self.sparsity))  # the float 0.29 * 100 is below 29
        parts = [final * (1 - (1 - Fraction(number, self.rounds)) ** 3) for number in range(self.rounds + 1)]
        return [math.floor(part * size) for part in parts]


@dataclasses.dataclass(frozen=True)
class PruneStage:
    """``Prune`` for a run, in the form that ``post_update=`` takes.

    Attributes:
      config: the settings.
      ends: the number of updates after which each round is due.
    """

    config: Prune
    ends: tuple[int, ...]

    def init(self, state: State) -> State:
        """Add the masks to the state; nothing is pruned yet.

        Raises:
          InputError: ``include`` selects no parameter, or none that the pattern fits.
        """
        masks = {path: jnp.ones(leaf.shape, bool) for path, leaf in self._selected(state.params).items()}
        extra = {**state.extra, MASKS: {"params": masks, "round": jnp.int32(0)}}
        return state.replace(extra=extra)

    def __call__(self, state: State) -> State:
        """Select the weights to prune if a round is due, and set all that are pruned to zero."""
        masks, done = state.extra[MASKS]["params"], state.extra[MASKS]["round"]
        leaves = leaf_paths(state.params)
        now = jnp.searchsorted(jnp.array(self.ends), state.step, side="right").astype(jnp.int32)
        now = jnp.maximum(now, done)
        # A branch, so that the steps between two rounds do not compare magnitudes.
        masks = jax.lax.cond(
            now > done,
            lambda masks, params: {path: self._select(masks[path], params[path], now) for path in masks},
            lambda masks, params: masks,
            masks,
            {path: leaves[path] for path in masks},
        )
        extra = {**state.extra, MASKS: {"params": masks, "round": now}}
        for name in AVERAGES:
            if name in extra:
                extra[name] = {**extra[name], "params": _apply(masks, extra[name]["params"])}
        return state.replace(params=_apply(masks, state.params), extra=extra)

    def _selected(self, params: Any) -> dict[str, Any]:
        """Return the parameters to prune, by path."""
        leaves = leaf_paths(params)
        found = {
            path: leaf
            for path, leaf in leaves.items()
            if re.search(self.config.include, path) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        }
        more = f" and {len(leaves) - MAX_LISTED} more" if len(leaves) > MAX_LISTED else ""
        paths = ", ".join(list(leaves)[:MAX_LISTED]) + more
        if not found:
            raise InputError(f"prune.include={self.config.include!r} matches no parameter; there are {paths}")
        if self.config.pattern is not None:
            group = self.config._parse_pattern()[1]
            found = {p: x for p, x in found.items() if x.ndim >= 2 and x.shape[-2] % group == 0}
            if not found:
                raise InputError(
                    f"prune.pattern={self.config.pattern}: no parameter that prune.include="
                    f"{self.config.include!r} matches has an axis -2 that is a multiple of {group}"
                )
        if any(leaf.size >= 2**32 for leaf in found.values()):
            raise InputError("prune: an array of 2**32 elements or more cannot be pruned: leave it out")
        return found

    def _select(self, mask: jax.Array, weights: jax.Array, number: jax.Array) -> jax.Array:
        """Return the mask of round ``number``; what ``mask`` has pruned stays pruned."""
        bits = jax.lax.bitcast_convert_type(jnp.abs(weights).astype(jnp.float32), jnp.uint32)
        order = jnp.where(mask, bits + 1, 0)  # floats that are not negative are ordered as their bits are
        if self.config.pattern is None:
            chosen = _smallest(order, jnp.array(self.config.counts(mask.size), jnp.uint32)[number])
        else:
            group = self.config._parse_pattern()[1]
            chosen = _smallest_of_groups(order, group, jnp.array(self.config.counts(group))[number])
        return mask & ~chosen  # masks of another run may have more zeros than this round


def sparsity(state: State) -> dict[str, float]:
    """Return the part of each pruned array that is zero, by path, and of all together as ``total``.

    Returns {} for a state without masks.
    """
    if MASKS not in state.extra:
        return {}
    leaves = leaf_paths(state.params)
    pruned = {path: leaves[path] for path in state.extra[MASKS]["params"]}
    zeros = jax.device_get(jax.jit(lambda arrays: jax.tree.map(lambda x: (x == 0).sum(), arrays))(pruned))
    parts = {path: int(zeros[path]) / leaf.size for path, leaf in pruned.items()}
    size = sum(leaf.size for leaf in pruned.values())
    return {**parts, "total": sum(int(count) for count in zeros.values()) / size}


def _apply(masks: dict[str, jax.Array], params: Any) -> Any:
    """Return ``params`` with zeros where a mask is False."""

    def apply(path: Any, leaf: jax.Array) -> jax.Array:
        mask = masks.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return leaf if mask is None else jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(apply, params)


def _smallest(order: jax.Array, count: jax.Array) -> jax.Array:
    """Return which elements are the ``count`` smallest, the first in row-major order of equal ones: bool.

    A binary search of the value and then of the position needs only counts, which are exact on every mesh. A
    sort would gather an array that is split over devices.

    >>> _smallest(jnp.array([3, 1, 1, 1], jnp.uint32), jnp.uint32(2)).tolist()
    [False, True, True, False]
    """

    def total(chosen: jax.Array) -> jax.Array:
        return chosen.sum(dtype=jnp.uint32)

    value = _largest(lambda value: total(order < value) < count)
    left = count - total(order < value)
    equal, position = order == value, _positions(order.shape)
    end = _largest(lambda end: total(equal & (position < end)) <= left)
    return (order < value) | (equal & (position < end))


def _largest(holds: Any) -> jax.Array:
    """Return the largest uint32 for which ``holds``, where it holds up to some number; 0 if it never does."""

    def bit(index: jax.Array, found: jax.Array) -> jax.Array:
        larger = found | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(holds(larger), larger, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.uint32(0))


def _smallest_of_groups(order: jax.Array, group: int, count: jax.Array) -> jax.Array:
    """Return which elements are the ``count`` smallest of each ``group`` along axis -2, as ``_smallest``."""
    rows = order.reshape(*order.shape[:-2], -1, group, order.shape[-1])
    own, other = rows[..., :, None, :], rows[..., None, :, :]
    earlier = jnp.tril(jnp.ones((group, group), bool), -1)[..., None]
    earlier = jnp.broadcast_to(earlier, jnp.broadcast_shapes(own.shape, other.shape))
    rank = ((other < own) | ((other == own) & earlier)).sum(-2)
    return (rank < count).reshape(order.shape)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """Return the position of each element in row-major order: uint32 [*shape], without a reshape."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return position
