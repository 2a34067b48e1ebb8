"""Checkpoints: Orbax writes the arrays, a manifest proves that they are complete and what was saved.

``checkpoints/000400/state`` is Orbax's; ``checkpoints/000400/manifest.json`` is written after Orbax has
committed. Nothing else imports orbax.
"""

from jaxtrain.checkpoint.initial import arrays, check_init_from, init_from
from jaxtrain.checkpoint.manifest import Damaged, Saved, write_json
from jaxtrain.checkpoint.store import Checkpoints, open, space

__all__ = [
    "Checkpoints",
    "Damaged",
    "Saved",
    "arrays",
    "check_init_from",
    "init_from",
    "open",
    "space",
    "write_json",
]
