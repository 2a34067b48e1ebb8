"""What the devices of this process take: memory, power and energy, for the records and the result."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.monitor import nvml

EVERY = 1.0  # seconds between readings: they and their events cost as much as a short step


class Meter:
    """Memory, power and energy of devices. Made by ``measure_devices``.

    All figures are of this process's devices: ``..._bytes`` of the one that holds most, watts and joules of
    all of them together, and joules for a million examples by the examples that these devices computed.

    Args:
      devices: those of this process that the run uses.
      share: which share of every batch they compute, in (0, 1].
    """

    def __init__(self, devices: Sequence[Any], share: float = 1.0) -> None:
        self._devices, self._share = list(devices), share
        self._boards = nvml.open(self._devices)
        self._read = -math.inf

    def record(self, examples: float) -> dict[str, float]:
        """Figures for a record; what is not known is not in it, and within a second of the last nothing.

        Args:
          examples: of the whole run, all processes together, since this was made.
        """
        now = time.perf_counter()
        if now - self._read < EVERY:
            return {}
        self._read = now
        return self.result(examples)

    def result(self, examples: float) -> dict[str, float]:
        """Figures of this process's part of the run, as they stand."""
        return memory(self._devices) | self._measured(examples)

    def close(self) -> None:
        """Let go of NVML."""
        if self._boards is not None:
            self._boards.close()

    def _measured(self, examples: float) -> dict[str, float]:
        if self._boards is None:
            return {}
        try:
            joules, found = self._boards.joules(), {"power_watts": self._boards.watts()}
        except Exception:  # the driver is reloaded, or a board is lost: the run has its own error for that
            return {}
        found["energy_joules"] = joules
        if examples > 0:
            found["joules_per_million_examples"] = 1e6 * joules / (examples * self._share)
        return found


@contextlib.contextmanager
def measure_devices(devices: Sequence[Any], share: float = 1.0) -> Iterator[Meter]:
    """A ``Meter`` that lets go of NVML in the end."""
    meter = Meter(devices, share)
    try:
        yield meter
    finally:
        meter.close()


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """Bytes in use and the most there have been, of the device that holds most.

    Where a device does not tell, as a CPU, those of this process under names of their own.

    >>> sorted(memory([]))
    ['process_rss_bytes', 'process_rss_peak_bytes']
    """
    stats = [device.memory_stats() or {} for device in devices]
    found = {}
    for name, key in (("device_bytes", "bytes_in_use"), ("device_peak_bytes", "peak_bytes_in_use")):
        values = [float(of_one[key]) for of_one in stats if key in of_one]
        if values:
            found[name] = max(values)
    return found or _process()


def _process() -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # it counts KiB
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # not Linux, where ru_maxrss has another unit too
        return {}
    rss = float(pages * resource.getpagesize())  # the kernel counts the two at different times
    return {"process_rss_bytes": rss, "process_rss_peak_bytes": max(peak, rss)}
