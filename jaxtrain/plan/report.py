"""Format plans as text, at most ``WIDTH`` columns wide, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtrain import sharding
from jaxtrain.core.text import size_text
from jaxtrain.plan import gpu_report
from jaxtrain.plan.measure import WORKSPACE, Plan
from jaxtrain.plan.nearest import Nearest
from jaxtrain.plan.search import SearchResult
from jaxtrain.plan.variants import Trial, Variant
from jaxtrain.program.device_limits import Limit
from jaxtrain.program.memory import DeviceArray
from jaxtrain.program.memory_text import memory_text, table


def as_text(plan: Plan) -> str:
    """Format memory per device, FLOPs, communication and the largest arrays."""
    blocks = [
        memory_text(plan.bytes, _remarks(plan)),
        _compute(plan),
        _communication(plan),
        *([] if plan.gpu is None else [gpu_report.as_text(plan.gpu)]),
        _largest(plan.largest),
    ]
    return "\n\n".join(blocks)


def _largest(arrays: Sequence[DeviceArray]) -> str:
    """Format the largest arrays, one per line."""
    rows = [("array", "shape", "sharding", "per device")]
    rows += [
        (one.path, one.array, one.sharding or "replicated", size_text(one.bytes))
        for one in arrays
        if one.bytes
    ]
    return table("largest arrays", rows, "<<<>")


def verdict_text(plan: Plan, limit: Limit | None) -> str:
    """State whether the run fits."""
    if limit is None:
        return (
            "verdict: none, because a CPU device has no memory limit; give one, such as --device-memory 80GB"
        )
    fits = plan.total <= limit.bytes
    line = (
        f"verdict: {'fits' if fits else 'DOES NOT FIT'}: {size_text(plan.total)} of {size_text(limit.bytes)}"
    )
    lines = [f"{line} ({100 * plan.total / limit.bytes:.0f} %) on each device", f"  limit: {limit.text}"]
    return "\n".join(lines + _workspace_lines(plan, limit))


def _workspace_lines(plan: Plan, limit: Limit) -> list[str]:
    """Compare what is left with the workspace of cuDNN that only the GPU knows."""
    left = limit.bytes - plan.total
    if plan.card is None or not plan.cudnn_calls or left < 0:
        return []
    line = f"not in it is a workspace of cuDNN, at most {size_text(WORKSPACE)}; {size_text(left)} are left"
    return [f"  UNCERTAIN: {line}" if _is_uncertain(plan, limit) else f"  {line}"]


def _is_uncertain(plan: Plan, limit: Limit) -> bool:
    """Whether the plan fits, but perhaps not together with a workspace of cuDNN."""
    return plan.card is not None and plan.cudnn_calls > 0 and 0 <= limit.bytes - plan.total < WORKSPACE


def _fits_text(plan: Plan, limit: Limit | None) -> str:
    if limit is None:
        return ""
    return "no" if plan.total > limit.bytes else "uncertain" if _is_uncertain(plan, limit) else "yes"


def _fits_json(plan: Plan, limit: Limit | None) -> dict[str, bool | None]:
    if limit is None:
        return {"fits": None, "uncertain": None}
    return {"fits": plan.total <= limit.bytes, "uncertain": _is_uncertain(plan, limit)}


def nearest_text(nearest: Nearest, given: Variant) -> str:
    """Format the change that fits, or that none does, and what was tried."""
    if nearest.fits is not None and nearest.fits.plan is not None:
        flags = " ".join(nearest.fits.variant.flags(given))
        lines = [f"fits with {flags}: {size_text(nearest.fits.plan.total)}"]
        lines += [f"  {note}" for note in nearest.fits.plan.notes]
    elif nearest.smallest is not None and nearest.smallest.plan is not None:
        flags = " ".join(nearest.smallest.variant.flags(given))
        lines = [
            f"no change that was tried fits; least memory with {flags}: "
            f"{size_text(nearest.smallest.plan.total)}",
            "  use more devices, a smaller model or a shorter context",
        ]
    else:
        lines = [
            "nothing else was tried: parameters, optimizer state and data alone exceed the limit",
            "  use more devices with fsdp, a smaller model, or --set placement=stream",
        ]
    rows = [(" ".join(one.variant.flags(given)), _total(one)) for one in nearest.tried]
    return "\n".join(lines) + ("\n\n" + table("tried", rows, "<>") if len(rows) > 1 else "")


def search_text(searched: SearchResult, limit: Limit | None) -> str:
    """Format one line per variant, and one per impossible mesh."""
    rows = [("mesh", "batch", "remat", "fits", "total", "temporaries", "communicated")]
    for one in searched.found:
        plan = one.plan
        assert plan is not None
        moved = sum(each.bytes for each in plan.collectives)
        memory = (size_text(plan.total), size_text(plan.bytes["temporaries"]), size_text(moved))
        rows.append((one.variant.mesh_text, f"{plan.batch:,}", plan.remat, _fits_text(plan, limit), *memory))
    blocks = [table("variants: memory on each device, and bytes communicated per step", rows, "<><<>>>")]
    if searched.impossible:
        reasons = dict.fromkeys((one.variant.mesh_text, one.reason) for one in searched.impossible)
        blocks.append(table("impossible", list(reasons), "<<"))
    if searched.left_out:
        blocks.append(
            f"{searched.left_out} more variants were not compiled; plan them with --mesh and --set batch"
        )
    return "\n\n".join(blocks)


def as_json(plan: Plan, limit: Limit | None) -> dict[str, Any]:
    """Return the plan as JSON."""
    return {
        "mesh": plan.mesh,
        "compiled_for": plan.platform,
        "batch": plan.batch,
        "accumulate": plan.accumulate,
        "remat": plan.remat,
        "precision": plan.precision,
        "parameters": plan.parameters,
        "resident": list(plan.resident),
        "bytes_per_device": {**plan.bytes, "total": plan.total},
        "flops": None if plan.flops is None else {"step": plan.flops, "example": plan.flops / plan.batch},
        "collectives": [dataclasses.asdict(one) for one in plan.collectives],
        "cudnn": None
        if plan.card is None
        else {"calls": plan.cudnn_calls, "workspace_at_most": WORKSPACE if plan.cudnn_calls else 0},
        "gpu": None if plan.gpu is None else gpu_report.as_json(plan.gpu),
        "largest": [dataclasses.asdict(one) for one in plan.largest],
        "limit": None if limit is None else dataclasses.asdict(limit),
        **_fits_json(plan, limit),
        "notes": list(plan.notes),
    }


def nearest_json(nearest: Nearest, given: Variant) -> dict[str, Any]:
    """Return the change that fits (null if none does), the smallest, and everything that was tried."""
    return {
        "change": None if nearest.fits is None else _tried_json(nearest.fits, given),
        "smallest": None if nearest.smallest is None else _tried_json(nearest.smallest, given),
        "tried": [_tried_json(one, given) for one in nearest.tried],
    }


def search_json(searched: SearchResult, given: Variant, limit: Limit | None) -> dict[str, Any]:
    """Return the variants found, the impossible ones, and how many were not compiled."""
    found = [
        _tried_json(one, given) | ({} if limit is None else _fits_json(one.plan, limit))
        for one in searched.found
        if one.plan
    ]
    impossible = [_tried_json(one, given) for one in searched.impossible]
    return {"search": {"found": found, "impossible": impossible, "left_out": searched.left_out}}


def _remarks(plan: Plan) -> dict[str, str]:
    figure = "XLA's figure for the compiled step"
    if plan.card is not None and plan.cudnn_calls:
        figure = f"a lower bound: without the workspace of {plan.cudnn_calls} cuDNN calls"
    if plan.platform == "cpu":
        figure = "XLA's figure, compiled for CPU: a GPU's will differ"
    return {
        "data": ", ".join(plan.resident),
        "other_state": "step, statistics, averages",
        "temporaries": figure,
        "outputs": "results that do not reuse the state's memory",
    }


def _compute(plan: Plan) -> str:
    rows = [("parameters", f"{plan.parameters:,}", "")]
    if plan.flops is not None:
        rows.append(("per step", _flops(plan.flops), "all devices together, without recomputation"))
        rows.append(("per example", _flops(plan.flops / plan.batch), ""))
    return table("compute", rows, "<><")


def _communication(plan: Plan) -> str:
    if not plan.collectives:
        return "communication between devices per step\n  none"
    rows = [("collective", "mesh axes", "bytes", "count")]
    rows += [
        (one.kind, "+".join(one.axes), size_text(one.bytes), f"{one.count:,}") for one in plan.collectives
    ]
    return table("communication between devices per step", rows, "<<>>")


def _total(one: Trial) -> str:
    return size_text(one.plan.total) if one.plan else f"impossible: {one.reason}"


def _flops(count: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:,.2f} {unit}FLOP"
    return f"{count:,.0f} FLOP"


def _tried_json(one: Trial, given: Variant) -> dict[str, Any]:
    mesh = dict(zip(sharding.AXES, one.variant.mesh, strict=True))
    what = dataclasses.asdict(one.variant) | {"mesh": mesh, "flags": list(one.variant.flags(given))}
    if one.plan is None:
        return what | {"reason": one.reason}
    return what | {"total": one.plan.total, "bytes_per_device": one.plan.bytes}
