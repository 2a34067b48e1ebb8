"""Observe a run: console, metrics files, step times, device telemetry and traces."""

from jaxtrain.monitor.console import Console, format_metrics, make_console
from jaxtrain.monitor.observers import Evaluation, Observers, Save, observe
from jaxtrain.monitor.recorder import Recorder, merge_all, open, split_tables
from jaxtrain.monitor.telemetry import Meter, measure_devices, memory
from jaxtrain.monitor.trace import OFF, Trace, idle, mark, parse_window, trace_updates

__all__ = [
    "OFF",
    "Console",
    "Evaluation",
    "Meter",
    "Observers",
    "Recorder",
    "Save",
    "Trace",
    "format_metrics",
    "idle",
    "make_console",
    "mark",
    "measure_devices",
    "memory",
    "merge_all",
    "observe",
    "open",
    "parse_window",
    "split_tables",
    "trace_updates",
]
