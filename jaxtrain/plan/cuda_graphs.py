"""Count the CUDA graphs of a compiled program.

XLA captures runs of kernels into CUDA graphs after it has scheduled the program, so ``compiled.as_text()``
does not show them. They are in a file that XLA writes when it is asked to dump; that file is read here.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxtrain.plan.gpu_kernels import Loop, loops
from jaxtrain.plan.hlo import read_hlo

STEP = re.compile(r"( *)\d+: (k\w+)")
NOT_LAUNCHED = (
    *("kCommandBuffer", "kAsyncStart", "kAsyncDone", "kSequential", "kWhile", "kConditional"),
    "kDynamicSliceFusion",  # of the kernel or copy in it
)


@dataclasses.dataclass(frozen=True)
class CudaGraphs:
    """What the host launches in a step, in a loop once per iteration.

    Attributes:
      count: launches of CUDA graphs.
      inside: kernels and copies in those graphs.
      outside: kernels, copies and collectives that the host launches one by one.
    """

    count: int
    inside: int
    outside: int

    @property
    def host_launches(self) -> int:
        """Launches by the host: each graph is one."""
        return self.count + self.outside


def compile_with_graphs(
    lowered: jax.stages.Lowered, options: dict[str, Any] | None = None
) -> tuple[jax.stages.Compiled, CudaGraphs | None]:
    """Compile for a GPU, and count the CUDA graphs of the program.

    Args:
      lowered: of a jitted function.
      options: XLA's compiler options.

    Returns:
      The compiled program, and its graphs; None where XLA dumped none: on a CPU, and where the program came
      from a cache.
    """
    with tempfile.TemporaryDirectory(prefix="jaxtrain-plan-") as folder:
        dump: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options={**(options or {}), **dump})
        # XLA writes the second list only where it captured something.
        lists = ("*.thunk_sequence_after_thunk_passes.txt", "*.thunk_sequence.txt")
        texts = next(filter(None, ([file.read_text() for file in Path(folder).glob(n)] for n in lists)), [])
    if not texts:
        return compiled, None
    thunks = max(texts, key=len)
    return compiled, read_graphs(
        thunks, loops(read_hlo(compiled.as_text() or "")) if "kWhile" in thunks else ()
    )


def read_graphs(thunks: str, loops: Iterable[Loop] = ()) -> CudaGraphs:
    """Read XLA's list of thunks, in which a command buffer is a CUDA graph.

    Args:
      thunks: the list.
      loops: of the program, in its order (``gpu_kernels.loops``); the list has no trip counts.

    >>> read_graphs('''
    ... 000: kCommandBuffer [source | next=003 (1)]
    ...     001: kCustomKernel [source | next=002 (1)] fusion_1
    ...     002: kCopy [prev=001 (1) | sink] kCopy
    ... 003: kConvolution [prev=000 (1) | sink] kConvolution''')
    CudaGraphs(count=1, inside=2, outside=1)
    """
    count = inside = outside = 0
    graph: int | None = None  # the indentation of the graph that the line may be in
    around, rest = list[tuple[int, Loop]](), iter(loops)  # loops that the line is in, with their indentation
    in_condition = False
    for line in thunks.splitlines():
        step = STEP.match(line)
        if not step:
            in_condition = line.strip() == "condition:"
            continue
        depth, kind = len(step[1]), step[2]
        if graph is not None and depth <= graph:
            graph = None
        while around and depth <= around[-1][0]:
            around.pop()
        times = math.prod(loop.trips for _, loop in around)
        if in_condition and around and not around[-1][1].tests:
            continue
        if kind == "kWhile":
            around.append((depth, next(rest, Loop(1, tests=True))))
        elif kind == "kCommandBuffer" and graph is None:
            count, graph = count + times, depth
        elif kind not in NOT_LAUNCHED:
            inside += times * (graph is not None)
            outside += times * (graph is None)
    return CudaGraphs(count, inside, outside)
