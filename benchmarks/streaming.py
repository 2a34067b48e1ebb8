"""JPEG files through Grain's worker processes onto the device, against the workers alone.

  streamed   ``jaxtrain.program.loader.Streamed`` with 2 workers: files read, decoded, cropped at random to
             224×224 and flipped by ``data.RandomCrops``, checked for a new batch and put on the device
  workers    the same workers' batches, discarded

A few hundred files of ImageNet's usual size are written to a temporary folder first. Every turn restarts its
workers and starts the clock once they produce batches, so no side profits from prefetched ones.

  python -m benchmarks.streaming [--files N] [--batch N] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import common, photographs
from jaxtrain import data, sharding
from jaxtrain.program.loader import Streamed

WORKERS = 2
FIRST, BATCHES = 6, 16  # taken before and while the clock runs: more than lie ready in buffers


class Turns:
    """Turns of either side, each at other batches."""

    def __init__(self, source: Any, batch: int) -> None:
        self._batch, self._at = batch, 0
        order = data.Order(seed=0, n=len(source), batch=batch)
        self._loader = Streamed(source, order, sharding.make_mesh(jax.devices()[:1]), WORKERS)

    def streamed(self) -> float:
        """Seconds an image, on the device."""
        return self._timed(lambda step: jax.block_until_ready(self._loader.batch(step)), self._loader.close)

    def workers(self) -> float:
        """Seconds an image, on the host."""
        stream = self._loader._open(self._at)
        return self._timed(lambda step: next(stream), stream.close)

    def _timed(self, take: Callable[[int], Any], close: Callable[[], None]) -> float:
        start, self._at = self._at, self._at + FIRST + BATCHES
        for step in range(start, start + FIRST):
            take(step)
        began = time.perf_counter()
        for step in range(start + FIRST, self._at):
            take(step)
        seconds = time.perf_counter() - began
        close()
        return seconds / BATCHES / self._batch


def main() -> None:
    """Both sides interleaved, one JSON object."""
    parser = common.arguments(__doc__, rounds=6)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        folder = photographs.write(path, args.files)
        sizes = [file.stat().st_size for file in Path(path).iterdir()]
        turns = Turns(data.RandomCrops(folder, size=224), args.batch)
        times = common.interleave({"streamed": turns.streamed, "workers": turns.workers}, args.rounds)
    label = "JPEG images/s, streamed to the device over the workers alone"
    figures = {
        "batch": args.batch,
        "workers": WORKERS,
        "median bytes of a file": statistics.median(sizes),
        "images_per_second": {name: 1 / value for name, value in common.medians(times).items()},
    }
    results = [common.speedup(label, times["workers"], times["streamed"], ">= 0.9")]
    common.finish(args, "streaming", results, figures)


if __name__ == "__main__":
    main()
