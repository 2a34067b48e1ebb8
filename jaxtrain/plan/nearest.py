"""For a run that does not fit: the nearest change of its settings with which it does, found by compiling."""

from __future__ import annotations

import dataclasses
import typing

from jaxtrain.models import Remat
from jaxtrain.plan.measure import Plan
from jaxtrain.plan.variants import Trial, Try, Variant

MOST = 24  # variants that are compiled
GAIN = 0.98  # more of what lowered the memory by less than this is not tried


@dataclasses.dataclass(frozen=True)
class Nearest:
    """What came of it.

    Attributes:
      fits: the first that fits, or None.
      tried: everything that was compiled, in that order.
    """

    fits: Trial | None
    tried: tuple[Trial, ...]

    @property
    def smallest(self) -> Trial | None:
        """The one that needs least; None when nothing could be compiled."""
        known = [(one.plan.total, number) for number, one in enumerate(self.tried) if one.plan]
        return self.tried[min(known)[1]] if known else None


class _Found(Exception):
    """Ends the search."""


def find_nearest(variant: Variant, plan: Plan, limit: int, trial: Try) -> Nearest:
    """Try what changes a run least first: microbatches, ``fsdp``, recomputation, all of it, a smaller batch.

    Args:
      variant: what does not fit.
      plan: what it needs.
      limit: bytes on each device.
      trial: compiles a variant.
    """
    search = _Search(limit, trial)
    try:
        _stages(variant, plan, search)
    except _Found:
        return Nearest(search.tried[-1], tuple(search.tried))
    return Nearest(None, tuple(search.tried))


def _stages(variant: Variant, plan: Plan, search: _Search) -> None:
    policies = [name for name in typing.get_args(Remat) if name not in ("none", variant.remat)]
    policies.sort(key=lambda name: name == "nothing_saveable")  # it computes most again
    search.accumulate(variant, plan)
    data, fsdp, model = variant.mesh
    split, split_plan = variant, plan
    if data > 1:
        split = dataclasses.replace(variant, mesh=(1, data * fsdp, model))
        split_plan = search.one(split) or plan
    for remat in policies if plan.kept <= search.limit else ():
        search.one(dataclasses.replace(variant, remat=remat))
    if split_plan.kept <= search.limit:
        if split is not variant:
            search.accumulate(split, split_plan)
        if variant.remat != "nothing_saveable":
            again = dataclasses.replace(split, remat="nothing_saveable")
            again_plan = search.one(again)
            if again_plan is not None:
                search.accumulate(again, again_plan)
    _halve(dataclasses.replace(variant, accumulate=1), plan, search)
    best = Nearest(None, tuple(search.tried)).smallest
    if best is not None and best.plan is not None:
        _halve(best.variant, best.plan, search)


def _halve(variant: Variant, plan: Plan, search: _Search) -> None:
    """Smaller and smaller batches, unless what they cannot lower is too much already."""
    smaller, before = variant, None
    if plan.kept - plan.bytes["batch"] - plan.bytes["batches_ahead"] <= search.limit:
        while smaller.batch % (2 * smaller.parts) == 0:
            micro = smaller.batch // smaller.parts // smaller.accumulate
            parts = smaller.accumulate if micro % 2 == 0 else max(1, smaller.accumulate // 2)
            smaller = dataclasses.replace(smaller, batch=smaller.batch // 2, accumulate=parts)
            found = search.one(smaller)
            if found is None or (before is not None and found.total > GAIN * before):
                return
            before = found.total


class _Search:
    """What has been tried so far."""

    def __init__(self, limit: int, trial: Try) -> None:
        self.limit, self.tried = limit, list[Trial]()
        self._trial = trial

    def one(self, variant: Variant) -> Plan | None:
        """Its plan, None where it is not possible; raises _Found if it fits."""
        for tried in self.tried:
            if tried.variant == variant:
                return tried.plan
        if len(self.tried) >= MOST:
            return None
        self.tried.append(self._trial(variant))
        plan = self.tried[-1].plan
        if plan is not None and plan.total <= self.limit:
            raise _Found
        return plan

    def accumulate(self, variant: Variant, plan: Plan) -> None:
        """More and more microbatches, unless what they cannot lower is too much already."""
        rows = variant.batch // variant.parts // variant.accumulate
        before, factor = None, 1
        for more in range(2, rows + 1):
            if rows % more or more < 2 * factor or plan.kept > self.limit:
                continue
            factor = more
            found = self.one(dataclasses.replace(variant, accumulate=variant.accumulate * more))
            # The first may need more than none: the sum of the gradients comes on top.
            if found is None or (before is not None and found.total > GAIN * before):
                return
            before = found.total
