"""The mesh, the placement of each array on it, and the only place where a step is compiled.

A laptop is a mesh of one device; there is no second code path for more.
"""

from jaxtrain.sharding.compile import compile
from jaxtrain.sharding.compiler_options import KEEP_BARRIERS, combine_thresholds
from jaxtrain.sharding.gather import gather_params
from jaxtrain.sharding.mesh import (
    AXES,
    as_mesh,
    batch_parts,
    batch_split,
    check_batch,
    describe_mesh,
    device_memory,
    make_mesh,
    mesh_text,
    parse_mesh,
    replicated,
    stacked,
)
from jaxtrain.sharding.rules import Placement, Rule, place

__all__ = [
    "AXES",
    "KEEP_BARRIERS",
    "Placement",
    "Rule",
    "as_mesh",
    "batch_parts",
    "batch_split",
    "check_batch",
    "combine_thresholds",
    "compile",
    "describe_mesh",
    "device_memory",
    "gather_params",
    "make_mesh",
    "mesh_text",
    "parse_mesh",
    "place",
    "replicated",
    "stacked",
]
