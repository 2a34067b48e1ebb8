"""Read a trace (``.xplane.pb``) of JAX's profiler, without TensorFlow.

Its layout differs by device. A GPU has a plane, ``/device:GPU:0``, with a line of kernels and copies for each
stream. A TPU has a plane with a line ``XLA Ops``. A CPU's operations are events of the host plane's threads,
and their statistics name the operation.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import RunError
from jaxtrain.monitor.op_names import kernel_name, label
from jaxtrain.monitor.time_shares import BETWEEN, COPY, HOST, OPERATION, Span, Timeline

MARK = "jaxtrain:"
"""Prefix of the loop's marks: ``jaxtrain:waiting for data``."""
WINDOW = f"{MARK}other work of the loop"
"""The mark around the profiled window; time under no inner mark is other work."""

EXECUTOR = "ThunkExecutor::Execute"  # a program, or a part of one, on a CPU
HOST_COPIES = ("MemcpyH2D", "MemcpyD2H", "MemcpyHtoD", "MemcpyDtoH")
BETWEEN_OPERATIONS = "between operations"

OpNames = Mapping[tuple[str, str], str]


def newest(folder: Path) -> Path:
    """Return the newest trace in ``folder`` or below.

    Raises:
      RunError: there is none, or it is empty.
    """
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RunError(f"no trace (*.xplane.pb) in {folder}")
    if not found[-1].stat().st_size:  # past 2 GiB the profiler writes an empty file and reports no error
        raise RunError(f"{found[-1]} is empty: a trace cannot exceed 2 GiB; profile fewer updates")
    return found[-1]


def read(path: Path, devices: int = 1, op_names: OpNames | None = None) -> Timeline:
    """Read the timeline of a trace that ``Trace`` took.

    Args:
      path: the file.
      devices: how many of this process's devices the run uses; those missing from the trace were idle.
      op_names: ``{(program, operation): op_name}`` to label operations by (``op_names.op_names``); an
        operation that is not in it keeps XLA's name.

    Raises:
      RunError: the file is damaged or has no mark of the training loop.
    """
    from jax.profiler import ProfileData

    try:
        data = ProfileData.from_file(str(path))
        planes = {plane.name: plane for plane in data.planes}
        lines = [list(line.events) for line in planes["/host:CPU"].lines]
    except Exception as error:  # jaxlib's reader raises various types for a damaged file
        raise RunError(f"{path} cannot be read as a trace ({type(error).__name__}: {error})") from error
    op_names = op_names or {}
    kernels = {kernel_name(operation): op_name for (_, operation), op_name in op_names.items()}
    found: dict[str, list[list[Span]]] = {}
    for name, plane in planes.items():
        if name.startswith("/device:") and "CUSTOM" not in name:
            found[name] = [_device_spans(events, op_names, kernels) for events in _busy_lines(plane.lines)]
    if not any(any(lanes) for lanes in found.values()):
        found = _cpu_lanes(lines, op_names)
    marks = max((_marks(events) for events in lines), key=len, default=[])
    window = next((span for span in marks if MARK + span.what == WINDOW), None)
    if window is None:
        raise RunError(f"{path} has no mark of the training loop: take the trace with --profile")
    lanes = list(found.values())
    lanes += [[] for _ in range(devices - len(lanes))]
    return Timeline((window.start, window.end), lanes, marks)


def _marks(events: Iterable[Any]) -> list[Span]:
    """Return the loop's marks among the events of a thread."""
    return [
        Span(event.start_ns, event.start_ns + event.duration_ns, HOST, event.name[len(MARK) :])
        for event in events
        if event.name.startswith(MARK)
    ]


def _busy_lines(lines: Iterable[Any]) -> list[list[Any]]:
    """Return the events of a device's streams; the other lines of its plane are summaries."""
    by_name = {line.name: list(line.events) for line in lines}
    streams = [events for name, events in by_name.items() if name.startswith("Stream")]
    return streams or [events for name, events in by_name.items() if name == "XLA Ops"]


def _device_spans(events: Iterable[Any], op_names: OpNames, kernels: Mapping[str, str]) -> list[Span]:
    spans = []
    for event in events:
        stats = dict(event.stats)
        end = event.start_ns + event.duration_ns
        if event.name.startswith(HOST_COPIES):
            spans.append(Span(event.start_ns, end, COPY, event.name))
            continue
        operation = str(stats.get("hlo_op", event.name))  # a kernel of a CUDA graph has only its own name
        key = (str(stats.get("hlo_module", "")), operation)
        op_name = op_names.get(key) or kernels.get(kernel_name(operation))
        spans.append(Span(event.start_ns, end, OPERATION, label(operation, op_name)))
    return spans


def _cpu_lanes(lines: Iterable[list[Any]], op_names: OpNames) -> dict[str, list[list[Span]]]:
    """Return spans by device, then by thread. A thread works for one device after another."""
    ends: dict[int, float] = {}  # an operation may end on another thread, in a separate event
    operations: list[tuple[int, Any, dict[str, Any]]] = []
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
                operations.append((thread, event, stats))
            elif event.name.startswith("end: ") and "_c" in stats:
                ends[int(stats["_c"])] = event.start_ns
    spans: dict[tuple[str, int], list[Span]] = {}
    owners: dict[int, list[tuple[float, str]]] = {}
    for thread, event, stats in operations:
        device, operation = str(stats.get("device_ordinal", 0)), str(stats["hlo_op"])
        end = max(event.start_ns + event.duration_ns, ends.get(int(stats.get("_p", -1)), 0.0))
        text = label(operation, op_names.get((str(stats.get("hlo_module", "")), operation)))
        spans.setdefault((device, thread), []).append(Span(event.start_ns, end, OPERATION, text))
        owners.setdefault(thread, []).append((event.start_ns, device))
    for of_thread in owners.values():
        of_thread.sort()
    for thread, event in executors:  # an executor belongs to the device of the first operation in it
        of_thread = owners.get(thread, [])
        first, end = bisect.bisect_left(of_thread, (event.start_ns, "")), event.start_ns + event.duration_ns
        if first < len(of_thread) and of_thread[first][0] < end:
            span = Span(event.start_ns, end, BETWEEN, BETWEEN_OPERATIONS)
            spans[of_thread[first][1], thread].append(span)
    found: dict[str, list[list[Span]]] = {}
    for (device, _), lane in spans.items():
        found.setdefault(device, []).append(lane)
    return found
