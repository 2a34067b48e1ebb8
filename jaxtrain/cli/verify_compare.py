"""Compare two runs for ``verify``: example ids, metrics and final states."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jaxtrain.core.errors import RunError


def compare(one: Path, other: Path, steps: int, tolerance: float) -> dict[str, str]:
    """Compare two runs; returns a line of text for each part that was compared.

    Args:
      one: the folder of the uninterrupted run.
      other: the folder of the run to compare with it.
      steps: number of updates of both.
      tolerance: the largest relative L2 distance of two arrays; 0 asks for the same bits.

    Raises:
      RunError: on the first difference.
    """
    found = {"example ids": _compare_ids(one, other, steps)}
    ours, theirs = (_final_arrays(folder, steps) for folder in (one, other))
    for part in ("params", "opt_state", "extra"):
        paths = [path for path in ours if path.split("/")[0] == part]
        if paths:
            distance = max(_distance(path, ours[path], theirs[path], tolerance) for path in paths)
            how = f", at most {distance:.1e} apart" if tolerance else ""
            found[part.replace("_", " ")] = f"the same: {len(paths)} arrays{how}"
    found["metrics"] = _compare_metrics(one, other, steps, tolerance)
    return found


def _compare_ids(one: Path, other: Path, steps: int) -> str:
    """Compare the example ids of every step.

    Within a batch the order must be the same if one process loads the full batch, else only the set.
    """
    straight, half = _read_ids(one, "straight"), steps // 2
    phases = {"mesh": (1, steps), "killed": (1, half), "resumed": (half + 1, steps)}
    for phase, (first, last) in phases.items():
        batches = _read_ids(other, phase)
        if batches is None:
            continue
        if sorted(batches) != [*range(first, last + 1)]:
            trained = f"the steps {sorted(batches)}" if batches else "no step"
            raise RunError(f"NOT the same: phase {phase} trained {trained}, not {first} to {last}")
        for step, parts in batches.items():
            a, b = ([i for part in ids for i in part] for ids in ((straight or {}).get(step, []), parts))
            if a != b and (len(parts) == 1 or sorted(a) != sorted(b)):
                raise RunError(
                    f"NOT the same: step {step} trained on the examples {_ids_text(a)}, and in phase {phase} "
                    f"on {_ids_text(b)}"
                )
    return f"the same in {steps} steps"


def _read_ids(folder: Path, phase: str) -> dict[int, list[list[int]]] | None:
    """Read the example ids of each step, one list per process; None if the phase was not run."""
    files = sorted(folder.glob(f"{phase}-*.jsonl"))
    found: dict[int, list[list[int]]] = {}
    for file in files:
        for record in map(json.loads, file.read_text().splitlines()):
            found.setdefault(record["step"], []).append(record["ids"])
    return found if files else None


def _ids_text(ids: list[int]) -> str:
    return f"{ids[:8]}{'...' if len(ids) > 8 else ''}"


def _final_arrays(folder: Path, steps: int) -> dict[str, np.ndarray]:
    """Read the state after the last step as NumPy arrays, by path."""
    from jaxtrain import checkpoint

    with checkpoint.open(folder) as saved:
        newest = saved.latest()
    if newest is None or newest.step != steps:
        raise RunError(f"{folder.name} has no checkpoint of step {steps}")
    return checkpoint.arrays(f"{folder}:{newest.step}")


def _distance(path: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> float:
    """Return the relative L2 distance of two arrays.

    Raises:
      RunError: it is above the tolerance; with 0, any bit differs.
    """
    if ours.tobytes() == theirs.tobytes():
        return 0.0
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    distance = float(np.linalg.norm(a - b) / max(np.linalg.norm(a), np.finfo(np.float32).tiny))
    if tolerance and distance <= tolerance:
        return distance
    different = np.argwhere(~np.isclose(a, b, rtol=0, atol=0, equal_nan=True))
    first = tuple(different[0].tolist()) if len(different) else ()
    raise RunError(
        f"NOT the same: {path}: {len(different):,} of {ours.size:,} elements differ (relative L2 distance "
        f"{distance:.1e}), first at {list(first)}: {ours[first]!r} and {theirs[first]!r}"
    )


def _compare_metrics(one: Path, other: Path, steps: int, tolerance: float) -> str:
    """Compare the training metrics of every step; with a tolerance only the loss."""

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
        # Accuracy changes by full examples, so only the loss can be compared within a tolerance.
        names = ["train/loss"] if tolerance or not a else [*a, *(name for name in b if name not in a)]
        for name in names:
            x, y = a.get(name), b.get(name)
            if x is None and y is None and name in a and name in b:
                continue  # null, written for NaN
            if x is None or y is None or not (x == y or abs(x - y) <= tolerance * abs(x)):
                raise RunError(f"NOT the same: {name} of step {step} is {x} in one run and {y} in the other")
    return f"the same in {steps} records"
