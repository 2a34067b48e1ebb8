"""Metric sinks: console, JSONL and TensorBoard."""

from jaxtrain.recorder.console import Console, describe, make_console
from jaxtrain.recorder.recorder import Recorder, merged, open

__all__ = ["Console", "Recorder", "describe", "make_console", "merged", "open"]
