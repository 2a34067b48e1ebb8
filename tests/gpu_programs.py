"""Train steps compiled for NVIDIA GPUs on a machine without one, and what tests look for in the programs.

XLA needs the wheels ``jax-cuda12-plugin``, ``jax-cuda12-pjrt`` and ``nvidia-cuda-nvcc-cu12``, no driver. It
shows the operations, their dtypes and the collectives, neither time nor results.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import jax
import optax
import pytest
from jax.experimental import topologies

from jaxtrain import sharding
from jaxtrain.losses import CrossEntropy
from jaxtrain.models import as_model, compute_in
from jaxtrain.step import make_init, make_train_step

needs_compiler = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("jax_plugins", "jax_cuda12_plugin"))),
    reason="compiling for a GPU needs the wheels jax-cuda12-plugin, jax-cuda12-pjrt, nvidia-cuda-nvcc-cu12",
)
# Public figures of an H100 SXM.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  fpus_per_core: 128 clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: 84942979072 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0" runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


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
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x1x{count}")
    devices = sharding.make_mesh(topology.devices, sharding.parse_mesh(mesh, count))
    pair, tx = as_model(model), optax.adam(1e-3)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(make_init(pair, tx), key, batch)
    placed = sharding.place(shapes, devices, pair.axes(batch) if pair.axes else {}, ()).shardings
    gathered = sharding.gather_params(pair, placed.params)
    step = make_train_step(compute_in(gathered, "bfloat16"), CrossEntropy(), tx, guard="stop", **settings)
    rows, copies = sharding.batch_split(devices), sharding.replicated(devices)
    jitted = jax.jit(step, in_shardings=(placed, rows, copies), out_shardings=(placed, copies))
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
