"""Memory, power and energy of this process's devices, for the records and the result."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.monitor import nvml

EVERY = 1.0  # seconds between readings: reading and writing them costs as much as a short step


class Meter:
    """Memory, power and energy of devices. Made by ``measure_devices``.

    All figures are of this process's devices: ``..._bytes`` of the device with most memory in use, watts and
    joules of all of them together, and joules per million of the examples that these devices computed.

    Args:
      devices: this process's devices that the run uses.
      share: the share of every batch that they compute, in (0, 1].
    """

    def __init__(self, devices: Sequence[Any], share: float = 1.0) -> None:
        self._devices, self._share = list(devices), share
        self._boards = nvml.open(self._devices)
        self._last_reading = -math.inf

    def record(self, examples: float) -> dict[str, float]:
        """Return figures for a record, without unknown ones; empty within a second of the last reading.

        Args:
          examples: computed by all processes of the run together since this object was made.
        """
        now = time.perf_counter()
        if now - self._last_reading < EVERY:
            return {}
        self._last_reading = now
        return self.result(examples)

    def result(self, examples: float) -> dict[str, float]:
        """Return the figures of this process now."""
        return memory(self._devices) | self._power(examples)

    def close(self) -> None:
        """Shut NVML down."""
        if self._boards is not None:
            self._boards.close()

    def _power(self, examples: float) -> dict[str, float]:
        if self._boards is None:
            return {}
        try:
            joules, found = self._boards.joules(), {"power_watts": self._boards.watts()}
        except Exception:  # a reloaded driver or a lost board raises in the run itself
            return {}
        found["energy_joules"] = joules
        if examples > 0:
            found["joules_per_million_examples"] = 1e6 * joules / (examples * self._share)
        return found


@contextlib.contextmanager
def measure_devices(devices: Sequence[Any], share: float = 1.0) -> Iterator[Meter]:
    """Yield a ``Meter`` and close it at the end."""
    meter = Meter(devices, share)
    try:
        yield meter
    finally:
        meter.close()


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """Return the bytes in use and their peak, of the device with most memory in use.

    Where devices do not report memory, such as CPUs, return those of this process, under other names.

    >>> sorted(memory([]))
    ['process_rss_bytes', 'process_rss_peak_bytes']
    """
    stats = [device.memory_stats() or {} for device in devices]
    found = {}
    for name, key in (("device_bytes", "bytes_in_use"), ("device_peak_bytes", "peak_bytes_in_use")):
        values = [float(one[key]) for one in stats if key in one]
        if values:
            found[name] = max(values)
    return found or _process_memory()


def _process_memory() -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # in KiB
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # not Linux: ru_maxrss has another unit there too
        return {}
    rss = float(pages * resource.getpagesize())  # the kernel updates the two at different times
    return {"process_rss_bytes": rss, "process_rss_peak_bytes": max(peak, rss)}
