"""Compiler options of XLA, by the platform that a step is compiled for."""

from __future__ import annotations

from jax.sharding import AbstractMesh, Mesh

KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""For CPUs. There XLA removes optimization barriers before it plans memory, then merges what should be
recomputed or gathered again with the first computation, and keeps that in memory."""

BUCKETS = 8
SMALLEST_BUCKET, LARGEST_BUCKET = 2**20, 25 * 2**20  # bytes
"""Those of ``DistributedDataParallel`` in PyTorch: a first bucket of 1 MiB, and ``bucket_cap_mb=25``."""


def combine_thresholds(mesh: Mesh | AbstractMesh, bytes_of_params: int) -> dict[str, str]:
    """Return options for GPUs that gather parameters and sum gradients in buckets of several arrays.

    By default XLA combines collectives up to 30 MB. A model that small then has one gradient all-reduce after
    the entire backward pass and, with FSDP, one all-gather before the first layer. In buckets the collectives
    of one layer overlap with the computation of another (``docs/decisions/collective-buckets.md``).

    Args:
      mesh: its axes and sizes. One device communicates nothing and needs no option.
      bytes_of_params: all parameters of the model.

    >>> mesh = AbstractMesh((2, 4, 1), ("data", "fsdp", "model"))
    >>> combine_thresholds(mesh, 80 * 2**20)["xla_gpu_all_reduce_combine_threshold_bytes"]
    '10485760'
    """
    if mesh.size == 1:
        return {}
    bucket = min(max(bytes_of_params // BUCKETS, SMALLEST_BUCKET), LARGEST_BUCKET)
    sizes = {
        "all_gather": bucket,
        "all_reduce": bucket,
        "reduce_scatter": bucket // mesh.shape["fsdp"],  # XLA counts the result, one device's part
    }
    return {f"xla_gpu_{kind}_combine_threshold_bytes": str(size) for kind, size in sizes.items()}
