"""Format what a GPU does in a step as text, at most ``WIDTH`` columns wide, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtrain.core.text import size_text
from jaxtrain.models.attention_choices import AttentionChoice
from jaxtrain.plan.gpu_program import GpuProgram
from jaxtrain.plan.gpu_step import GpuStep
from jaxtrain.plan.overlap import Overlap
from jaxtrain.plan.roofline import LowerBound
from jaxtrain.program.memory_text import table


def as_text(step: GpuStep) -> str:
    """Format kernels, launches, overlap, attention that is not cuDNN's, and the lower bound of a step."""
    program = step.program
    blocks = [_kernels(program), _launches(program)]
    if program.overlaps:
        blocks.append(_overlaps(program.overlaps))
    if any(one.kernel == "xla" for one in step.attention):
        blocks.append(_fallbacks(step.attention))
    if step.bound is not None:
        blocks.append(_bound(step.bound))
    return "\n\n".join(blocks)


def as_json(step: GpuStep) -> dict[str, Any]:
    """Return the same as JSON, in bytes and seconds."""
    program, bound = step.program, step.bound
    graphs = program.graphs
    more = {} if graphs is None else {"host_launches": graphs.host_launches}
    limits = {} if bound is None else {"seconds": bound.seconds, "limit": bound.limit, "mfu": bound.mfu}
    return {
        "launches": program.launches,
        "traffic": program.traffic,
        "kernels": [dataclasses.asdict(one) for one in program.kernels],
        "cuda_graphs": None if graphs is None else dataclasses.asdict(graphs) | more,
        "overlap": [dataclasses.asdict(one) | {"axes": list(one.axes)} for one in program.overlaps],
        "aliased": program.aliased,
        "outputs": program.outputs,
        "host": list(program.host),
        "attention": [dataclasses.asdict(one) | {"shape": list(one.shape)} for one in step.attention],
        "lower_bound": None if bound is None else dataclasses.asdict(bound) | limits,
    }


def _kernels(program: GpuProgram) -> str:
    rows = [("kind", "name", "launches", "read and written")]
    rows += [(one.kind, one.name, f"{one.count:,}", size_text(one.bytes)) for one in program.kernels]
    rows.append(("total", "", f"{program.launches:,}", size_text(program.traffic)))
    return table("GPU program: kernels of a step on each device", rows, "<<>>")


def _launches(program: GpuProgram) -> str:
    rows = []
    if graphs := program.graphs:
        rows.append(("CUDA graphs", f"{graphs.count:,}", f"with {graphs.inside:,} kernels and copies"))
        rows.append(("launches by the host", f"{graphs.host_launches:,}", "each graph is one"))
    rows.append(
        ("outputs that reuse an input", f"{program.aliased:,}", f"of {program.outputs:,} outputs of the step")
    )
    rows.append(("waits for the host", f"{len(program.host):,}", ", ".join(program.host)))
    return table("launches", rows, "<><")


def _overlaps(overlaps: Sequence[Overlap]) -> str:
    rows = [("collective", "mesh axes", "count", "bytes", "overlapped", "by products")]
    for one in overlaps:
        some = f"{one.overlapped:,} ({size_text(one.overlapped_bytes)})"
        large = f"{one.behind_products:,} ({size_text(one.behind_products_bytes)})"
        rows.append((one.kind, "+".join(one.axes), f"{one.count:,}", size_text(one.bytes), some, large))
    return table("overlap: collectives that run while kernels compute", rows, "<<>>>>")


def _fallbacks(choices: Sequence[AttentionChoice]) -> str:
    """Format the layers whose attention XLA computes, those with the same reason on one line."""
    layers: dict[tuple[str, str], list[str]] = {}
    for one in choices:
        if one.kernel == "xla":
            shape = f"{one.dtype}[{','.join(map(str, one.shape))}]"
            layers.setdefault((shape, one.reason), []).append(one.layer or "model")
    rows = [("layers", "queries", "why not cuDNN's kernel")]
    for (shape, reason), names in layers.items():
        where = names[0] if len(names) == 1 else f"{len(names)}: {names[0]} to {names[-1]}"
        rows.append((where, shape, reason))
    return table("attention with XLA's kernel", rows, "<<<")


def _bound(bound: LowerBound) -> str:
    rows = [("computation", _duration(bound.compute), f"at {bound.peak / 1e12:,.4g} TFLOP/s")]
    if bound.memory is not None:
        rows.append(("memory", _duration(bound.memory), "all reads and writes, as if without an L2 cache"))
    if bound.communication:
        alone = f"of which {_duration(bound.exposed)} without overlap"
        rows.append(("communication", _duration(bound.communication), alone))
    mfu = f"limited by {bound.limit}; MFU at most {100 * bound.mfu:.0f} %"
    rows.append(("step, at least", _duration(bound.seconds), mfu))
    return table("lower bound of a step, from datasheet speeds: not measured", rows, "<><")


def _duration(seconds: float) -> str:
    """Write a time with three digits.

    >>> _duration(0.0123456), _duration(1.5), _duration(2e-6), _duration(0)
    ('12.3 ms', '1.5 s', '2 µs', '0 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:,.3g} {unit}" if seconds < 999.5 else f"{seconds:,.0f} s"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"
