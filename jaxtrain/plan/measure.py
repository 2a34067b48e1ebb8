"""Measure a program by compiling it: memory, FLOPs and communication."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line
from jaxtrain.data import Arrays, Source, Subset, holdout
from jaxtrain.data.checked import CheckedSource
from jaxtrain.experiment import Experiment
from jaxtrain.plan.collectives import Collective, collectives
from jaxtrain.plan.cuda_graphs import CudaGraphs, compile_with_graphs
from jaxtrain.plan.gpu_step import GpuStep, read_gpu_step
from jaxtrain.plan.mesh_warnings import mesh_warnings
from jaxtrain.program import Program, splits
from jaxtrain.program.device_limits import Limit
from jaxtrain.program.memory import DeviceArray, abstract_batch, bytes_stored, device_arrays, mesh_of
from jaxtrain.program.throughput import update_flops
from jaxtrain.sharding import described
from jaxtrain.sharding.cards import Card

LARGEST = 10
WORKSPACE = 4 * 2**30
"""Bytes that XLA lets one call of cuDNN use beside the program's own memory: the limit of its
``RedzoneAllocator``, with which it times cuDNN's algorithms on the GPU. It is not part of ``temporaries``."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
      mesh: size by axis.
      platform: the platform it was compiled for: ``cpu``, ``gpu``.
      batch, accumulate, remat, precision: as in the experiment.
      resident: the splits whose data is resident on each device.
      parameters: the number of parameters.
      bytes: on each device, by part. Exact: ``params``, ``optimizer``, ``other_state`` (step, statistics,
        averages), ``batch``, ``prefetched_batches`` (sent while earlier steps are computed) and resident
        ``data``.
        XLA's figures for the compiled step: ``temporaries``, and ``outputs`` that do not reuse the state's
        memory.
      flops: of an update, all devices together, by the model's formula where it has one; None if not counted.
      collectives: what the devices send each other in an update.
      largest: the arrays that take most memory of a device.
      notes: warnings printed before training, one per line.
      card: the GPU that it was compiled for without one; None on real or simulated devices.
      cudnn_calls: calls of cuDNN in the step. The workspace of each, up to ``WORKSPACE``, is known on the GPU
        only and is not in ``bytes``; one is in use at a time.
      gpu: what the compiled GPU program consists of; None where it was compiled for something else, or FLOPs
        were not counted.
    """

    mesh: dict[str, int]
    platform: str
    batch: int
    accumulate: int
    remat: str
    precision: str
    resident: tuple[str, ...]
    parameters: int
    bytes: dict[str, int]
    flops: float | None
    collectives: tuple[Collective, ...]
    largest: tuple[DeviceArray, ...]
    notes: tuple[str, ...]
    card: Card | None = None
    cudnn_calls: int = 0
    gpu: GpuStep | None = None

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return sum(self.bytes.values())

    @property
    def persistent(self) -> int:
        """Bytes that stay allocated between steps: neither microbatches nor recomputation lower them."""
        return self.total - self.bytes["temporaries"] - self.bytes["outputs"]


def measure(program: Program, resident: Mapping[str, bool] | None = None, *, count: bool = True) -> Plan:
    """Compile the train step of ``program`` and read what it needs; nothing is computed.

    Args:
      program: from ``jaxtrain.program.assemble``, on devices that may be simulated.
      resident: whether each split is resident on devices (``for_device_memory``); None: as in ``program``.
      count: also count FLOPs, which may trace and lower the step once more.

    Raises:
      InputError: the step calls Python, and its devices are described (``plan --for``).
      RunError: XLA cannot compile the step, or reports no memory for this platform.
    """
    exp, mesh = program.experiment, mesh_of(program)
    arrays = device_arrays(program, resident)
    sizes = {part: sum(one.bytes for one in group) for part, group in arrays.items()}
    compiled, graphs, compile_notes = _compile(program, mesh)
    stats = compiled.memory_analysis()
    if stats is None:
        raise RunError(
            f"XLA reports no memory figures on {mesh.devices.flat[0].device_kind}: plan on the CPU"
        )
    sizes["temporaries"] = int(stats.temp_size_in_bytes)
    sizes["outputs"] = max(0, int(stats.output_size_in_bytes - stats.alias_size_in_bytes))
    sizes["prefetched_batches"] = exp.max_in_flight * sizes["batch"]
    text = compiled.as_text()
    everything = sorted((one for group in arrays.values() for one in group), key=lambda one: -one.bytes)
    moved, flops = collectives(text, mesh), update_flops(program) if count else None
    card, mesh_shape, per_host = described.card_of(mesh), dict(mesh.shape), _devices_per_host(mesh)
    gpu = None
    if count and mesh.devices.flat[0].platform == "gpu":
        gpu = read_gpu_step(
            text, mesh, card, flops, exp.precision, graphs, program.attention, gpus_per_host=per_host
        )
    warnings = mesh_warnings(moved, flops, mesh_shape, exp.precision, card, per_host)
    return Plan(
        mesh=mesh_shape,
        platform=mesh.devices.flat[0].platform,
        batch=exp.batch,
        accumulate=exp.accumulate,
        remat=exp.remat,
        precision=exp.precision,
        resident=tuple(name for name in ("train", "valid", "test") if name in _splits(arrays["data"])),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params)),
        bytes={part: sizes[part] for part in PARTS},
        flops=flops,
        collectives=moved,
        largest=tuple(everything[:LARGEST]),
        notes=(*program.notes, *_notes(exp), *compile_notes, *warnings),
        card=card,
        cudnn_calls=text.count('custom_call_target="__cudnn$'),
        gpu=gpu,
    )


PARTS = (
    "params",
    "optimizer",
    "other_state",
    "batch",
    "prefetched_batches",
    "data",
    "temporaries",
    "outputs",
)


def for_device_memory(
    experiment: Experiment, limit: Limit | None
) -> tuple[Experiment, dict[str, bool] | None]:
    """Resolve ``placement="auto"`` for devices of another memory than those of this machine.

    Args:
      experiment: the run to plan.
      limit: the memory of a device; None decides by the devices of this machine.

    Returns:
      The experiment with its placement, and by split whether it is resident; None where nothing changed.
    """
    if experiment.placement != "auto" or limit is None:
        return experiment, None
    try:
        resident = {name: _is_resident(source, limit) for name, source in _sources(experiment).items()}
    except Exception:  # a user's own source; opening it reports the error
        return experiment, None
    return dataclasses.replace(experiment, placement="device" if resident["train"] else "stream"), resident


def with_open_data(experiment: Experiment, mesh: Mesh) -> Experiment:
    """Open the data of ``experiment`` once, for several plans of it."""
    opened = splits.open_sources(experiment, mesh)
    sources = {n: s.source if isinstance(s, CheckedSource) else s for n, s in opened.items()}
    return dataclasses.replace(
        experiment, train=sources["train"], test=sources["test"], valid=sources.get("valid"), holdout=0
    )


def _is_resident(source: Source, limit: Limit) -> bool:
    """Decide as ``program.splits`` does."""
    if hasattr(source, "draw"):
        return False
    return (
        isinstance(source, Arrays) or bytes_stored(source, len(source)) <= limit.bytes // splits.RESIDENT_PART
    )


def _sources(exp: Experiment) -> dict[str, Source]:
    named: dict[str, Source | None] = {"train": exp.train, "test": exp.test, "valid": exp.valid}
    if exp.holdout:
        train, valid = holdout(len(exp.train), exp.holdout)
        named |= {"train": Subset(exp.train, train), "valid": Subset(exp.train, valid)}
    return {name: source for name, source in named.items() if source is not None}


def _compile(program: Program, mesh: Mesh) -> tuple[Any, CudaGraphs | None, tuple[str, ...]]:
    """Compile the step as a run does; on a CPU without LLVM's optimizations, which change no figure.

    Also returns the CUDA graphs of a program for described GPUs, and notes.
    """
    card = described.card_of(mesh)
    try:
        lowered = program.train_step.lower(  # type: ignore[attr-defined]
            program.abstract_state, abstract_batch(program), program.key
        )
    except RuntimeError as error:
        if card is None or "backend" not in str(error):
            raise
        raise InputError(  # JAX asks the client of the GPU, which is not here, to hold the function
            "the train step calls Python (jax.debug.print, jax.debug.callback, jax.pure_callback or "
            f"io_callback), which cannot be compiled for {card.name} on a machine without one: leave the "
            "call out to plan"
        ) from error
    try:
        if card is not None:
            return _compile_for_card(lowered)
        cpu = mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": "0"} if cpu else None
        return lowered.compile(compiler_options=options), None, ()
    except jax.errors.JaxRuntimeError as error:
        why = first_line(error)[:300] if card is None else described.why_not_compiled(error, card)
        raise RunError(f"XLA cannot compile the train step: {why} (--debug shows where)") from error


def _compile_for_card(lowered: Any) -> tuple[Any, CudaGraphs | None, tuple[str, ...]]:
    """Compile for a GPU that is not here, and so without autotuning."""
    with described.without_compilation_cache():
        try:
            return *compile_with_graphs(lowered), ()
        except jax.errors.JaxRuntimeError as error:
            if "tile sizes" not in str(error):
                raise
        compiled, graphs = compile_with_graphs(lowered, {"xla_gpu_enable_triton_gemm": False})
    return compiled, graphs, ("matrix products are cuBLAS's: XLA finds no tiles for Triton without a GPU",)


def _devices_per_host(mesh: Mesh) -> int:
    return max(collections.Counter(device.process_index for device in mesh.devices.flat).values())


def _splits(arrays: list[DeviceArray]) -> set[str]:
    return {one.path.split("/")[1] for one in arrays}


def _notes(exp: Experiment) -> tuple[str, ...]:
    if (exp.eval_batch or exp.batch) <= exp.batch:
        return ()
    return (f"evaluation uses larger batches ({exp.eval_batch}) than training; their memory is not planned",)
