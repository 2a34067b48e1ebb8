"""What is seen of a run: console, metrics files, step times, device telemetry and traces."""

from jaxtrain.monitor.console import Console, describe, make_console
from jaxtrain.monitor.recorder import Recorder, merged, open
from jaxtrain.monitor.telemetry import Meter, memory, metered
from jaxtrain.monitor.trace import OFF, Trace, idle, mark, traced, window

__all__ = [
    "OFF",
    "Console",
    "Meter",
    "Recorder",
    "Trace",
    "describe",
    "idle",
    "make_console",
    "mark",
    "memory",
    "merged",
    "metered",
    "open",
    "traced",
    "window",
]
