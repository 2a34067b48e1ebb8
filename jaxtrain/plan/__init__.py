"""What an experiment needs, compiled and not run: memory, arithmetic, communication, and what fits."""

from jaxtrain.plan.collectives import Collective, collectives
from jaxtrain.plan.measure import Plan, as_on, measure, opened
from jaxtrain.plan.nearest import Nearest, find_nearest
from jaxtrain.plan.search import Searched, attempts, search_all
from jaxtrain.plan.variants import Tried, Variant, given, trying

__all__ = [
    "Collective",
    "Nearest",
    "Plan",
    "Searched",
    "Tried",
    "Variant",
    "as_on",
    "attempts",
    "collectives",
    "find_nearest",
    "given",
    "measure",
    "opened",
    "search_all",
    "trying",
]
