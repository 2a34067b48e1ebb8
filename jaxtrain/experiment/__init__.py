"""Experiments: the frozen dataclass, the registry that finds them by name, and typed overrides.

Names are imported when they are first used: ``registry`` needs no JAX, so listing experiments stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtrain.experiment.definition import Experiment
    from jaxtrain.experiment.overrides import (
        comparable_configs,
        config_hash,
        config_text,
        first_difference,
        override,
    )
    from jaxtrain.experiment.registry import Entry, discover, find

__all__ = [
    "Entry",
    "Experiment",
    "comparable_configs",
    "config_hash",
    "config_text",
    "discover",
    "find",
    "first_difference",
    "override",
]

_HOMES = {"Experiment": "definition", "Entry": "registry", "discover": "registry", "find": "registry"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'overrides')}"), name)
