"""Traces, and device telemetry."""

from jaxtrain.profile.telemetry import Meter, memory, metered
from jaxtrain.profile.trace import OFF, Trace, idle, mark, traced, window

__all__ = ["OFF", "Meter", "Trace", "idle", "mark", "memory", "metered", "traced", "window"]
