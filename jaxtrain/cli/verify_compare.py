"""What ``verify`` compares of two runs: what they were fed, what they recorded and what they ended with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jaxtrain.core.errors import RunError


def compare(one: Path, other: Path, steps: int, tolerance: float) -> dict[str, str]:
    """What was the same, a line each.

    Args:
      one: the folder of the run that went straight through.
      other: that of the run it is held against.
      steps: updates of both.
      tolerance: relative L2 distance of arrays that is allowed; 0 asks for the same bits.

    Raises:
      RunError: the first difference.
    """
    found = {"example ids": _same_ids(one, other, steps)}
    ours, theirs = (_arrays(folder, steps) for folder in (one, other))
    for part in ("params", "opt_state", "extra"):
        paths = [path for path in ours if path.split("/")[0] == part]
        if paths:
            worst = max(_distance(path, ours[path], theirs[path], tolerance) for path in paths)
            how = f", at most {worst:.1e} apart" if tolerance else ""
            found[part.replace("_", " ")] = f"the same: {len(paths)} arrays{how}"
    found["metrics"] = _same_metrics(one, other, steps, tolerance)
    return found


def _same_ids(one: Path, other: Path, steps: int) -> str:
    """Every step of each phase, and no other; the order within a batch too, if one process has it all."""
    straight, half = _fed(one, "straight"), steps // 2
    phases = {"mesh": (1, steps), "killed": (1, half), "resumed": (half + 1, steps)}
    for phase, (first, last) in phases.items():
        fed = _fed(other, phase)
        if fed is None:
            continue
        if sorted(fed) != [*range(first, last + 1)]:
            there = f"the steps {sorted(fed)} were fed" if fed else "no step was fed"
            raise RunError(f"NOT the same: {phase}, {there}, not {first} to {last}")
        for step, parts in fed.items():
            a, b = ([i for part in ids for i in part] for ids in ((straight or {}).get(step, []), parts))
            if a != b and (len(parts) == 1 or sorted(a) != sorted(b)):
                raise RunError(
                    f"NOT the same: step {step} was fed the examples {_some(a)}, and {phase} {_some(b)}"
                )
    return f"the same in {steps} steps"


def _fed(folder: Path, phase: str) -> dict[int, list[list[int]]] | None:
    """The example ids of each step, a list for each process; None where that phase was not."""
    files = sorted(folder.glob(f"{phase}-*.jsonl"))
    found: dict[int, list[list[int]]] = {}
    for file in files:
        for record in map(json.loads, file.read_text().splitlines()):
            found.setdefault(record["step"], []).append(record["ids"])
    return found if files else None


def _some(ids: list[int]) -> str:
    return f"{ids[:8]}{'...' if len(ids) > 8 else ''}"


def _arrays(folder: Path, steps: int) -> dict[str, np.ndarray]:
    """The state after the last step, by path, read by this process on one device."""
    from jaxtrain import checkpoint

    with checkpoint.open(folder) as saved:
        newest = saved.latest()
    if newest is None or newest.step != steps:
        raise RunError(f"{folder.name} has no checkpoint of step {steps}")
    return checkpoint.arrays(f"{folder}:{newest.step}")


def _distance(path: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> float:
    """Relative L2 distance of two arrays.

    Raises:
      RunError: it is above the tolerance; with 0, any bit differs.
    """
    if ours.tobytes() == theirs.tobytes():
        return 0.0
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    distance = float(np.linalg.norm(a - b) / max(np.linalg.norm(a), np.finfo(np.float32).tiny))
    if tolerance and distance <= tolerance:
        return distance
    unlike = np.argwhere(~np.isclose(a, b, rtol=0, atol=0, equal_nan=True))
    first = tuple(unlike[0].tolist()) if len(unlike) else ()
    raise RunError(
        f"NOT the same: {path}: {len(unlike):,} of {ours.size:,} elements differ (relative L2 distance "
        f"{distance:.1e}), first at {list(first)}: {ours[first]!r} and {theirs[first]!r}"
    )


def _same_metrics(one: Path, other: Path, steps: int, tolerance: float) -> str:
    """The records of training, step by step; with a tolerance those of the loss."""

    def read(folder: Path) -> dict[int, dict[str, float]]:
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {
            record["step"]: {name: value for name, value in record.items() if name.startswith("train/")}
            for record in records
            if "train/loss" in record
        }

    ours, theirs = read(one), read(other)
    for step in range(1, steps + 1):
        a, b = ours.get(step, {}), theirs.get(step, {})
        # An accuracy moves by whole examples, so within a tolerance only the loss can be compared.
        names = ["train/loss"] if tolerance or not a else [*a, *(name for name in b if name not in a)]
        for name in names:
            x, y = a.get(name), b.get(name)
            if x is None or y is None or not (x == y or abs(x - y) <= tolerance * abs(x)):
                raise RunError(f"NOT the same: {name} of step {step} is {x}, and then {y}")
    return f"the same in {steps} records"
