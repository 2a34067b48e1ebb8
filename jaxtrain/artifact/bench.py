"""Latency and throughput of an exported model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxtrain.artifact.manifest import BATCH, InputSpec, Manifest

BATCHES = (1, 4, 16, 64, 256)
WARMUP, MIN_CALLS, MAX_CALLS = 3, 10, 1000


def measure(
    model: Callable[[dict[str, np.ndarray]], Mapping[str, Any]],
    manifest: Manifest,
    seconds: float = 2.0,
    batches: tuple[int, ...] = BATCHES,
) -> Iterator[dict[str, float]]:
    """Yield ``batch``, ``calls``, ``p50_ms``, ``p99_ms`` and ``examples_per_second`` of each batch size.

    Calls are timed from NumPy inputs to NumPy outputs, one after another, after compilation and three calls
    to warm up.

    Args:
      model: ``inputs -> outputs``.
      manifest: of the model, for inputs of its dtypes and shapes.
      seconds: time for each batch size; at least 10 calls are made.
      batches: sizes.
    """
    for batch in batches:
        inputs = random_inputs(manifest, batch)
        for _ in range(WARMUP):
            _call(model, inputs)
        times: list[float] = []
        while len(times) < MIN_CALLS or (sum(times) < seconds and len(times) < MAX_CALLS):
            times.append(_call(model, inputs))
        p50, p99 = np.percentile(times, [50, 99])
        yield {
            "batch": batch,
            "calls": len(times),
            "p50_ms": 1e3 * float(p50),
            "p99_ms": 1e3 * float(p99),
            "examples_per_second": batch * len(times) / sum(times),
        }


def _call(model: Callable[[Any], Mapping[str, Any]], inputs: dict[str, np.ndarray]) -> float:
    start = time.perf_counter()
    for array in model(inputs).values():
        np.asarray(array)
    return time.perf_counter() - start


def random_inputs(manifest: Manifest, batch: int) -> dict[str, np.ndarray]:
    """Return random inputs of a model, texts at their full length.

    >>> from jaxtrain.artifact.manifest import InputSpec
    >>> _random(np.random.default_rng(0), InputSpec("int32", ("batch", 3), 0, 4), (2, 3)).max() <= 4
    np.True_
    """
    rng, sizes = np.random.default_rng(0), {**manifest.sizes, BATCH: batch}
    return {
        name: _random(rng, spec, tuple(sizes[n] if isinstance(n, str) else n for n in spec.shape))
        for name, spec in manifest.inputs.items()
    }


def _random(rng: np.random.Generator, spec: InputSpec, shape: tuple[int, ...]) -> np.ndarray:
    dtype = spec.numpy_dtype
    if np.issubdtype(dtype, np.integer):
        high = spec.maximum if spec.maximum is not None else int(spec.white or 1)
        return rng.integers(0, high, shape, endpoint=True).astype(dtype)
    return rng.normal(size=shape).astype(dtype)
