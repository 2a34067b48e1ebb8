"""Percentiles of step times, over a window and over the entire run in bounded memory."""

from __future__ import annotations

import math
import time

import numpy as np

LEAST, RATIO = 1e-6, 1.01  # seconds; each bin of the run's histogram is 1 % wider than the last
BINS = 2048  # the last begins at 700 s
EVERY = 1.0  # seconds between windows: computing and writing one costs as much as a short step


class StepTimes:
    """Times between completions of updates, as the loop sees them.

    The time is the device's where the device is the bottleneck, else the host's. Measuring never makes the
    host wait for a device. A dispatch of several updates counts as that many of equal length.
    """

    def __init__(self) -> None:
        self._completed: float | None = None
        self._times: list[float] = []
        self._counts: list[int] = []
        self._all = np.zeros(BINS, np.int64)
        self._reported = -math.inf

    def tick(self, updates: int = 1) -> None:
        """Note that a dispatch of ``updates`` updates was found completed now."""
        now = time.perf_counter()
        if self._completed is not None:
            self._times.append((now - self._completed) / updates)
            self._counts.append(updates)
        self._completed = now

    def pause(self) -> None:
        """Leave out the time until the next completion, which is not training."""
        self._completed = None

    def window(self) -> dict[str, float]:
        """Return percentiles since the last call, in milliseconds; empty within a second of it."""
        now = time.perf_counter()
        if not self._times or now - self._reported < EVERY:
            return {}
        self._reported = now
        seconds, counts = self._collect()
        order = np.argsort(seconds)
        return _percentiles(seconds[order], counts[order])

    def overall(self) -> dict[str, float]:
        """Return percentiles over the entire run, in milliseconds, to 1 %; empty where nothing was timed."""
        self._collect()
        if not self._all.any():
            return {}
        return _percentiles(LEAST * RATIO ** (np.arange(BINS) + 0.5), self._all)

    def _collect(self) -> tuple[np.ndarray, np.ndarray]:
        """Move the window's times to the histogram; returns them and how often each counts."""
        seconds, counts = np.asarray(self._times, np.float64), np.asarray(self._counts, np.int64)
        self._times, self._counts = [], []
        bins = np.log(np.maximum(seconds, LEAST) / LEAST) / np.log(RATIO)
        np.add.at(self._all, np.minimum(bins.astype(np.int64), BINS - 1), counts)
        return seconds, counts


def _percentiles(seconds: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Compute percentiles of ascending ``seconds``, each counted ``counts`` times, by nearest rank."""
    reached = np.cumsum(counts)
    at = {
        name: np.searchsorted(reached, share * reached[-1]) for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    return {f"step_ms_{name}": float(1e3 * seconds[place]) for name, place in at.items()}
