"""Plan a run by compiling it: memory, FLOPs, communication, and what fits."""

from jaxtrain.plan.absent_data import describe_absent, length_known
from jaxtrain.plan.collectives import Collective, collectives
from jaxtrain.plan.measure import Plan, for_device_memory, measure, with_open_data
from jaxtrain.plan.nearest import Nearest, find_nearest
from jaxtrain.plan.search import SearchResult, attempts, search_all
from jaxtrain.plan.variants import Trial, Variant, make_trial, variant_of

__all__ = [
    "Collective",
    "Nearest",
    "Plan",
    "SearchResult",
    "Trial",
    "Variant",
    "attempts",
    "collectives",
    "describe_absent",
    "find_nearest",
    "for_device_memory",
    "length_known",
    "make_trial",
    "measure",
    "search_all",
    "variant_of",
    "with_open_data",
]
