"""How many floating-point operations a second a device can do at most: from a table, or measured.

A peak is what ``MFU`` (model FLOPs utilisation) is a share of. The table has the manufacturer's figures for
dense matrix products; ``python -m jaxtrain doctor --peak`` measures what it has none for, such as a CPU. A
device that is in neither has no peak, and then there is no MFU.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.core import cache
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import write_json
from jaxtrain.core.process import cores
from jaxtrain.core.text import first_line

PRECISIONS = ("float32", "bfloat16", "float16")
CPU_SIZES, GPU_SIZES = (512, 1024, 2048), (4096, 8192, 16384)
CHAIN = 4  # products in a program, so that starting it costs nothing


@dataclasses.dataclass(frozen=True)
class Peak:
    """Of one device.

    Attributes:
      flops: floating-point operations a second; an addition and a product are two.
      source: ``table``, or ``measured 2026-11-22``.
    """

    flops: float
    source: str


@dataclasses.dataclass(frozen=True)
class Row:
    """The manufacturer's figures, in TFLOP/s of dense matrix products; None where there is no such unit.

    Attributes:
      half: bfloat16 and float16 on tensor cores, sums in float32.
      tf32: float32 on tensor cores, whose products are rounded to TF32: JAX's default.
      float32: float32 without tensor cores: ``jax_default_matmul_precision`` is ``highest``.
      bfloat16: do the tensor cores take bfloat16?
    """

    half: float
    tf32: float | None
    float32: float
    bfloat16: bool = True


TABLE: dict[str, Row] = {
    # "NVIDIA A100 Tensor Core GPU" (datasheet)
    r"A100-(SXM4|SXM|PCIE|PCIe)-\d+GB|A100 80GB PCIe": Row(312, 156, 19.5),
    # "NVIDIA H100 Tensor Core GPU" (datasheet; its figures with sparsity halved)
    r"H100 80GB HBM3": Row(989.5, 494.5, 67),
    r"H100 PCIe": Row(756.5, 378, 51),
    r"H100 NVL": Row(835.5, 417.5, 60),
    # "NVIDIA H200 Tensor Core GPU" (datasheet; halved)
    r"H200": Row(989.5, 494.5, 67),
    r"H200 NVL": Row(835.5, 417.5, 60),
    # "NVIDIA GH200 Grace Hopper Superchip" (datasheet; halved)
    r"GH200 (480GB|144G HBM3e|120GB)": Row(989.5, 494.5, 67),
    # "NVIDIA HGX B200" in "NVIDIA Blackwell Architecture Technical Brief" (halved, one of eight)
    r"B200": Row(2250, 1125, 75),
    # "NVIDIA L4 Tensor Core GPU", "NVIDIA L40S" (datasheets; halved)
    r"L4": Row(121, 60, 30.3),
    r"L40S": Row(362, 183, 91.6),
    # "NVIDIA A10 Tensor Core GPU" (datasheet)
    r"A10": Row(125, 62.5, 31.2),
    # "NVIDIA T4 Tensor Core GPU", "NVIDIA V100 Tensor Core GPU" (datasheets)
    r"T4": Row(65, None, 8.1, bfloat16=False),
    r"V100-SXM2-\d+GB": Row(125, None, 15.7, bfloat16=False),
    r"V100-PCIE-\d+GB": Row(112, None, 14, bfloat16=False),
    r"V100S-PCIE-32GB": Row(130, None, 16.4, bfloat16=False),
    # "NVIDIA Ampere GA102 GPU Architecture" (whitepaper; sums in float32)
    r"GeForce RTX 3090": Row(71, 35.6, 35.6),
    r"RTX A6000": Row(154.8, 77.4, 38.7),
    # "NVIDIA Ada GPU Architecture" (whitepaper; sums in float32)
    r"GeForce RTX 4090": Row(165.2, 82.6, 82.6),
}
"""By the device's kind without ``NVIDIA`` or ``Tesla``. The whole name must match: a slice (MIG) does not."""


def peak_flops(device: jax.Device, precision: str) -> Peak | None:
    """The peak of ``device``; None where the table has none and none was measured here.

    Args:
      device: one of ``jax.devices()``.
      precision: ``float32``, ``bfloat16`` or ``float16``.

    >>> peak_flops(jax.devices()[0], "float64") is None
    True
    """
    return datasheet_peak(device.device_kind, precision) or _measure_once(device, precision)


def total_peak_flops(devices: Iterable[jax.Device], precision: str) -> Peak | None:
    """Of all devices of a run together; None where one has no peak.

    CPU devices share the cores of their host, so however many they are they have one peak; and none where
    there are several processes, which may share them too.
    """
    devices = list(devices)
    found = [one for one in (peak_flops(device, precision) for device in devices) if one is not None]
    if not found or len(found) < len(devices):
        return None
    if devices[0].platform == "cpu":
        return found[0] if jax.process_count() == 1 else None
    return Peak(sum(one.flops for one in found), " and ".join(sorted({one.source for one in found})))


def datasheet_peak(kind: str, precision: str) -> Peak | None:
    """From the table.

    >>> datasheet_peak("NVIDIA A100-SXM4-80GB", "bfloat16")
    Peak(flops=312000000000000.0, source='table')
    >>> datasheet_peak("Tesla T4", "bfloat16") is None
    True
    """
    name = re.sub(r"^(NVIDIA|Tesla) ", "", kind)
    rows = [row for pattern, row in TABLE.items() if re.fullmatch(pattern, name)]
    if not rows:
        return None
    row = rows[0]
    exact = getattr(jax.config, "jax_default_matmul_precision", None) in ("highest", "float32", "F32_F32_F32")
    figure = {
        "float32": row.tf32 if row.tf32 and not exact else row.float32,
        "bfloat16": row.half if row.bfloat16 else None,
        "float16": row.half,
    }.get(precision)
    return None if figure is None else Peak(figure * 1e12, "table")


def measure(device: jax.Device, precision: str, rounds: int = 5, sizes: Sequence[int] = ()) -> Peak:
    """The rate of the fastest square matrix product: the best over sizes of the median over rounds.

    Sizes are timed in turn. Takes some seconds, and the device should do nothing else.

    Args:
      device: where.
      precision: ``float32``, ``bfloat16`` or ``float16``.
      rounds: how often each size is timed, after one that is not.
      sizes: rows of the matrices; by default up to 2,048 on a CPU and 16,384 elsewhere.

    Raises:
      InputError: an unknown precision.
      RunError: the device does not multiply the smallest of them.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: a peak is measured in {', '.join(PRECISIONS)}")
    sizes = sizes or (CPU_SIZES if device.platform == "cpu" else GPU_SIZES)
    works: dict[int, Callable[[], Any]] = {}
    for size in sizes:
        try:
            works[size] = _products(device, precision, size)
        except jax.errors.JaxRuntimeError as error:  # too little memory for the largest
            if size == sizes[0]:
                raise RunError(
                    f"{device.device_kind} multiplies no {precision} matrices of {size} rows: "
                    f"{first_line(error)[:200]}"
                ) from error
    times: dict[int, list[float]] = {size: [] for size in works}
    for _ in range(rounds):
        for size, work in works.items():
            began = time.perf_counter()
            work()
            times[size].append(time.perf_counter() - began)
    rate = max(CHAIN * 2 * size**3 / statistics.median(each) for size, each in times.items())
    return Peak(rate, f"measured {datetime.date.today().isoformat()}")


def _products(device: jax.Device, precision: str, size: int) -> Callable[[], Any]:
    """A function that multiplies ``CHAIN`` times and waits; compiled and run once."""
    keys = jax.random.split(jax.random.key(0))
    x, w = (jax.device_put(jax.random.normal(key, (size, size)), device).astype(precision) for key in keys)
    w = w / math.sqrt(size)  # so that products stay as large as they are: zeros or NaN cost less power

    @jax.jit
    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            x = x @ w
        return x

    def work() -> Any:
        return jax.block_until_ready(chain(x, w))

    work()
    return work


def store_peak(device: jax.Device, precision: str, peak: Peak) -> Path:
    """Keep a measured peak for this user; the file that it is in.

    Raises:
      RunError: the file cannot be written.
    """
    path = stored_peak()
    everything = {**_read(path), _key(device, precision): dataclasses.asdict(peak)}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, everything)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder of your own"
        ) from error
    return path


def stored_peak() -> Path:
    """``peaks.json`` in the user's cache folder."""
    return cache.user_folder("peaks.json")


def _measure_once(device: jax.Device, precision: str) -> Peak | None:
    found = _read(stored_peak()).get(_key(device, precision))
    try:
        peak = Peak(float(found["flops"]), str(found["source"]))  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        return None
    return peak if 0 < peak.flops < math.inf else None


def _read(path: Path) -> dict[str, Any]:
    """What is stored; nothing where the file is not there or is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def name(device: jax.Device) -> str:
    """The device's kind; JAX calls every CPU ``cpu``, so here by its own name and the cores it lends us."""
    return f"{_processor()}, {cores()} cores" if device.platform == "cpu" else device.device_kind


def _key(device: jax.Device, precision: str) -> str:
    return f"{name(device)}, {precision}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
