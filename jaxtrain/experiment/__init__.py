"""An experiment as one frozen dataclass, where experiments are found, and their typed overrides."""

from jaxtrain.experiment.config import config_hash, config_text, first_difference, override
from jaxtrain.experiment.definition import Experiment
from jaxtrain.experiment.registry import Entry, discover, find

__all__ = [
    "Entry",
    "Experiment",
    "config_hash",
    "config_text",
    "discover",
    "find",
    "first_difference",
    "override",
]
