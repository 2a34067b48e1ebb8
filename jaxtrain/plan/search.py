"""Compile every mesh of the devices, with some batches and recomputation: what fits, and what it needs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from jaxtrain.models import Remat
from jaxtrain.plan.variants import Trial, TrialFn, Variant

MOST = 60  # variants to compile: all of eight devices


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The result of ``search_all``.

    Attributes:
      found: variants that compiled, those that fit first, then by memory.
      impossible: variants that cannot be assembled or compiled.
      left_out: how many variants beyond ``MOST`` were not compiled.
    """

    found: tuple[Trial, ...]
    impossible: tuple[Trial, ...]
    left_out: int


def search_all(
    variant: Variant,
    limit: int | None,
    trial: TrialFn,
    advance: Callable[[int], None] = lambda done: None,
) -> SearchResult:
    """Compile meshes × batches × recomputation, one by one.

    Args:
      variant: the run that was asked for; all variants share its devices and ``accumulate``.
      limit: bytes on each device; None where it is unknown.
      trial: compiles a variant.
      advance: called with how many of ``attempts(variant)`` are done.
    """
    candidates = list(variants(variant))
    tried, impossible_meshes = list[Trial](), set[tuple[int, ...]]()
    for number, one in enumerate(candidates[:MOST]):
        if one.mesh not in impossible_meshes:
            tried.append(trial(one))
            if tried[-1].plan is None and not tried[-1].reason.startswith(("batch", "eval_batch")):
                impossible_meshes.add(one.mesh)  # with any batch and recomputation
        advance(number + 1)

    def rank(one: Trial) -> tuple[bool, int]:
        total = one.plan.total if one.plan else 0
        return limit is not None and total > limit, total

    return SearchResult(
        tuple(sorted((one for one in tried if one.plan), key=rank)),
        tuple(one for one in tried if not one.plan),
        len(candidates[MOST:]),
    )


def attempts(variant: Variant) -> int:
    """Return how many variants ``search_all`` tries."""
    return min(MOST, len([*variants(variant)]))


def variants(given: Variant) -> Iterator[Variant]:
    """Yield ``given``, then its variants: the same batch before double and half of it.

    >>> len({*variants(Variant((8, 1, 1), 64, 1, "none"))})
    60
    """
    devices = given.mesh[0] * given.mesh[1] * given.mesh[2]
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    meshes = [mesh for mesh in itertools.product(sizes, repeat=3) if mesh[0] * mesh[1] * mesh[2] == devices]
    meshes.sort(key=lambda mesh: (mesh != given.mesh, mesh[2], mesh[1]))
    batches = [given.batch, 2 * given.batch, *([given.batch // 2] if given.batch % 2 == 0 else [])]
    remats: dict[Remat, None] = dict.fromkeys((given.remat, "none", "nothing_saveable"))
    for batch, remat, mesh in itertools.product(batches, remats, meshes):
        yield Variant(mesh, batch, given.accumulate, remat)
