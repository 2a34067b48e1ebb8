"""Reads a trace (``.xplane.pb``) of JAX's profiler, without TensorFlow.

What a trace holds differs by device. A GPU has a plane, ``/device:GPU:0``, and a line in it for each stream,
with kernels and copies. A TPU has a plane with a line ``XLA Ops``. A CPU's operations are events of the
threads of the host's plane, and name the operation in their statistics.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import RunError
from jaxtrain.monitor import op_names
from jaxtrain.monitor.time_shares import BETWEEN, COPY, HOST, OPERATION, Span, Timeline

MARK = "jaxtrain:"
"""How the names of the loop's marks begin: ``jaxtrain:waiting for data``."""
WINDOW = f"{MARK}other work of the loop"
"""The mark around the whole window; what no inner mark names is other work."""

EXECUTOR = "ThunkExecutor::Execute"  # of a CPU: a program, or a part of one, with all its operations
HOST_COPIES = ("MemcpyH2D", "MemcpyD2H", "MemcpyHtoD", "MemcpyDtoH")
BETWEEN_OPERATIONS = "between operations"

Origins = Mapping[tuple[str, str], str]


def newest(folder: Path) -> Path:
    """The newest trace in ``folder`` or below.

    Raises:
      RunError: there is none, or it is empty.
    """
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RunError(f"{folder} holds no trace (*.xplane.pb)")
    if not found[-1].stat().st_size:  # the profiler writes nothing, and says so to nobody, past 2 GiB
        raise RunError(f"{found[-1]} is empty: a trace cannot exceed 2 GiB; profile fewer updates")
    return found[-1]


def read(path: Path, devices: int = 1) -> Timeline:
    """The timeline of a trace that was taken by ``Trace``.

    Args:
      path: the file.
      devices: how many of this process's devices are used; those that the trace does not show were idle.

    Raises:
      RunError: it is no such trace.
    """
    from jax.profiler import ProfileData

    try:
        data = ProfileData.from_file(str(path))
        planes = {plane.name: plane for plane in data.planes}
        lines = [list(line.events) for line in planes["/host:CPU"].lines]
    except Exception as error:  # whatever its reader makes of a file that is damaged
        raise RunError(f"{path} cannot be read as a trace ({type(error).__name__}: {error})") from error
    origins = op_names.origins(path)
    kernels = {op_names.as_kernel(operation): origin for (_, operation), origin in origins.items()}
    found: dict[str, list[list[Span]]] = {}
    for name, plane in planes.items():
        if name.startswith("/device:") and "CUSTOM" not in name:
            found[name] = [_device_line(events, origins, kernels) for events in _busy_lines(plane.lines)]
    if not any(any(lanes) for lanes in found.values()):
        found = _cpu(lines, origins)
    marks = max((_marks(events) for events in lines), key=len, default=[])
    window = next((span for span in marks if MARK + span.what == WINDOW), None)
    if window is None:
        raise RunError(f"{path} has no mark of the training loop: take it with --profile")
    lanes = list(found.values())
    lanes += [[] for _ in range(devices - len(lanes))]
    return Timeline((window.start, window.end), lanes, marks)


def _marks(events: Iterable[Any]) -> list[Span]:
    """What the loop did, where these are the events of its thread."""
    return [
        Span(event.start_ns, event.start_ns + event.duration_ns, HOST, event.name[len(MARK) :])
        for event in events
        if event.name.startswith(MARK)
    ]


def _busy_lines(lines: Iterable[Any]) -> list[list[Any]]:
    """The events of what a device did; other lines of its plane sum them up."""
    kept = {line.name: list(line.events) for line in lines}
    streams = [events for name, events in kept.items() if name.startswith("Stream")]
    return streams or [events for name, events in kept.items() if name == "XLA Ops"]


def _device_line(events: Iterable[Any], origins: Origins, kernels: Mapping[str, str]) -> list[Span]:
    spans = []
    for event in events:
        stats = dict(event.stats)
        end = event.start_ns + event.duration_ns
        if event.name.startswith(HOST_COPIES):
            spans.append(Span(event.start_ns, end, COPY, event.name))
            continue
        operation = str(stats.get("hlo_op", event.name))  # a kernel of a CUDA graph tells only its own name
        origin = origins.get((str(stats.get("hlo_module", "")), operation)) or kernels.get(
            op_names.as_kernel(operation)
        )
        spans.append(Span(event.start_ns, end, OPERATION, op_names.label(operation, origin)))
    return spans


def _cpu(lines: Iterable[list[Any]], origins: Origins) -> dict[str, list[list[Span]]]:
    """By device, then by thread. A thread works for one device after another."""
    found: dict[str, list[list[Span]]] = {}
    ends: dict[int, float] = {}  # an operation may end on another thread, in an event of its own
    begun: list[tuple[int, Any, dict[str, Any]]] = []
    executors: list[tuple[int, Any]] = []
    for thread, events in enumerate(lines):
        for event in events:
            if event.name == EXECUTOR:
                executors.append((thread, event))
                continue
            if event.name.startswith(("ThreadpoolListener", MARK)):
                continue
            stats = dict(event.stats)
            if "hlo_op" in stats:
                begun.append((thread, event, stats))
            elif event.name.startswith("end: ") and "_c" in stats:
                ends[int(stats["_c"])] = event.start_ns
    spans: dict[tuple[str, int], list[Span]] = {}
    owners: dict[int, list[tuple[float, str]]] = {}
    for thread, event, stats in begun:
        device, operation = str(stats.get("device_ordinal", 0)), str(stats["hlo_op"])
        end = max(event.start_ns + event.duration_ns, ends.get(int(stats.get("_p", -1)), 0.0))
        label = op_names.label(operation, origins.get((str(stats.get("hlo_module", "")), operation)))
        spans.setdefault((device, thread), []).append(Span(event.start_ns, end, OPERATION, label))
        owners.setdefault(thread, []).append((event.start_ns, device))
    for of_thread in owners.values():
        of_thread.sort()
    for thread, event in executors:  # is of the device of the first operation in it
        of_thread = owners.get(thread, [])
        place, end = bisect.bisect_left(of_thread, (event.start_ns, "")), event.start_ns + event.duration_ns
        if place < len(of_thread) and of_thread[place][0] < end:
            span = Span(event.start_ns, end, BETWEEN, BETWEEN_OPERATIONS)
            spans[of_thread[place][1], thread].append(span)
    for (device, _), lane in spans.items():
        found.setdefault(device, []).append(lane)
    return found
