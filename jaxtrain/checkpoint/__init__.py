"""Checkpoints: Orbax writes the arrays, a manifest proves that they are complete and unchanged.

``checkpoints/000400/state`` is Orbax's; ``checkpoints/000400/manifest.json`` is written after Orbax has
committed. Nothing else imports orbax.
"""

from jaxtrain.checkpoint.manifest import CheckpointInfo, CorruptCheckpointError
from jaxtrain.checkpoint.store import Checkpoints, open, space
from jaxtrain.checkpoint.warm_start import arrays, check_init_from, identify_source, init_from

__all__ = [
    "CheckpointInfo",
    "Checkpoints",
    "CorruptCheckpointError",
    "arrays",
    "check_init_from",
    "identify_source",
    "init_from",
    "open",
    "space",
]
