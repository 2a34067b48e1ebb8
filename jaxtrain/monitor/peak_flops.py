"""Peak FLOP/s of a device, from NVIDIA's datasheets or measured, of which ``MFU`` is a share.

A device that is not in the table, such as any CPU, has a peak only if one was measured on it: in a checkout
of jaxtrain, ``python -m benchmarks.peak_flops`` stores it in ``peaks.json`` in the user's cache folder.
Without a peak there is no MFU.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxtrain.core import cache
from jaxtrain.core.process import cores

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Peak:
    """The peak of one device, or of several together.

    Attributes:
      flops: floating-point operations per second; an addition and a multiplication are two.
      source: ``table``, or ``measured 2026-11-22``.
    """

    flops: float
    source: str


@dataclasses.dataclass(frozen=True)
class Row:
    """Datasheet figures in TFLOP/s of dense matrix products; None where the device has no such unit.

    Attributes:
      half: bfloat16 and float16 on tensor cores, accumulated in float32.
      tf32: float32 on tensor cores, which round products to TF32: JAX's default.
      float32: float32 without tensor cores: ``jax_default_matmul_precision`` is ``highest``.
      bfloat16: whether the tensor cores take bfloat16.
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
"""By device kind without ``NVIDIA`` or ``Tesla``. The full name must match: a slice (MIG) does not."""


def peak_flops(device: jax.Device, precision: str) -> Peak | None:
    """Return the peak of ``device``, from the table or else measured; None where neither has one.

    Args:
      device: one of ``jax.devices()``.
      precision: ``float32``, ``bfloat16`` or ``float16``.

    >>> peak_flops(jax.devices()[0], "float64") is None
    True
    """
    return datasheet_peak(device.device_kind, precision) or measured_peak(device, precision)


def total_peak_flops(devices: Iterable[jax.Device], precision: str) -> Peak | None:
    """Return the peak of all devices of a run together; None where one device has none.

    CPU devices share the cores of their host, so any number of them has the peak of one; with several
    processes, which may share the cores too, they have none.
    """
    devices = list(devices)
    found = [one for one in (peak_flops(device, precision) for device in devices) if one is not None]
    if not found or len(found) < len(devices):
        return None
    if devices[0].platform == "cpu":
        return found[0] if jax.process_count() == 1 else None
    return Peak(sum(one.flops for one in found), " and ".join(sorted({one.source for one in found})))


def datasheet_peak(kind: str, precision: str) -> Peak | None:
    """Look up a device kind in the table.

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


def measured_peak(device: jax.Device, precision: str) -> Peak | None:
    """Read the peak that ``benchmarks.peak_flops`` stored; None where there is none or it is damaged."""
    found = read_measured().get(measured_key(device, precision))
    try:
        peak = Peak(float(found["flops"]), str(found["source"]))  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        return None
    return peak if 0 < peak.flops < math.inf else None


def describe_peaks(device: jax.Device) -> str:
    """Describe the peak that MFU is a share of, for ``doctor``."""
    found = {precision: peak_flops(device, precision) for precision in PRECISIONS}
    texts = [f"{name} {peak.flops / 1e12:.4g} ({peak.source})" for name, peak in found.items() if peak]
    return ", ".join(texts) or (
        "unknown, so runs report no MFU; measure it from a checkout: python -m benchmarks.peak_flops"
    )


def measured_file() -> Path:
    """Return the path of the measured peaks: ``{"DEVICE, PRECISION": {"flops": 1e12, "source": TEXT}}``."""
    return cache.user_folder("peaks.json")


def measured_key(device: jax.Device, precision: str) -> str:
    """Return the key of a measured peak in ``peaks.json``."""
    return f"{device_name(device)}, {precision}"


def read_measured() -> dict[str, Any]:
    """Return all measured peaks; empty where the file is missing or damaged."""
    try:
        found = json.loads(measured_file().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home folder
        return {}
    return found if isinstance(found, dict) else {}


def device_name(device: jax.Device) -> str:
    """Return the device's kind; of a CPU, which JAX only calls ``cpu``, the model and its usable cores."""
    return f"{_processor()}, {cores()} cores" if device.platform == "cpu" else device.device_kind


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
