"""Every mesh of so many devices, with some batches and recomputation: what fits, and what it needs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from jaxtrain.models import Remat
from jaxtrain.plan.variants import Trial, Try, Variant

MOST = 60  # variants that are compiled: all of eight devices


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What came of it.

    Attributes:
      found: those that could be compiled, those that fit first, then by their memory.
      impossible: the others.
      left_out: how many there would have been beyond ``MOST``.
    """

    found: tuple[Trial, ...]
    impossible: tuple[Trial, ...]
    left_out: int


def search_all(
    variant: Variant,
    limit: int | None,
    trial: Try,
    advance: Callable[[int], None] = lambda done: None,
) -> SearchResult:
    """Compile meshes × batches × recomputation, one by one.

    Args:
      variant: what was asked for, whose devices and ``accumulate`` all others share.
      limit: bytes on each device; None where nothing is known to fit or not.
      trial: compiles a variant.
      advance: hears how many of ``attempts(variant)`` are done.
    """
    everything = list(variants(variant))
    tried, refused = list[Trial](), set[tuple[int, ...]]()
    for number, one in enumerate(everything[:MOST]):
        if one.mesh not in refused:
            tried.append(trial(one))
            if tried[-1].plan is None and not tried[-1].reason.startswith(("batch", "eval_batch")):
                refused.add(one.mesh)  # and so with another batch or recomputation
        advance(number + 1)

    def rank(one: Trial) -> tuple[bool, int]:
        total = one.plan.total if one.plan else 0
        return limit is not None and total > limit, total

    return SearchResult(
        tuple(sorted((one for one in tried if one.plan), key=rank)),
        tuple(one for one in tried if not one.plan),
        len(everything[MOST:]),
    )


def attempts(variant: Variant) -> int:
    """How many variants ``search_all`` compiles, or finds to be impossible."""
    return min(MOST, len([*variants(variant)]))


def variants(given: Variant) -> Iterator[Variant]:
    """``given`` first, then the rest: as it was asked for before double and half the batch.

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
