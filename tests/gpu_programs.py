"""Train steps compiled for NVIDIA GPUs on a machine without one, and what tests look for in the programs.

They show the operations, their dtypes and the collectives, neither time nor results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax
import pytest

from jaxtrain import sharding
from jaxtrain.losses import CrossEntropy
from jaxtrain.models import as_model, compute_in
from jaxtrain.plan.gpu_kernels import PRODUCT, classify, launches
from jaxtrain.plan.hlo import Op, called, operands, read_hlo
from jaxtrain.sharding import cards, described
from jaxtrain.step import make_init, make_train_step

needs_compiler = pytest.mark.skipif(
    described.compiler_problem() is not None,
    reason="needs the extra gpu-compile: pip install 'jaxtrain[gpu-compile]'",
)
HOST = (
    "xla_ffi_python",
    "xla_python_gpu_callback",
    "SendToHost",
    "RecvFromHost",
    "infeed",
    "outfeed",
    "S(5)",
)
"""What the text of a program that waits for the host, or stores arrays there, contains."""


def h100(count: int = 1) -> list[jax.Device]:
    """Return ``count`` H100s of one host, to compile for."""
    return described.described_devices(cards.load_card("h100"), per_host=count)


def compile_step(model: Any, batch: Any, mesh: str = "data=1", **settings: Any) -> str:
    """Return XLA's program of a bfloat16 train step for the H100s of ``mesh``, such as ``data=2,fsdp=4``.

    Args:
      model: a Linen module.
      batch: one global batch, arrays or shapes.
      mesh: sizes of the mesh axes; their product is the number of devices.
      **settings: of ``make_train_step``.
    """
    count = 1
    for size in re.findall(r"\d+", mesh):
        count *= int(size)
    devices = sharding.make_mesh(h100(count), sharding.parse_mesh(mesh, count))
    pair, tx = as_model(model), optax.adam(1e-3)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(make_init(pair, tx), key, batch)
    placed = sharding.place(shapes, devices, pair.axes(batch) if pair.axes else {}, ()).shardings
    gathered = sharding.gather_params(pair, placed.params)
    step = make_train_step(compute_in(gathered, "bfloat16"), CrossEntropy(), tx, guard="stop", **settings)
    rows, copies = sharding.batch_split(devices), sharding.replicated(devices)
    jitted = jax.jit(step, in_shardings=(placed, rows, copies), out_shardings=(placed, copies))
    with described.without_compilation_cache():
        return jitted.lower(shapes, batch, key).compile().as_text()


def half_reductions(text: str) -> list[str]:
    """Return the reductions of an XLA program that add numbers in bfloat16 or float16.

    >>> half_reductions("%r = bf16[8]{0} reduce(%x, %zero), dimensions={0}, to_apply=%add.1")
    ['bf16[8] reduce to_apply=%add.1']
    """
    pattern = r"= ((?:bf16|f16)\[[\d,]*\])\S* (reduce|scatter)\(.*?(to_apply=%?[\w.-]+)"
    found = [" ".join(match) for match in re.findall(pattern, text)]
    return [each for each in found if _adds(text, each.split("to_apply=")[1].lstrip("%"))]


def collective_dtypes(text: str, kind: str) -> Mapping[str, int]:
    """Return the number of elements by dtype that the collectives of ``kind`` put out.

    >>> dict(collective_dtypes("%r = (f32[3]{0}, bf16[2,2]{1,0}) all-reduce(%x, %y)", "all-reduce"))
    {'f32': 3, 'bf16': 4}
    """
    totals: dict[str, int] = {}
    for shape in re.findall(rf"= (.*?) {kind}(?:-start)?\(", text):
        for dtype, sizes in re.findall(r"\b([a-z]\w+)\[([\d,]*)\]", shape):
            count = 1
            for size in filter(None, sizes.split(",")):
                count *= int(size)
            totals[dtype] = totals.get(dtype, 0) + count
    return totals


def layout_swaps(text: str, state: Iterable[tuple[int, ...]]) -> list[str]:
    """Return the kernels that write an activation with its dimensions in another order in memory.

    XLA adds them around convolutions and attention whose operands it wants in another layout. What a matrix
    product reads in another order is left out: it costs no pass over memory.

    Args:
      text: of a GPU program.
      state: shapes of the state's arrays, of all devices together and of one. An array whose sizes are those
        of one of them, in any order, counts as a parameter, and every other one as an activation.

    >>> program = '''
    ... ENTRY %main (p: bf16[8,4,4,3], w: bf16[3,3,16,32]) -> bf16[3,4,4,8] {
    ...   %p = bf16[8,4,4,3]{3,2,1,0} parameter(0)
    ...   %w = bf16[3,3,16,32]{3,2,1,0} parameter(1)
    ...   %kernel = bf16[32,3,3,16]{3,2,1,0} transpose(%w), dimensions={3,0,1,2}
    ...   ROOT %image = bf16[3,4,4,8]{3,2,1,0} transpose(%p), dimensions={3,1,2,0}
    ... }'''
    >>> layout_swaps(program, [(3, 3, 16, 32)])
    ['bf16[8,4,4,3] to bf16[3,4,4,8]']
    """
    program, parameters = read_hlo(text), {_sizes(shape) for shape in state}
    found = []
    for launch in launches(program):
        fused = launch.op.opcode.removesuffix("-start") == "fusion"
        if classify(launch.op, program)[0] == PRODUCT:
            continue
        ops = program.computations[called(launch.op)[0] if fused else launch.computation]
        shapes = {op.name: op.shape for op in ops}
        for op in ops if fused else [launch.op]:
            source = next((shapes[name] for name in operands(op) if name in shapes), "")
            if _reorders(op, source) and _sizes(_dims(op.shape)) not in parameters:
                found += [f"{source.split('{')[0]} to {op.shape.split('{')[0]}"] * launch.times
    return sorted(found)


def _reorders(op: Op, source: str) -> bool:
    """Whether a transposition or a copy changes the order in memory of dimensions larger than 1."""
    if op.opcode not in ("transpose", "copy"):
        return False
    moved = re.search(r"dimensions=\{([\d,]*)\}", op.rest)
    to_source = [int(n) for n in moved[1].split(",")] if moved else list(range(len(_dims(op.shape))))
    before = [n for n in _minor_to_major(source) if _dims(source)[n] > 1]
    after = [to_source[n] for n in _minor_to_major(op.shape)]
    return before != [n for n in after if _dims(source)[n] > 1]


def _dims(shape: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", shape[shape.index("[") : shape.index("]")]))


def _minor_to_major(shape: str) -> list[int]:
    layout = re.search(r"\]\{([\d,]*)", shape)
    return [int(n) for n in layout[1].split(",") if n] if layout else list(range(len(_dims(shape))))[::-1]


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n != 1))


def _adds(text: str, computation: str) -> bool:
    """Whether a computation of the program adds; one that is not in the text counts as one that does."""
    body = re.search(rf"^%?{re.escape(computation)} .*?^}}", text, re.M | re.S)
    return body is None or " add(" in body[0]
