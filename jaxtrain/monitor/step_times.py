"""Step times: percentiles of a window, and of a whole run in bounded memory."""

from __future__ import annotations

import math
import time

import numpy as np

LEAST, RATIO = 1e-6, 1.01  # seconds; each bin of the run's histogram is 1 % wider than the one before
BINS = 2048  # the last begins at 700 s
EVERY = 1.0  # seconds between percentiles, which with their events cost as much as a short step


class StepTimes:
    """Times between completions of updates, as the loop sees them.

    Updates follow each other as they are completed where the device is what takes the time, and at the host's
    own pace where that is. Nothing waits for the sake of these times. A dispatch of several updates counts as
    so many of equal length.
    """

    def __init__(self) -> None:
        self._before: float | None = None
        self._times: list[float] = []
        self._counts: list[int] = []
        self._all = np.zeros(BINS, np.int64)
        self._told = -math.inf

    def tick(self, updates: int = 1) -> None:
        """A dispatch of ``updates`` was found to be completed now."""
        now = time.perf_counter()
        if self._before is not None:
            self._times.append((now - self._before) / updates)
            self._counts.append(updates)
        self._before = now

    def pause(self) -> None:
        """What comes before the next completion is no training."""
        self._before = None

    def window(self) -> dict[str, float]:
        """Percentiles since they were last told, milliseconds; nothing within a second of that."""
        now = time.perf_counter()
        if not self._times or now - self._told < EVERY:
            return {}
        self._told = now
        seconds, counts = self._taken()
        order = np.argsort(seconds)
        return _percentiles(seconds[order], counts[order])

    def overall(self) -> dict[str, float]:
        """Percentiles over all laps, milliseconds, to 1 %; nothing where nothing was timed."""
        self._taken()
        if not self._all.any():
            return {}
        return _percentiles(LEAST * RATIO ** (np.arange(BINS) + 0.5), self._all)

    def _taken(self) -> tuple[np.ndarray, np.ndarray]:
        """The times that were kept, and how often each counts; they are in the histogram now."""
        seconds, counts = np.asarray(self._times, np.float64), np.asarray(self._counts, np.int64)
        self._times, self._counts = [], []
        bins = np.log(np.maximum(seconds, LEAST) / LEAST) / np.log(RATIO)
        np.add.at(self._all, np.minimum(bins.astype(np.int64), BINS - 1), counts)
        return seconds, counts


def _percentiles(seconds: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Of ascending ``seconds``, each of which counts so often: the smallest that so many are not above."""
    reached = np.cumsum(counts)
    at = {
        name: np.searchsorted(reached, share * reached[-1]) for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    return {f"step_ms_{name}": float(1e3 * seconds[place]) for name, place in at.items()}
