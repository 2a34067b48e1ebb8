"""Find the smallest change of settings with which a run fits, by compiling candidates."""

from __future__ import annotations

import dataclasses
import typing

from jaxtrain.models import Remat
from jaxtrain.plan.measure import Plan
from jaxtrain.plan.variants import Trial, TrialFn, Variant

MOST = 24  # variants to compile
GAIN = 0.98  # a change that lowers memory by less than this factor is not taken further


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The result of ``find_nearest``.

    Attributes:
      fits: the first variant that fits, or None.
      tried: everything that was compiled, in order.
    """

    fits: Trial | None
    tried: tuple[Trial, ...]

    @property
    def smallest(self) -> Trial | None:
        """The trial that needs least memory; None where nothing could be compiled."""
        known = [(one.plan.total, number) for number, one in enumerate(self.tried) if one.plan]
        return self.tried[min(known)[1]] if known else None


class _FitsError(Exception):
    """Ends the search: the last trial fits."""


def find_nearest(variant: Variant, plan: Plan, limit: int, trial: TrialFn) -> Nearest:
    """Search for a variant that fits, least intrusive changes first.

    The order: microbatches, ``fsdp``, recomputation, all of these together, a smaller batch.

    Args:
      variant: the run that does not fit.
      plan: what it needs.
      limit: bytes on each device.
      trial: compiles a variant.
    """
    search = _Search(limit, trial)
    try:
        _try_changes(variant, plan, search)
    except _FitsError:
        return Nearest(search.tried[-1], tuple(search.tried))
    return Nearest(None, tuple(search.tried))


def _try_changes(variant: Variant, plan: Plan, search: _Search) -> None:
    policies = [name for name in typing.get_args(Remat) if name not in ("none", variant.remat)]
    policies.sort(key=lambda name: name == "nothing_saveable")  # it recomputes most
    search.accumulate(variant, plan)
    data, fsdp, model = variant.mesh
    sharded, sharded_plan = variant, plan
    if data > 1:
        sharded = dataclasses.replace(variant, mesh=(1, data * fsdp, model))
        sharded_plan = search.attempt(sharded) or plan
    for remat in policies if plan.persistent <= search.limit else ():
        search.attempt(dataclasses.replace(variant, remat=remat))
    if sharded_plan.persistent <= search.limit:
        if sharded is not variant:
            search.accumulate(sharded, sharded_plan)
        if variant.remat != "nothing_saveable":
            recomputed = dataclasses.replace(sharded, remat="nothing_saveable")
            recomputed_plan = search.attempt(recomputed)
            if recomputed_plan is not None:
                search.accumulate(recomputed, recomputed_plan)
    _halve_batch(dataclasses.replace(variant, accumulate=1), plan, search)
    best = Nearest(None, tuple(search.tried)).smallest
    if best is not None and best.plan is not None:
        _halve_batch(best.variant, best.plan, search)


def _halve_batch(variant: Variant, plan: Plan, search: _Search) -> None:
    """Halve the batch until it fits, unless the memory that a batch cannot lower exceeds the limit."""
    smaller, before = variant, None
    if plan.persistent - plan.bytes["batch"] - plan.bytes["prefetched_batches"] <= search.limit:
        while smaller.batch % (2 * smaller.parts) == 0:
            micro = smaller.batch // smaller.parts // smaller.accumulate
            parts = smaller.accumulate if micro % 2 == 0 else max(1, smaller.accumulate // 2)
            smaller = dataclasses.replace(smaller, batch=smaller.batch // 2, accumulate=parts)
            found = search.attempt(smaller)
            if found is None or (before is not None and found.total > GAIN * before):
                return
            before = found.total


class _Search:
    """The variants tried so far."""

    def __init__(self, limit: int, trial: TrialFn) -> None:
        self.limit, self.tried = limit, list[Trial]()
        self._trial = trial

    def attempt(self, variant: Variant) -> Plan | None:
        """Return the plan of ``variant``, None where it is impossible; raises _FitsError if it fits."""
        for tried in self.tried:
            if tried.variant == variant:
                return tried.plan
        if len(self.tried) >= MOST:
            return None
        self.tried.append(self._trial(variant))
        plan = self.tried[-1].plan
        if plan is not None and plan.total <= self.limit:
            raise _FitsError
        return plan

    def accumulate(self, variant: Variant, plan: Plan) -> None:
        """Add microbatches until it fits, unless the memory that they cannot lower exceeds the limit."""
        rows = variant.batch // variant.parts // variant.accumulate
        before, factor = None, 1
        for more in range(2, rows + 1):
            if rows % more or more < 2 * factor or plan.persistent > self.limit:
                continue
            factor = more
            found = self.attempt(dataclasses.replace(variant, accumulate=variant.accumulate * more))
            # The first split may need more than none: it adds the sum of the gradients.
            if found is None or (before is not None and found.total > GAIN * before):
                return
            before = found.total
