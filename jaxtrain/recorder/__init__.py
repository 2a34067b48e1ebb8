"""Metric sinks: console, JSONL and TensorBoard. The only reader of device metrics, one step late."""

from jaxtrain.recorder.console import Console, describe, make_console
from jaxtrain.recorder.recorder import Recorder, fetch, open

__all__ = ["Console", "Recorder", "describe", "fetch", "make_console", "open"]
