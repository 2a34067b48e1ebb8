"""A trained model as one file: ``python -m jaxtrain export`` writes it, ``load`` runs it.

>>> from jaxtrain import artifact
>>> artifact.load("no-such-file")
Traceback (most recent call last):
    ...
jaxtrain.core.errors.InputError: no-such-file: there is no such file

Loading needs JAX, NumPy and flatbuffers; neither the experiment's code nor Flax, Optax or Orbax. Names are
imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtrain.artifact.manifest import InputSpec, Manifest
    from jaxtrain.artifact.reader import Artifact, load

__all__ = ["Artifact", "InputSpec", "Manifest", "load"]

_HOMES = {"Artifact": "reader", "InputSpec": "manifest", "Manifest": "manifest", "load": "reader"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
