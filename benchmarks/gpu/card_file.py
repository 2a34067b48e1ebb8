"""Describe the GPU of this machine for ``plan --for``: by name, or by a file with its figures.

For a GPU that ``jaxtrain/sharding/cards.toml`` lacks, such as a MIG slice, the CUDA driver gives what XLA's
compiler needs. Peaks that no datasheet gives are those of all tensor cores at the highest clock, and the
speed of links is assumed to be high, so that a lower bound of a step's time stays one.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Of the enumeration CUdevice_attribute in cuda.h. Clocks are in kHz, the width of the bus in bits.
ATTRIBUTES = {
    "clock": 13,
    "cores": 16,
    "memory_clock": 36,
    "bus_width": 37,
    "l2_cache": 38,
    "major": 75,
    "minor": 76,
    "shared_memory_per_core": 81,
    "shared_memory_per_block": 97,
}
TENSOR_FLOPS = {
    (7, 0): 1024,
    (7, 5): 1024,
    (8, 0): 2048,
    (8, 6): 1024,
    (8, 7): 2048,
    (8, 9): 1024,
    (9, 0): 4096,
    (10, 0): 8192,
    (10, 3): 8192,
    (12, 0): 1024,
    (12, 1): 1024,
}
"""Dense 16-bit FLOPs of a multiprocessor in a cycle, at most, by compute capability."""
FPUS = {(7, 0): 64, (7, 5): 64, (8, 0): 64}  # float32 units of a multiprocessor; else 128
CPU_CARD = "h100"  # to try the script out: it has nothing to do with the CPU
LINK, NETWORK = 900_000_000_000, 100_000_000_000  # bytes per second, above what today's cards have


def find(folder: str) -> dict[str, Any]:
    """Describe the first device.

    Returns:
      ``for``: what ``plan --for`` takes, a name or a file written into ``folder``; ``CPU_CARD`` for a CPU.
      ``why``, in place of it where figures of a card are missing: which. ``no_compiler``, where nothing can
      be compiled for a described card: the reason.
    """
    import jax

    from jaxtrain.sharding.cards import find_card
    from jaxtrain.sharding.described import compiler_problem

    device, reason = jax.local_devices()[0], compiler_problem()
    found = {"device": device.device_kind}
    if reason is not None:
        found["no_compiler"] = f"compiling for a described GPU {reason}"
    if device.platform == "cpu":
        return found | {"for": CPU_CARD}
    known = find_card(device.device_kind)
    return found | ({"for": known.name} if known is not None else make_file(device.device_kind, folder))


def make_file(kind: str, folder: str) -> dict[str, Any]:
    """Write ``card.toml`` into ``folder``, of what the CUDA driver says of the first visible GPU."""
    from jaxtrain.monitor.peak_flops import datasheet_peak

    try:
        attributes = read_attributes()
    except OSError as error:
        return {"why": f"cards.toml has no {kind}, and the CUDA driver gave no figures: {error}"}
    peaks = {name: datasheet_peak(kind, name) for name in ("bfloat16", "float16", "float32")}
    known_peaks = {name: peak.flops for name, peak in peaks.items() if peak is not None}
    fields, lacks = card_fields(kind, attributes, known_peaks)
    found = {"driver_figures": attributes}
    if lacks:
        return found | {"why": f"cards.toml has no {kind}, and a file for it lacks {', '.join(lacks)}"}
    path = Path(folder, "card.toml")
    path.write_text(as_toml(fields))
    return found | {"for": str(path), "card": fields}


def read_attributes() -> dict[str, int]:
    """Read the figures of the first visible GPU from the CUDA driver; allocates nothing on the GPU.

    Figures that the driver does not give are left out.

    Raises:
      OSError: there is no driver or no device.
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    for what, code in (
        ("cuInit", cuda.cuInit(0)),
        ("cuDeviceGet", cuda.cuDeviceGet(ctypes.byref(device), 0)),
    ):
        if code:
            raise OSError(f"{what} returned {code}")
    found = {}
    for name, number in ATTRIBUTES.items():
        value = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device) == 0:
            found[name] = value.value
    if cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device) == 0:
        found["memory"] = memory.value
    return found


def card_fields(
    kind: str, attributes: Mapping[str, int], peaks: Mapping[str, float]
) -> tuple[dict[str, Any], list[str]]:
    """Work out the fields of ``jaxtrain.sharding.cards.Card``.

    Args:
      kind: of the device.
      attributes: from ``read_attributes``.
      peaks: FLOP/s by precision, from a datasheet; those that are absent are derived.

    Returns:
      The fields, and the names of the figures that are missing.
    """
    wanted = (*ATTRIBUTES, "memory")
    lacks = [name for name in wanted if attributes.get(name, 0) <= 0 and name != "minor"]
    capability = (attributes.get("major", 0), attributes.get("minor", 0))
    if capability not in TENSOR_FLOPS and "bfloat16" not in peaks:
        lacks.append(f"the peak of compute capability {capability[0]}.{capability[1]}")
    if lacks:
        return {}, lacks
    cycles = attributes["cores"] * attributes["clock"] * 1e3
    fpus = FPUS.get(capability, 128)
    half = peaks.get("bfloat16") or peaks.get("float16") or cycles * TENSOR_FLOPS[capability]
    fields = {
        "device_kind": kind,
        "memory": attributes["memory"],
        "bandwidth": attributes["memory_clock"] * 1000 * 2 * attributes["bus_width"] // 8,
        "capability": list(capability),
        "link": LINK,
        "network": NETWORK,
        "peak": {
            "bfloat16": half,
            "float16": peaks.get("float16", half),
            "tf32": peaks.get("float32", half / 2),
            "float32": cycles * fpus * 2,
        },
        "cores": attributes["cores"],
        "fpus_per_core": fpus,
        "clock": attributes["clock"] / 1e6,
        "l2_cache": attributes["l2_cache"],
        "shared_memory_per_block": attributes["shared_memory_per_block"],
        "shared_memory_per_core": attributes["shared_memory_per_core"],
        "nvlinks": 0,
        "sources": ["the CUDA driver of this machine; links are assumed"],
    }
    return fields, []


def as_toml(fields: Mapping[str, Any]) -> str:
    """Write the fields as the TOML file that ``plan --for`` reads."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            text = "{ " + ", ".join(f"{key} = {number!r}" for key, number in value.items()) + " }"
        else:
            text = json.dumps(value, ensure_ascii=False)
        lines.append(f"{name} = {text}\n")
    return "".join(lines)
