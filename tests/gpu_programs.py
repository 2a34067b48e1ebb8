"""Train steps compiled for NVIDIA GPUs on a machine without one, and what tests look for in the programs.

They show the operations, their dtypes and the collectives, neither time nor results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax
import pytest

from jaxtrain import sharding
from jaxtrain.losses import CrossEntropy
from jaxtrain.models import as_model, compute_in
from jaxtrain.sharding import cards, described
from jaxtrain.step import make_init, make_train_step

needs_compiler = pytest.mark.skipif(
    described.compiler_problem() is not None,
    reason="needs the extra gpu-compile: pip install 'jaxtrain[gpu-compile]'",
)


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


def _adds(text: str, computation: str) -> bool:
    """Whether a computation of the program adds; one that is not in the text counts as one that does."""
    body = re.search(rf"^%?{re.escape(computation)} .*?^}}", text, re.M | re.S)
    return body is None or " add(" in body[0]
