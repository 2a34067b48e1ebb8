"""The records of a run that is killed and resumed, and what a tracker must have of them."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from jaxtrain.monitor.files import Files
from jaxtrain.monitor.trackers import RunInfo, Trackers


def info(folder: Path) -> RunInfo:
    return RunInfo("0123456789abcdef", "digits", folder, 0, {"batch": 128, "optimizer.lr": 0.1})


def values(step: int) -> dict[str, float]:
    """What a record of ``step`` says: the same bits each time but for the speed."""
    return {"train/loss": 1 / (step + 3), "examples_per_second": time.perf_counter()}


def interrupted(folder: Path, *makers, stop: bool = False) -> list[str]:
    """Train to step 6 and be killed, resume from step 4 and finish at step 9; returns notes.

    The kill: no tracker is asked to finish, and what it had not sent is not sent. With ``stop`` they are.
    """
    notes: list[str] = []
    files = Files(folder, 0)
    sending = Trackers([make() for make in makers], info(folder), notes.append)
    sending.begin(0)
    for step in range(1, 7):
        files.write(step, values(step))
    deadline = time.monotonic() + 60
    while any(f._sent < 6 for f in sending._followers) and time.monotonic() < deadline:
        time.sleep(0.01)
    files.close()
    if stop:
        assert sending.end("stopped", 60.0) == []
    files = Files(folder, 4)  # drops the lines of steps 5 and 6
    sending = Trackers([make() for make in makers], info(folder), notes.append)
    sending.begin(4)
    for step in range(5, 10):
        files.write(step, values(step))
    files.write(9, {"test/accuracy": 0.5, "test/nothing": math.nan})
    files.close()
    assert sending.end("finished", 60.0) == []
    return notes


def expected(folder: Path) -> list[tuple[str, int, float | None]]:
    """Return (name, step, value) of every number in ``metrics.jsonl``."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sorted((n, line["step"], v) for line in lines for n, v in line.items() if n != "step")


def same_but_speed(got, wanted) -> None:
    """The same (name, step) once each, and the same bits; NaN for null, another speed of repeated steps."""
    assert [(name, step) for name, step, _ in got] == [(name, step) for name, step, _ in wanted]
    for (name, step, value), (_, _, want) in zip(got, wanted, strict=True):
        if want is None:
            assert math.isnan(value)
        elif name != "examples_per_second":
            assert value == want, (name, step)
