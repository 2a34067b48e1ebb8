"""jaxtrain: train JAX models from one declarative file, on one device or many.

Everything that user code imports is here or in one of the public subpackages:

>>> from jaxtrain import Experiment, data, losses, models, optim
>>> from jaxtrain.step import make_train_step

Names are loaded when they are first used: ``import jaxtrain`` alone imports neither JAX nor TensorFlow.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtrain import (
        artifact,
        checkpoint,
        compress,
        data,
        explain,
        losses,
        metrics,
        models,
        optim,
        report,
        sharding,
        step,
        sweep,
    )
    from jaxtrain.core.errors import InputError, RunError
    from jaxtrain.core.signals import Stopped
    from jaxtrain.core.types import Model, State
    from jaxtrain.experiment import Experiment
    from jaxtrain.program import Program, assemble
    from jaxtrain.train.session import fit

__all__ = [
    "Experiment",
    "InputError",
    "Model",
    "Program",
    "RunError",
    "State",
    "Stopped",
    "artifact",
    "assemble",
    "checkpoint",
    "compress",
    "data",
    "explain",
    "fit",
    "losses",
    "metrics",
    "models",
    "optim",
    "report",
    "sharding",
    "step",
    "sweep",
]

_HOMES = {
    "Experiment": "experiment",
    "InputError": "core.errors",
    "Model": "core.types",
    "Program": "program",
    "RunError": "core.errors",
    "State": "core.types",
    "Stopped": "core.signals",
    "assemble": "program",
    "fit": "train.session",
}

try:
    __version__ = version("jaxtrain")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
