"""Power and energy of NVIDIA boards, by NVML (``nvidia-ml-py``), where there is one."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

EVERY = 0.2  # seconds between samples of the power, where a board does not count its energy


class Boards:
    """The boards of some JAX devices. Made by ``open``.

    A board that counts its energy is asked for that; of another the power is sampled by a thread, and summed.
    """

    def __init__(self, nvml: Any, handles: Sequence[Any]) -> None:
        self._nvml, self._handles = nvml, list(handles)
        self._sampled, self._left = 0.0, threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._began = self._counted()
        except nvml.NVMLError:
            self._began = 0.0
            self._thread = threading.Thread(target=self._sample, name="power", daemon=True)
            self._thread.start()

    def joules(self) -> float:
        """Energy since this was made, all boards together."""
        return self._sampled if self._thread is not None else self._counted() - self._began

    def watts(self) -> float:
        """Power now, all boards together; newer boards tell the mean of the last second."""
        return sum(self._nvml.nvmlDeviceGetPowerUsage(handle) for handle in self._handles) / 1e3

    def close(self) -> None:
        """Stop the thread and let go of NVML."""
        self._left.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _counted(self) -> float:
        counts = [self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles]
        return sum(counts) / 1e3

    def _sample(self) -> None:
        before, power = time.perf_counter(), self._power()
        while not self._left.wait(EVERY):
            now, watts = time.perf_counter(), self._power()
            self._sampled += (now - before) * (power + watts) / 2
            before, power = now, watts

    def _power(self) -> float:
        try:
            return self.watts()
        except self._nvml.NVMLError:
            return 0.0


def open(devices: Sequence[Any]) -> Boards | None:
    """The boards of ``devices``; None where they are no NVIDIA GPUs, or NVML is missing or cannot tell.

    Args:
      devices: JAX devices of this process.
    """
    if not devices or devices[0].platform not in ("gpu", "cuda"):
        return None
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # not installed, no driver, no library: whatever it is, there are no figures
        return None
    try:
        handles = [_handle(nvml, device) for device in devices]
        boards = Boards(nvml, handles)
        boards.watts()
        return boards
    except Exception:  # an error of NVML, or a board that cannot be found
        with contextlib.suppress(Exception):
            nvml.nvmlShutdown()
        return None


def describe_boards(devices: Sequence[Any]) -> str:
    """What there is to measure the power of ``devices`` with, for ``doctor``."""
    boards = open(devices)
    if boards is None:
        return "not measured: NVML tells nothing of these devices, or is missing (pip install nvidia-ml-py)"
    with contextlib.closing(boards):
        return f"{boards.watts():.0f} W now"


def _handle(nvml: Any, device: Any) -> Any:
    """The board of a JAX device, which counts only those that CUDA_VISIBLE_DEVICES leaves it.

    Raises:
      LookupError: it is a part of a board (MIG), or NVML's numbers are not CUDA's.
    """
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    number = device.local_hardware_id
    word = visible[number] if visible else str(number)
    handle = nvml.nvmlDeviceGetHandleByIndex(int(word)) if word.isdigit() else _by_name(nvml, word)
    name = nvml.nvmlDeviceGetName(handle)
    name = name.decode() if isinstance(name, bytes) else name
    if name != device.device_kind:  # CUDA puts the fastest first, NVML goes by the slots
        raise LookupError(f"device {number} is {device.device_kind} to JAX and {name} to NVML")
    return handle


def _by_name(nvml: Any, name: str) -> Any:
    if not name.startswith("GPU-"):
        raise LookupError(f"{name} is no board")
    return nvml.nvmlDeviceGetHandleByUUID(name)
