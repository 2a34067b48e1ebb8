"""What an experiment needs, told before it runs."""

from jaxtrain.plan.collectives import Collective, collectives
from jaxtrain.plan.exhausted import explained
from jaxtrain.plan.flops import flops_of, model_flops
from jaxtrain.plan.limits import Limit, limit_of, parse_size, size_text
from jaxtrain.plan.measure import Plan, as_on, measure, opened
from jaxtrain.plan.memory import Held, call_like, held
from jaxtrain.plan.nearest import Nearest, find_nearest
from jaxtrain.plan.room import check_disk, check_memory
from jaxtrain.plan.search import Searched, attempts, search_all
from jaxtrain.plan.throughput import Throughput, throughput, update_flops
from jaxtrain.plan.variants import Tried, Variant, given, trying

__all__ = [
    "Collective",
    "Held",
    "Limit",
    "Nearest",
    "Plan",
    "Searched",
    "Throughput",
    "Tried",
    "Variant",
    "as_on",
    "attempts",
    "call_like",
    "check_disk",
    "check_memory",
    "collectives",
    "explained",
    "find_nearest",
    "flops_of",
    "given",
    "held",
    "limit_of",
    "measure",
    "model_flops",
    "opened",
    "parse_size",
    "search_all",
    "size_text",
    "throughput",
    "trying",
    "update_flops",
]
