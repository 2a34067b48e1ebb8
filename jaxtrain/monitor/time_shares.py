"""Where the time of a profile went: every moment is given to one thing, so that the shares sum to one.

A moment in which a device works belongs to the operation that it works on; operations that run at the same
time share it evenly. A moment in which it does not belongs to what the loop was doing, which is what held it
up. Of several devices the mean is taken.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

OPERATION, BETWEEN, COPY, HOST = range(4)  # of things at the same time the first counts
PLACES = ("device", "device", "copy", "host")
UNSEEN = "not in the loop"


class Span(NamedTuple):
    """Something that went on from ``start`` to ``end`` (nanoseconds)."""

    start: float
    end: float
    kind: int
    what: str


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What a trace tells.

    Attributes:
      window: its start and end, nanoseconds.
      lanes: for each device the spans of each of its streams or threads; spans of one may be nested.
      host: what the loop was doing; spans may be nested, and the innermost counts.
    """

    window: tuple[float, float]
    lanes: Sequence[Sequence[Sequence[Span]]]
    host: Sequence[Span]


@dataclasses.dataclass(frozen=True)
class Shares:
    """Shares of a window.

    Attributes:
      seconds: how long it was.
      idle: the mean share of it in which a device worked on no operation, in 0..1. A copy from or to the
        host is none.
      rows: ``(place, what, share)``, the greatest first; the shares sum to 1.
      host: the share of each thing that the loop did, whether or not a device worked meanwhile.
    """

    seconds: float
    idle: float
    rows: list[tuple[str, str, float]]
    host: dict[str, float]


def shares(timeline: Timeline) -> Shares:
    """Divide the window of ``timeline`` among what went on in it.

    >>> work, load = Span(0, 6, OPERATION, "dot"), Span(5, 9, HOST, "waiting for data")
    >>> found = shares(Timeline((0, 10), [[[work]]], [load]))
    >>> found.idle, found.rows[:2]
    (0.4, [('device', 'dot', 0.6), ('host', 'waiting for data', 0.3)])
    """
    begin, end = timeline.window
    length = end - begin
    given: dict[tuple[str, str], float] = collections.defaultdict(float)
    idle = 0.0
    host = [Span(-math.inf, math.inf, HOST, UNSEEN), *timeline.host]
    loop = list(_clipped(_flat(host), begin, end))
    for lanes in timeline.lanes:
        flat = [span for lane in lanes for span in _clipped(_flat(lane), begin, end)]
        for seconds, active in _moments([*flat, *loop]):
            kind = min(span.kind for span in active)
            chosen = [span for span in active if span.kind == kind]
            if kind > BETWEEN:
                idle += seconds
            for span in chosen:
                given[PLACES[kind], span.what] += seconds / len(chosen)
    whole = length * len(timeline.lanes)
    rows = sorted(((*key, value / whole) for key, value in given.items()), key=lambda row: -row[2])
    phases: dict[str, float] = collections.defaultdict(float)
    for span in loop:
        phases[span.what] += (span.end - span.start) / length
    return Shares(length / 1e9, idle / whole, rows, dict(sorted(phases.items(), key=lambda item: -item[1])))


def _flat(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans of one lane without overlap: of nested ones the inner."""
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


def _clipped(spans: Iterable[Span], begin: float, end: float) -> Iterator[Span]:
    for span in spans:
        start, stop = max(span.start, begin), min(span.end, end)
        if start < stop:
            yield span._replace(start=start, end=stop)


def _moments(spans: Sequence[Span]) -> Iterator[tuple[float, list[Span]]]:
    """``(duration, spans that go on)`` of every stretch in which nothing begins or ends."""
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
