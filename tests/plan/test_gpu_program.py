"""jaxtrain.plan.gpu_program: what a GPU does in a step, from reduced texts of real programs."""

from __future__ import annotations

import dataclasses
import json
import types

import pytest
from jax.sharding import AbstractMesh

from jaxtrain.core.errors import InputError
from jaxtrain.plan.cuda_graphs import CudaGraphs, read_graphs
from jaxtrain.plan.gpu_kernels import Loop
from jaxtrain.plan.gpu_program import GpuProgram, Kernels, read_gpu_program
from jaxtrain.plan.gpu_step import read_gpu_step
from jaxtrain.plan.overlap import Overlap, exposed_collectives

ONE = AbstractMesh((1,), ("data",))
EIGHT = AbstractMesh((2, 4), ("data", "fsdp"))
TRITON = 'backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}'


def read(*entry: str, before: str = "", header: str = "", mesh: AbstractMesh = ONE) -> GpuProgram:
    """Read a program with these instructions in its entry."""
    lines = [f"HloModule jit_step, is_scheduled=true{header}", before]
    lines += ["ENTRY %main (p: f32[8]) -> f32[8] {", *(f"  {line}" for line in entry), "}"]
    return read_gpu_program("\n".join(lines), mesh)


FUSED = """
%take (a: u8[1000,64], b: s32[16]) -> f32[16,64] {
  %a = u8[1000,64]{1,0} parameter(0)
  %b = s32[16]{0} parameter(1)
  %gather.1 = u8[16,64]{1,0} gather(%a, %b), offset_dims={1}, slice_sizes={1,64}
  ROOT %convert.1 = f32[16,64]{1,0} convert(%gather.1)
}

%product (a: f32[16,64], b: f32[64,32]) -> f32[16,32] {
  %a.1 = f32[16,64]{1,0} parameter(0)
  %b.1 = f32[64,32]{1,0} parameter(1)
  ROOT %dot.1 = f32[16,32]{1,0} dot(%a.1, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%swap (a: f32[16,32]) -> f32[32,16] {
  %a.2 = f32[16,32]{1,0} parameter(0)
  ROOT %transpose.1 = f32[32,16]{1,0} transpose(%a.2), dimensions={1,0}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%x, %y)
}

%column_sums (a: f32[32,16]) -> f32[16] {
  %a.3 = f32[32,16]{1,0} parameter(0)
  %zero.1 = f32[] constant(0)
  ROOT %reduce.1 = f32[16]{0} reduce(%a.3, %zero.1), dimensions={0}, to_apply=%add
}

%set (a: f32[100,16], b: s32[4], c: f32[4,16]) -> f32[100,16] {
  %a.4 = f32[100,16]{1,0} parameter(0)
  %b.4 = s32[4]{0} parameter(1)
  %c.4 = f32[4,16]{1,0} parameter(2)
  ROOT %scatter.1 = f32[100,16]{1,0} scatter(%a.4, %b.4, %c.4), to_apply=%add
}

%topk (a: f32[8,10]) -> (f32[8,10], s32[8,10]) {
  %a.5 = f32[8,10]{1,0} parameter(0)
  %iota.1 = s32[8,10]{1,0} iota(), iota_dimension=1
  ROOT %sort.1 = (f32[8,10]{1,0}, s32[8,10]{1,0}) sort(%a.5, %iota.1), dimensions={1}, to_apply=%greater
}

%scale (a: f32[16]) -> f32[16] {
  %a.6 = f32[16]{0} parameter(0)
  ROOT %multiply.1 = f32[16]{0} multiply(%a.6, %a.6)
}
"""

STEP = (
    "%data = u8[1000,64]{1,0} parameter(0)",
    "%rows = s32[16]{0} parameter(1)",
    "%w = f32[64,32]{1,0} parameter(2)",
    "%images = f32[16,64]{1,0} fusion(%data, %rows), kind=kLoop, calls=%take",
    f"%h = f32[16,32]{{1,0}} fusion(%images, %w), kind=kCustom, calls=%product, {TRITON}",
    '%g = (f32[16,32]{1,0}, s8[64]{0}) custom-call(%images, %w), custom_call_target="__cublas$gemm"',
    "%g0 = f32[16,32]{1,0} get-tuple-element(%g), index=0",
    "%swapped = f32[32,16]{1,0} fusion(%g0), kind=kInput, calls=%swap",
    "%b = f32[16]{0} fusion(%swapped), kind=kInput, calls=%column_sums",
    "%table = f32[100,16]{1,0} fusion(%t, %i, %u), kind=kInput, calls=%set",
    "%best = (f32[8,10]{1,0}, s32[8,10]{1,0}) fusion(%logits), kind=kCustom, calls=%topk",
    "%scaled = f32[16]{0} fusion(%b), kind=kLoop, calls=%scale",
    "%copied = f32[32,16]{1,0} copy(%swapped)",
    "%relaid = f32[32,16]{0,1} copy(%swapped)",
    "ROOT %out = (f32[16]{0}, f32[32,16]{1,0}) tuple(%scaled, %copied)",
)


def test_kernels_by_kind_with_the_bytes_that_they_move() -> None:
    """Bytes by hand: each operand and result once, of a gather what it takes, of a scatter what it sets."""
    found = read(*STEP, before=FUSED)
    assert found.kernels == (
        Kernels("matrix product", "__cublas$gemm", 1, 4 * (16 * 64 + 64 * 32 + 16 * 32) + 64),
        Kernels("matrix product", "__triton_gemm", 1, 4 * (16 * 64 + 64 * 32 + 16 * 32)),
        Kernels("sort", "fusion", 1, 4 * 80 + 2 * 4 * 80),
        Kernels("scatter", "fusion", 1, 4 * 4 + 4 * 64 + 4 * 64),  # indices, updates, rows that it sets
        Kernels("copy", "transpose", 2, 2 * 2 * 4 * 32 * 16),  # a fusion, and a copy to another layout
        Kernels("copy", "copy", 1, 2 * 4 * 32 * 16),
        Kernels("fusion", "elementwise", 2, (16 * 64 + 4 * 16 + 4 * 16 * 64) + 2 * 4 * 16),
        Kernels("fusion", "reduce", 1, 4 * 32 * 16 + 4 * 16),
    )
    assert found.launches == 10 and found.traffic == sum(one.bytes for one in found.kernels)
    assert found.of_kind("copy") == (3, 3 * 4096)


CUDNN = {
    "__cudnn$convForward": "convolution",
    "__cudnn$convBiasActivationForward": "convolution",
    "__cudnn$convBackwardFilter": "convolution",
    "__cudnn$convBackwardInput": "convolution",
    "__cudnn$fmhaSoftmax": "attention",
    "__cudnn$fmhaSoftmaxBackward": "attention",
    "__cublas$lt$matmul$f8": "matrix product",
    "__cub$DeviceRadixSort": "sort",
    "cu_threefry2x32": "other",
}


@pytest.mark.parametrize("target", CUDNN)
def test_library_calls_by_name(target: str) -> None:
    call = f'%c = (f32[16]{{0}}, u8[0]{{0}}) custom-call(%a, %a), custom_call_target="{target}"'
    found = read("%a = f32[32]{0} parameter(0)", call)
    assert found.kernels == (Kernels(CUDNN[target], target, 1, 4 * 32 + 4 * 16),)


CONTROL = """
%body (s: (s32[], f32[16])) -> (s32[], f32[16]) {
  %s = (s32[], f32[16]{0}) parameter(0)
  %v = f32[16]{0} get-tuple-element(%s), index=1
  %c.7 = f32[16]{0} copy(%v)
  ROOT %t.7 = (s32[], f32[16]{0}) tuple(%i, %c.7)
}

%less (s: (s32[], f32[16])) -> pred[] {
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%one (v: f32[16]) -> f32[16] {
  %v.8 = f32[16]{0} parameter(0)
  ROOT %c.8 = f32[16]{0} copy(%v.8)
}

%two (v: f32[16]) -> f32[16] {
  %v.9 = f32[16]{0} parameter(0)
  %c.9 = f32[16]{0} copy(%v.9)
  ROOT %d.9 = f32[16]{0} copy(%c.9)
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"5"}}'


TWICE = """
%two (v: f32[16]) -> f32[16] {
  ROOT %w.2 = (s32[], f32[16]{0}) while(%s0), condition=%less, body=%again, KNOWN3
}
""".replace("KNOWN3", KNOWN.replace("5", "3"))


def test_loops_count_by_iteration_and_branches_by_the_longest() -> None:
    loop = "%w = (s32[], f32[16]{0}) while(%s0), condition=%less, body=%body"
    branches = "%b = f32[16]{0} conditional(%p, %x, %x), branch_computations={%one, %two}"
    call = "%k = f32[16]{0} call(%x), to_apply=%two"
    assert read(f"{loop}, {KNOWN}", before=CONTROL).kernels == (Kernels("copy", "copy", 5, 5 * 128),)
    assert read(loop, before=CONTROL).kernels == (  # its condition is a kernel too
        Kernels("copy", "copy", 7, 7 * 128),
        Kernels("other", "compare", 7, 7 * (4 + 1)),
    )
    nested = CONTROL.replace("%c.7 = f32[16]{0} copy(%v)", "%c.7 = f32[16]{0} call(%v), to_apply=%two")
    assert read(f"{loop}, {KNOWN}", before=nested).launches == 5 * 2
    inner = f"{nested.replace('%two (', '%again (')}{TWICE}"
    assert read(f"{loop}, {KNOWN}", before=inner).launches == 5 * 3 * 2
    assert read(branches, before=CONTROL).launches == 2
    assert read(call, branches, before=CONTROL).launches == 4


ASYNC = "channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, dimensions={0}"
SUM = "channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, use_global_device_ids=true, to_apply=%add"
WHEN = 'backend_config={"collective_backend_config":{"is_sync":IS_SYNC}}'
GATHER = (
    "%p = f32[16]{0} parameter(0)",
    f"%start = (f32[16]{{0}}, f32[64]{{0}}) all-gather-start(%p), {ASYNC}, {WHEN}",
)
PRODUCT = (
    "%a = f32[16,64]{1,0} parameter(1)",
    "%b = f32[64,32]{1,0} parameter(2)",
    f"%h = f32[16,32]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%product, {TRITON}",
)
OTHER = ("%k = f32[16]{0} fusion(%p), kind=kLoop, calls=%scale",)
REDUCE = (
    f"%sum = f32[16]{{0}} all-reduce-start(%p), {SUM}, {WHEN}",
    "%summed = f32[16]{0} all-reduce-done(%sum)",
)
DONE = ("%full = f32[64]{0} all-gather-done(%start)",)


def overlaps(*entry: str, is_sync: str = "false") -> tuple[Overlap, ...]:
    return read(*(line.replace("IS_SYNC", is_sync) for line in entry), before=FUSED, mesh=EIGHT).overlaps


def test_overlap_is_what_runs_between_start_and_done() -> None:
    gather = Overlap("all-gather", ("fsdp",), 1, 4 * 64)
    none = dataclasses.replace
    assert overlaps(*GATHER, *DONE, *PRODUCT) == (gather,)
    behind_one = none(gather, overlapped=1, overlapped_bytes=256, others=1)
    assert overlaps(*GATHER, *OTHER, *DONE, *PRODUCT) == (behind_one,)
    behind_two = none(behind_one, behind_products=1, behind_products_bytes=256, products=1)
    assert overlaps(*GATHER, *PRODUCT, *OTHER, *DONE) == (behind_two,)
    assert exposed_collectives([behind_two]) == ()
    assert overlaps(*GATHER, *PRODUCT, *OTHER, *DONE, is_sync="true") == (gather,)


def test_overlap_in_a_loop_counts_by_iteration() -> None:
    lines = "\n".join(f"  {line}" for line in (*GATHER, *OTHER, *DONE)).replace("IS_SYNC", "false")
    body = f"%round (p: f32[16]) -> f32[16] {{\n{lines}\n}}\n"
    loop = f"%w = f32[16]{{0}} while(%p), condition=%less, body=%round, {KNOWN}"
    [found] = read(loop, before=f"{FUSED}\n{body}", mesh=EIGHT).overlaps
    assert (found.count, found.bytes, found.overlapped, found.overlapped_bytes, found.others) == (
        5,
        5 * 256,
        5,
        5 * 256,
        5,
    )


def test_another_collective_does_not_count_as_computation() -> None:
    found = overlaps(*GATHER, *REDUCE, *DONE)
    assert found == (
        Overlap("all-gather", ("fsdp",), 1, 256),
        Overlap("all-reduce", ("data",), 1, 64),
    )
    assert [(one.kind, one.bytes, one.count) for one in exposed_collectives(found)] == [
        ("all-gather", 256, 1),
        ("all-reduce", 64, 1),
    ]
    assert read(*GATHER, *DONE, before=FUSED, mesh=EIGHT).kernels == (
        Kernels("collective", "all-gather", 1, 64 + 256),
    )


def test_asynchronous_computation_overlaps_too() -> None:
    before = f"""
%wrapped (q: f32[64]) -> f32[16] {{
  %q = f32[64]{{0}} parameter(0)
  ROOT %rs = f32[16]{{0}} reduce-scatter(%q), {ASYNC}, to_apply=%add
}}
{FUSED}"""
    start = "%s = ((f32[64]{0}), f32[16]{0}) async-start(%p), calls=%wrapped"
    end = "%d = f32[16]{0} async-done(%s), calls=%wrapped"
    found = read(start, *OTHER, end, before=before, mesh=EIGHT)
    expected = Overlap("reduce-scatter", ("fsdp",), 1, 256, overlapped=1, overlapped_bytes=256, others=1)
    assert found.overlaps == (expected,)


def test_aliases_and_outputs() -> None:
    header = (
        ", input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, must-alias) }, "
        "entry_computation_layout={(f32[8]{0}, s32[])->(f32[8]{0}, s32[], /*index=2*/f32[])}, "
        "num_partitions=1"
    )
    found = read(*STEP, before=FUSED, header=header)
    assert (found.aliased, found.outputs) == (2, 3)


HOST = {
    '%c = (f32[]) custom-call(%a), custom_call_target="xla_ffi_python_gpu_callback"': "python",
    "%i = ((f32[8]{0}), token[]) infeed(%t)": "infeed",
    "%o = token[] outfeed(%a, %t)": "outfeed",
    "%m = f32[8]{0:S(5)} copy(%a)": "host memory",
}


@pytest.mark.parametrize("line", HOST)
def test_what_waits_for_the_host_is_found(line: str) -> None:
    [found] = read("%a = f32[8]{0} parameter(0)", line).host
    assert HOST[line] in found
    assert read(*STEP, before=FUSED).host == ()


def test_program_of_another_mesh_is_refused() -> None:
    with pytest.raises(InputError, match="partitioned over 2 devices and the mesh has 1"):
        read(*STEP, before=FUSED, header=", num_partitions=2")


def test_json() -> None:
    found = dataclasses.replace(read(*STEP, before=FUSED), graphs=CudaGraphs(1, 2, 3))
    assert json.loads(json.dumps(dataclasses.asdict(found)))["graphs"]["outside"] == 3


THUNKS = """\
000: kCommandBuffer [source       | next=003 (1)]
    001: kCustomKernel [source       | next=002 (1)] loop_select_fusion_30 grid: [1, 1, 1] threads: [1, 1, 1]
    002: kCuDnn        [prev=001 (1) | sink        ] kCuDnn
003: kConvolution   [prev=000 (1) | next=004 (1)] kConvolution
004: kAsyncStart    [prev=003 (1) | next=006 (1)] stream=communication_stream[0], async_id=4
    005: kAllReduce     [source | sink] kAllReduce
006: kCopy          [prev=004 (1) | next=007 (1)] kCopy
007: kAsyncDone     [source       | sink        ] async_id=4
008: kWhile         [prev=007 (1) | sink        ]
condition:
    009: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | sink        ]
        010: kCustomKernel [source       | next=011 (1)] input_reduce_fusion grid: [1, 1, 1]
        011: kCopy         [prev=010 (1) | sink        ] kCopy
"""


def test_cuda_graphs_of_a_list_of_thunks() -> None:
    """Outside of the two graphs: a convolution, an all-reduce, a copy and the condition of a loop."""
    found = read_graphs(THUNKS)
    assert found == CudaGraphs(count=2, inside=4, outside=4) and found.host_launches == 6
    assert read_graphs("") == CudaGraphs(0, 0, 0)


LOOPS = """
001: kCopy         [source       | next=004 (3)] kCopy
004: kWhile        [prev=003 (1) | next=028 (1)]
condition:
    005: kCustomKernel [source | sink] loop_compare_fusion_2
  body:
    000: kCommandBuffer [source | sink]
        006: kCopy               [source       | next=007 (1)] kCopy
    007: kWhile              [prev=006 (1) | next=012 (1)]
condition:
        008: kCustomKernel [source | sink] loop_compare_fusion
      body:
        009: kCustomKernel [source       | sink        ] loop_add_fusion
    025: kDynamicSliceFusion [prev=024 (1) | sink        ] params=1, results=1
        026: kCopy [source | sink] kCopy
028: kCustomKernel [prev=004 (1) | sink        ] loop_add_fusion_3
"""


def test_a_loop_launches_its_body_once_per_iteration() -> None:
    """Twelve iterations of a graph, a slice and a loop of five; a condition only where it is evaluated."""
    known, inner = Loop(12, tests=False), Loop(5, tests=False)
    assert read_graphs(LOOPS, [known, inner]) == CudaGraphs(count=12, inside=12, outside=2 + 12 + 60)
    evaluated = Loop(5, tests=True)
    assert read_graphs(LOOPS, [known, evaluated]).outside == 2 + 12 + 2 * 60
    assert read_graphs(LOOPS) == CudaGraphs(count=1, inside=1, outside=6)


def test_step_of_a_card() -> None:
    """An all-gather of 256 bytes over 4 of 8 devices, overlapped by nothing; 1 GFLOP on each."""
    card = types.SimpleNamespace(bandwidth=1e3, link=1e3, network=1.0, peak={"tf32": 1e9, "bfloat16": 4e9})
    lines = "\n".join(f"  {line}" for line in (*GATHER, *DONE)).replace("IS_SYNC", "false")
    hlo = f"HloModule jit_step\nENTRY %main (p: f32[16]) -> f32[64] {{\n{lines}\n}}"
    step = read_gpu_step(hlo, EIGHT, card, 8e9, "bfloat16", graphs=CudaGraphs(0, 0, 1))
    assert step.program.graphs == CudaGraphs(0, 0, 1) and step.attention == ()
    assert step.bound is not None
    assert (step.bound.compute, step.bound.memory) == (0.25, (64 + 256) / 1e3)
    assert step.bound.communication == step.bound.exposed == pytest.approx(3 / 4 * 256 / 1e3)
    assert step.bound.seconds == pytest.approx(0.32 + 0.192)
    assert read_gpu_step(hlo, EIGHT, card, 8e9, "float32").bound.compute == 1  # type: ignore[union-attr]
    assert read_gpu_step(hlo, EIGHT, card, None, "float32").bound is None
    two_hosts = read_gpu_step(hlo, EIGHT, card, 8e9, "float32", gpus_per_host=2).bound
    assert two_hosts is not None and two_hosts.communication == pytest.approx(1 / 2 * 256 / 2 / 1.0)
