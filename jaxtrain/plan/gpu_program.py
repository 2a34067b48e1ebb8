"""Read what a GPU does in a step from the compiled program: kernels, traffic, overlap.

Nothing here needs a GPU: XLA compiles for one without it. Not in the program: how long a kernel takes, which
of several algorithms a library picks on the card, and the workspaces of cuDNN.
"""

from __future__ import annotations

import dataclasses
import re

from jax.sharding import AbstractMesh, Mesh

from jaxtrain.plan.cuda_graphs import CudaGraphs
from jaxtrain.plan.gpu_kernels import KINDS, Launch, classify, launches, traffic
from jaxtrain.plan.hlo import ARRAY, Hlo, operands, read_hlo
from jaxtrain.plan.overlap import Overlap, read_overlaps

HOST_OPS = ("infeed", "outfeed", "send", "recv")
HOST_TARGETS = r"[^\"]*(?:python|callback|SendToHost|RecvFromHost|MoveToHost|MoveToDevice)[^\"]*"


@dataclasses.dataclass(frozen=True)
class Kernels:
    """All kernels of one kind and name that a step launches.

    Attributes:
      kind: ``matrix product``, ``convolution``, ``attention``, ``sort``, ``scatter``, ``copy`` (moves or
        transposes only), ``fusion`` (all other fusions), ``collective`` or ``other``.
      name: of the library's function, of XLA's kernel, or of the HLO operation that it is about.
      count: launches in a step, on each device.
      bytes: read and written by them: each operand and result once (``gpu_kernels.traffic``).
    """

    kind: str
    name: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class GpuProgram:
    """What one GPU does in one step.

    Attributes:
      kernels: by kind (in the order of ``gpu_kernels.KINDS``), then those with most bytes first.
      overlaps: which collectives run while kernels compute.
      aliased, outputs: number of outputs that reuse the memory of an input, and of all outputs.
      host: operations that wait for the host, and host memory; a train step has none.
      graphs: the CUDA graphs that replace most launches; None where they are unknown.
    """

    kernels: tuple[Kernels, ...]
    overlaps: tuple[Overlap, ...]
    aliased: int
    outputs: int
    host: tuple[str, ...]
    graphs: CudaGraphs | None = None

    @property
    def launches(self) -> int:
        """Kernels and memory copies in a step, those of CUDA graphs included."""
        return sum(one.count for one in self.kernels)

    @property
    def traffic(self) -> int:
        """Bytes that the kernels of a step read and write: each operand and each result once."""
        return sum(one.bytes for one in self.kernels)

    def of_kind(self, kind: str) -> tuple[int, int]:
        """Return count and bytes of all kernels of a kind."""
        chosen = [one for one in self.kernels if one.kind == kind]
        return sum(one.count for one in chosen), sum(one.bytes for one in chosen)


def read_gpu_program(hlo: str, mesh: Mesh | AbstractMesh, graphs: CudaGraphs | None = None) -> GpuProgram:
    """Read a train step that was compiled for NVIDIA GPUs.

    Loops count once per iteration, one of unknown length as one iteration; of a conditional the branch with
    most launches counts. The traffic assumes that each kernel reads each operand once and writes each result
    once. Kernels that read an operand several times move more; what a kernel finds in the L2 cache does not
    come from memory, so for arrays smaller than the cache it is an upper bound of the traffic of the memory.

    Args:
      hlo: ``compiled.as_text()``, scheduled.
      mesh: the mesh that it was compiled for.
      graphs: from ``compile_with_graphs``; the text does not show them.

    Raises:
      InputError: the text is not a compiled program, or one for another number of devices.

    >>> from jax.sharding import AbstractMesh
    >>> text = '''
    ... HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}
    ... ENTRY %main (p: f32[8]) -> f32[8] {
    ...   %p = f32[8]{0} parameter(0)
    ...   ROOT %copy = f32[8]{0} copy(%p)
    ... }'''
    >>> read_gpu_program(text.strip(), AbstractMesh((1,), ("data",))).kernels
    (Kernels(kind='copy', name='copy', count=1, bytes=64),)
    """
    program = read_hlo(hlo, mesh)
    header = hlo.partition("\n")[0]
    results = re.search(r"entry_computation_layout=\{.*?\)->(.*)", header)
    return GpuProgram(
        kernels=_kernels(program),
        overlaps=read_overlaps(program, mesh),
        aliased=len(re.findall(r"(?:may|must)-alias", header)),
        outputs=len(ARRAY.findall(_balanced(results[1]))) if results else 0,
        host=_host(program),
        graphs=graphs,
    )


def _kernels(program: Hlo) -> tuple[Kernels, ...]:
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for launch in launches(program):
        kind, name = classify(launch.op, program)
        if name == "copy" and _changes_layout(launch, program):
            name = "transpose"
        count, size = sums.get((kind, name), (0, 0))
        moved = launch.times * traffic(launch, program)
        sums[kind, name] = count + launch.times, size + moved
    found = [Kernels(kind, name, *total) for (kind, name), total in sums.items()]
    return tuple(sorted(found, key=lambda one: (KINDS.index(one.kind), -one.bytes, one.name)))


def _changes_layout(launch: Launch, program: Hlo) -> bool:
    """Whether a copy stores the dimensions in another order."""
    ops = program.computations[launch.computation]
    shapes = [op.shape for op in ops if op.name in operands(launch.op)]
    layouts = [re.findall(r"\]\{([\d,]*)", shape) for shape in (*shapes, launch.op.shape)]
    return any(layout != layouts[-1] for layout in layouts)


def _host(program: Hlo) -> tuple[str, ...]:
    """Return what waits for the host, or is stored there."""
    found = set[str]()
    for op in (op for ops in program.computations.values() for op in ops):
        if op.opcode.removesuffix("-done") in HOST_OPS:
            found.add(op.opcode.removesuffix("-done"))
        if "S(5)" in op.shape:
            found.add("host memory")
        if target := re.search(f'custom_call_target="({HOST_TARGETS})"', op.rest):
            found.add(target[1])
    return tuple(sorted(found))


def _balanced(text: str) -> str:
    """Return the part of ``text`` before the closing brace of what is open at its start."""
    depth = 0
    for at, char in enumerate(text):
        depth += (char in "({[") - (char in ")}]")
        if depth < 0:
            return text[:at]
    return text
