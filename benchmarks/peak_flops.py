"""The FLOP/s of the fastest matrix product on this device, stored as the peak that MFU is a share of.

Square matrix products in each precision, sizes timed in turn; the size with the best median over the rounds
counts. Runs read the stored figure (``jaxtrain.monitor.peak_flops``) for a device that is in no datasheet
table, such as a CPU. Takes seconds to a minute, and the device should do nothing else.

  python -m benchmarks.peak_flops [--precisions float32 bfloat16] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import common
from jaxtrain.core.errors import RunError
from jaxtrain.monitor.peak_flops import (
    PRECISIONS,
    Peak,
    datasheet_peak,
    device_name,
    measured_file,
    measured_key,
    read_measured,
)

CPU_SIZES, GPU_SIZES = (512, 1024, 2048), (4096, 8192, 16384)
CHAIN = 4  # products in a program, so that dispatching it costs little


def measure(device: jax.Device, precision: str, rounds: int = 5, sizes: Sequence[int] = ()) -> list[float]:
    """Time square matrix products; the FLOP/s of the fastest size, one a round.

    Args:
      device: where to run.
      precision: ``float32``, ``bfloat16`` or ``float16``.
      rounds: how often each size is timed, after a first time that compiles.
      sizes: rows of the matrices; by default up to 2,048 on a CPU and 16,384 elsewhere.

    Raises:
      RunError: the device cannot multiply the smallest matrices.
    """
    sizes = sizes or (CPU_SIZES if device.platform == "cpu" else GPU_SIZES)
    works: dict[int, Callable[[], Any]] = {}
    for size in sizes:
        try:
            works[size] = products(device, precision, size)
        except jax.errors.JaxRuntimeError as error:  # too little memory for the largest
            if size == sizes[0]:
                first_line = str(error).partition("\n")[0][:200]
                raise RunError(
                    f"{device.device_kind} cannot multiply {precision} matrices of {size} rows: {first_line}"
                ) from error
    rates: dict[int, list[float]] = {size: [] for size in works}
    for _ in range(rounds):
        for size, work in works.items():
            began = time.perf_counter()
            work()
            rates[size].append(CHAIN * 2 * size**3 / (time.perf_counter() - began))
    return max(rates.values(), key=statistics.median)


def products(device: jax.Device, precision: str, size: int) -> Callable[[], Any]:
    """Make a function that multiplies ``CHAIN`` times and waits; compiled and run once."""
    keys = jax.random.split(jax.random.key(0))
    x, w = (jax.device_put(jax.random.normal(key, (size, size)), device).astype(precision) for key in keys)
    w = w / math.sqrt(size)  # keeps the scale of the products: zeros or NaN would cost less power

    @jax.jit
    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            x = x @ w
        return x

    def work() -> Any:
        return jax.block_until_ready(chain(x, w))

    work()
    return work


def store(device: jax.Device, precision: str, peak: Peak) -> Path:
    """Store a measured peak for this user, readable by no one else; returns the file.

    Raises:
      RunError: the file cannot be written.
    """
    path = measured_file()
    everything = {**read_measured(), measured_key(device, precision): dataclasses.asdict(peak)}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as file:
            json.dump(everything, file, indent=1)
        Path(made).replace(path)
    except OSError as error:
        raise RunError(
            f"cannot write {path} ({error.strerror}): set XDG_CACHE_HOME to a folder you can write to"
        ) from error
    return path


def main() -> None:
    """One JSON object."""
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["float32", "bfloat16"])
    args = parser.parse_args()
    device, results = jax.local_devices()[0], []
    figures: dict[str, Any] = {"device": device_name(device), "stored_in": str(measured_file())}
    for precision in args.precisions:
        rates = measure(device, precision, args.rounds)
        source = f"measured {datetime.date.today().isoformat()}"
        store(device, precision, Peak(statistics.median(rates), source))
        results.append(common.result(f"{precision}: matrix products", [x / 1e12 for x in rates], "TFLOP/s"))
        table = datasheet_peak(device.device_kind, precision)
        figures[f"{precision}_table_tflops"] = None if table is None else table.flops / 1e12
    common.finish(args, "peak_flops", results, figures)


if __name__ == "__main__":
    main()
