"""Divide the time of a profile among operations and the loop, so that the shares sum to one.

Time in which a device works belongs to the operation that runs; operations that run at the same time share it
evenly. Time in which the device is idle belongs to what the loop was doing meanwhile. Shares are means over
devices.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

OPERATION, BETWEEN, COPY, HOST = range(4)  # in order of precedence
PLACES = ("device", "device", "copy", "host")
OUTSIDE = "outside the loop"


class Span(NamedTuple):
    """An activity from ``start`` to ``end``, in nanoseconds."""

    start: float
    end: float
    kind: int
    what: str


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The contents of a trace.

    Attributes:
      window: start and end, in nanoseconds.
      lanes: for each device the spans of each of its streams or threads; those of one lane may be nested.
      host: what the loop was doing; of nested spans the innermost counts.
    """

    window: tuple[float, float]
    lanes: Sequence[Sequence[Sequence[Span]]]
    host: Sequence[Span]


@dataclasses.dataclass(frozen=True)
class Shares:
    """How the time of a window divides.

    Attributes:
      seconds: the length of the window.
      idle: the share in which no operation ran on a device, mean over devices, in 0..1. A copy from or to the
        host is not an operation.
      rows: ``(place, what, share)``, the greatest first; the shares sum to 1.
      host: the share of each phase of the loop, whether or not a device worked meanwhile.
    """

    seconds: float
    idle: float
    rows: list[tuple[str, str, float]]
    host: dict[str, float]


def shares(timeline: Timeline) -> Shares:
    """Divide the window of ``timeline`` among its spans.

    >>> work, load = Span(0, 6, OPERATION, "dot"), Span(5, 9, HOST, "waiting for data")
    >>> found = shares(Timeline((0, 10), [[[work]]], [load]))
    >>> found.idle, found.rows[:2]
    (0.4, [('device', 'dot', 0.6), ('host', 'waiting for data', 0.3)])
    """
    begin, end = timeline.window
    length = end - begin
    totals: dict[tuple[str, str], float] = collections.defaultdict(float)
    idle = 0.0
    host = [Span(-math.inf, math.inf, HOST, OUTSIDE), *timeline.host]
    loop = list(_clip(_innermost(host), begin, end))
    for lanes in timeline.lanes:
        spans = [span for lane in lanes for span in _clip(_innermost(lane), begin, end)]
        for seconds, active in _intervals([*spans, *loop]):
            kind = min(span.kind for span in active)
            chosen = [span for span in active if span.kind == kind]
            if kind > BETWEEN:
                idle += seconds
            for span in chosen:
                totals[PLACES[kind], span.what] += seconds / len(chosen)
    total = length * len(timeline.lanes)
    rows = sorted(((*key, value / total) for key, value in totals.items()), key=lambda row: -row[2])
    phases: dict[str, float] = collections.defaultdict(float)
    for span in loop:
        phases[span.what] += (span.end - span.start) / length
    return Shares(length / 1e9, idle / total, rows, dict(sorted(phases.items(), key=lambda item: -item[1])))


def _innermost(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield the spans of one lane without overlap: of nested spans the innermost."""
    stack: list[Span] = []
    at = -math.inf

    def until(time: float) -> Iterator[Span]:
        nonlocal at
        while stack and at < time:
            top = stack[-1]
            if top.end <= at:
                stack.pop()
                continue
            stop = min(top.end, time)
            yield top._replace(start=at, end=stop)
            at = stop
        at = max(at, time)

    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        yield from until(span.start)
        at = span.start
        stack.append(span)
    yield from until(math.inf)


def _clip(spans: Iterable[Span], begin: float, end: float) -> Iterator[Span]:
    for span in spans:
        start, stop = max(span.start, begin), min(span.end, end)
        if start < stop:
            yield span._replace(start=start, end=stop)


def _intervals(spans: Sequence[Span]) -> Iterator[tuple[float, list[Span]]]:
    """Yield ``(duration, active spans)`` of every interval in which no span begins or ends."""
    edges = sorted(
        [(s.start, 1, n) for n, s in enumerate(spans)] + [(s.end, 0, n) for n, s in enumerate(spans)]
    )
    active: dict[int, Span] = {}
    before = 0.0
    for time, begins, number in edges:
        if active and time > before:
            yield time - before, list(active.values())
        before = time
        if begins:
            active[number] = spans[number]
        else:
            del active[number]
