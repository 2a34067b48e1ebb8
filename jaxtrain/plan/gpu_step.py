"""Everything that a compiled GPU program tells about a step: kernels, attention, and the least time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh

from jaxtrain.models.attention_choices import AttentionChoice
from jaxtrain.plan.collectives import collectives
from jaxtrain.plan.cuda_graphs import CudaGraphs
from jaxtrain.plan.gpu_program import GpuProgram, read_gpu_program
from jaxtrain.plan.overlap import exposed_collectives
from jaxtrain.plan.roofline import GPUS_PER_HOST, LowerBound, lower_bound, peak_name
from jaxtrain.sharding.cards import Card


@dataclasses.dataclass(frozen=True)
class GpuStep:
    """What one GPU does in a step, and how long it takes at least.

    Attributes:
      program: kernels, overlap and CUDA graphs.
      attention: the kernel of each attention layer.
      bound: the least time of a step; None where the FLOPs were not counted.
    """

    program: GpuProgram
    attention: tuple[AttentionChoice, ...] = ()
    bound: LowerBound | None = None


def read_gpu_step(
    hlo: str,
    mesh: Mesh | AbstractMesh,
    card: Card | None,
    flops: float | None,
    precision: str,
    graphs: CudaGraphs | None = None,
    attention: Sequence[AttentionChoice] = (),
    gpus_per_host: int = GPUS_PER_HOST,
) -> GpuStep:
    """Read a train step that was compiled for NVIDIA GPUs.

    Args:
      hlo: ``compiled.as_text()``.
      mesh: the mesh that it was compiled for.
      card: the speed of each device; None gives no lower bound.
      flops: of a step, all devices together; None gives no lower bound.
      precision: of the run: ``float32``, ``bfloat16`` or ``float16``.
      graphs: from ``compile_with_graphs``.
      attention: from ``record_attention``.
      gpus_per_host: devices of a host.
    """
    program = read_gpu_program(hlo, mesh, graphs)
    bound = None
    if flops and card is not None:
        moved, alone = collectives(hlo, mesh), exposed_collectives(program.overlaps)
        sizes, peak = dict(mesh.shape), peak_name(precision)
        bound = lower_bound(flops, program.traffic, moved, alone, sizes, card, peak, gpus_per_host)
    return GpuStep(program, tuple(attention), bound)
