"""jaxtrain.plan.gpu_report: text within 99 columns, and JSON."""

from __future__ import annotations

import json

from jaxtrain.models.attention_choices import AttentionChoice
from jaxtrain.plan.cuda_graphs import CudaGraphs
from jaxtrain.plan.gpu_program import GpuProgram, Kernels
from jaxtrain.plan.gpu_report import as_json, as_text
from jaxtrain.plan.gpu_step import GpuStep
from jaxtrain.plan.overlap import Overlap
from jaxtrain.plan.roofline import LowerBound
from jaxtrain.program.memory_text import WIDTH

PROGRAM = GpuProgram(
    kernels=(
        Kernels("matrix product", "__triton_gemm", 39, 4_474_045_440),
        Kernels("convolution", "__cudnn$convBackwardFilter", 3, 2_503_808),
        Kernels("collective", "all-reduce", 2, 43_000_000),
    ),
    overlaps=(Overlap("all-reduce", ("data", "fsdp"), 2, 21_500_000, 1, 20_000_000, 1, 20_000_000, 3, 5),),
    aliased=84,
    outputs=85,
    host=(),
    graphs=CudaGraphs(count=7, inside=25, outside=19),
)
BOUND = LowerBound(
    compute=1e-3, memory=2.5e-3, communication=4e-4, exposed=1e-4, flops=9.895e11, peak=9.895e14
)
WHY = "it takes float16 and bfloat16, and this is float32"
CHOICES = (
    *(AttentionChoice(f"block{i}", (64, 256, 6, 64), "float32", "xla", WHY) for i in range(6)),
    AttentionChoice("head", (64, 256, 6, 64), "bfloat16", "cudnn", ""),
)

TEXT = """\
GPU program: kernels of a step on each device
  kind            name                        launches  read and written
  matrix product  __triton_gemm                     39           4.47 GB
  convolution     __cudnn$convBackwardFilter         3           2.50 MB
  collective      all-reduce                         2          43.00 MB
  total                                             44           4.52 GB

launches
  CUDA graphs                   7  with 25 kernels and copies
  launches by the host         26  each graph is one
  outputs that reuse an input  84  of 85 outputs of the step
  waits for the host            0

overlap: collectives that run while kernels compute
  collective  mesh axes  count     bytes    overlapped   by products
  all-reduce  data+fsdp      2  21.50 MB  1 (20.00 MB)  1 (20.00 MB)

attention with XLA's kernel
  layers               queries               why not cuDNN's kernel
  6: block0 to block5  float32[64,256,6,64]  it takes float16 and bfloat16, and this is float32

lower bound of a step, from datasheet speeds: not measured
  computation       1 ms  at 989.5 TFLOP/s
  memory          2.5 ms  all reads and writes, as if without an L2 cache
  communication   400 µs  of which 100 µs without overlap
  step, at least  2.6 ms  limited by memory; MFU at most 38 %"""


def test_text() -> None:
    assert as_text(GpuStep(PROGRAM, CHOICES, BOUND)) == TEXT
    assert max(map(len, TEXT.splitlines())) <= WIDTH


def test_text_of_one_device_leaves_out_what_is_not_there() -> None:
    alone = GpuProgram(PROGRAM.kernels[:1], (), 84, 85, ("infeed",))
    text = as_text(GpuStep(alone, CHOICES[-1:]))
    assert text == (
        "GPU program: kernels of a step on each device\n"
        "  kind            name           launches  read and written\n"
        "  matrix product  __triton_gemm        39           4.47 GB\n"
        "  total                                39           4.47 GB\n\n"
        "launches\n"
        "  outputs that reuse an input  84  of 85 outputs of the step\n"
        "  waits for the host            1  infeed"
    )


def test_json_has_every_figure() -> None:
    found = json.loads(json.dumps(as_json(GpuStep(PROGRAM, CHOICES, BOUND))))
    assert found["launches"] == 44 and found["traffic"] == 4_519_549_248
    assert found["kernels"][0] == {
        "kind": "matrix product",
        "name": "__triton_gemm",
        "count": 39,
        "bytes": 4_474_045_440,
    }
    assert found["cuda_graphs"] == {"count": 7, "inside": 25, "outside": 19, "host_launches": 26}
    assert found["overlap"][0]["axes"] == ["data", "fsdp"] and found["overlap"][0]["behind_products"] == 1
    assert found["attention"][0]["shape"] == [64, 256, 6, 64] and found["attention"][-1]["kernel"] == "cudnn"
    assert found["lower_bound"]["seconds"] == 2.6e-3 and found["lower_bound"]["limit"] == "memory"
    assert (found["aliased"], found["outputs"], found["host"]) == (84, 85, [])
    alone = as_json(GpuStep(PROGRAM))
    assert alone["lower_bound"] is None and alone["attention"] == []
