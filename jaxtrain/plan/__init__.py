"""Plan a run by compiling it: memory, FLOPs, communication, and what fits."""

from jaxtrain.plan.absent_data import describe_absent, length_known
from jaxtrain.plan.collectives import Collective, collectives
from jaxtrain.plan.cuda_graphs import CudaGraphs, compile_with_graphs
from jaxtrain.plan.gpu_program import GpuProgram, Kernels, read_gpu_program
from jaxtrain.plan.gpu_step import GpuStep, read_gpu_step
from jaxtrain.plan.measure import Plan, for_device_memory, measure, with_open_data
from jaxtrain.plan.nearest import Nearest, find_nearest
from jaxtrain.plan.overlap import Overlap, exposed_collectives
from jaxtrain.plan.roofline import LowerBound, lower_bound
from jaxtrain.plan.search import SearchResult, attempts, search_all
from jaxtrain.plan.variants import Trial, Variant, make_trial, variant_of

__all__ = [
    "Collective",
    "CudaGraphs",
    "GpuProgram",
    "GpuStep",
    "Kernels",
    "LowerBound",
    "Nearest",
    "Overlap",
    "Plan",
    "SearchResult",
    "Trial",
    "Variant",
    "attempts",
    "collectives",
    "compile_with_graphs",
    "describe_absent",
    "exposed_collectives",
    "find_nearest",
    "for_device_memory",
    "length_known",
    "lower_bound",
    "make_trial",
    "measure",
    "read_gpu_program",
    "read_gpu_step",
    "search_all",
    "variant_of",
    "with_open_data",
]
