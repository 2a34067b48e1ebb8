"""Read power and energy of NVIDIA boards with NVML (``nvidia-ml-py``), where it is available."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

EVERY = 0.2  # seconds between samples of the power, where a board has no energy counter


class Boards:
    """The boards of some JAX devices. Made by ``open``.

    Energy is read from the boards' counters. Where one is missing, a thread samples power and
    integrates it.
    """

    def __init__(self, nvml: Any, handles: Sequence[Any]) -> None:
        self._nvml, self._handles = nvml, list(handles)
        self._sampled_joules, self._stop = 0.0, threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._start_joules = self._read_counters()
        except nvml.NVMLError:
            self._start_joules = 0.0
            self._thread = threading.Thread(target=self._sample, name="power", daemon=True)
            self._thread.start()

    def joules(self) -> float:
        """Return the energy used since this object was made, by all boards together."""
        return (
            self._sampled_joules if self._thread is not None else self._read_counters() - self._start_joules
        )

    def watts(self) -> float:
        """Return the power now, of all boards together; newer boards report the mean of the last second."""
        return sum(self._nvml.nvmlDeviceGetPowerUsage(handle) for handle in self._handles) / 1e3

    def close(self) -> None:
        """Stop the thread and shut NVML down."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _read_counters(self) -> float:
        counts = [self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles]
        return sum(counts) / 1e3

    def _sample(self) -> None:
        before, power = time.perf_counter(), self._power()
        while not self._stop.wait(EVERY):
            now, watts = time.perf_counter(), self._power()
            self._sampled_joules += (now - before) * (power + watts) / 2
            before, power = now, watts

    def _power(self) -> float:
        try:
            return self.watts()
        except self._nvml.NVMLError:
            return 0.0


def open(devices: Sequence[Any]) -> Boards | None:
    """Open the boards of ``devices``; None where they are no NVIDIA GPUs, or NVML is missing or fails.

    Args:
      devices: JAX devices of this process.
    """
    if not devices or devices[0].platform not in ("gpu", "cuda"):
        return None
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, no driver, no library: run without figures
        return None
    try:
        handles = [_handle(nvml, device) for device in devices]
        boards = Boards(nvml, handles)
        boards.watts()
        return boards
    except Exception:  # an NVML error, or a board that cannot be identified
        with contextlib.suppress(Exception):
            nvml.nvmlShutdown()
        return None


def describe_boards(devices: Sequence[Any]) -> str:
    """Describe the power of ``devices`` now, or why it is not measured, for ``doctor``."""
    boards = open(devices)
    if boards is None:
        return "not measured: NVML does not report on these devices, or is missing (pip install nvidia-ml-py)"
    with contextlib.closing(boards):
        return f"{boards.watts():.0f} W now"


def _handle(nvml: Any, device: Any) -> Any:
    """Find the board of a JAX device, which JAX numbers among those in CUDA_VISIBLE_DEVICES.

    Raises:
      LookupError: the device is a slice of a board (MIG), or NVML numbers the boards otherwise than CUDA.
    """
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    number = device.local_hardware_id
    word = visible[number] if visible else str(number)
    handle = nvml.nvmlDeviceGetHandleByIndex(int(word)) if word.isdigit() else _by_uuid(nvml, word)
    name = nvml.nvmlDeviceGetName(handle)
    name = name.decode() if isinstance(name, bytes) else name
    if name != device.device_kind:  # CUDA orders boards by speed, NVML by slot
        raise LookupError(f"device {number} is {device.device_kind} to JAX and {name} to NVML")
    return handle


def _by_uuid(nvml: Any, uuid: str) -> Any:
    if not uuid.startswith("GPU-"):
        raise LookupError(f"{uuid} is not the UUID of a board")
    return nvml.nvmlDeviceGetHandleByUUID(uuid)
