"""Compare two runs: settings, code, data, conditions, and the first metric that parts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxtrain.core.errors import InputError
from jaxtrain.runs import files
from jaxtrain.runs.scan import DAMAGED, Run

CONDITIONS = ("git", "versions", "devices", "mesh", "bits")
LIMIT = 2**30
"""Largest ``metrics.jsonl`` that is compared, in bytes."""

Pair = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Difference:
    """What differs between runs A and B. A value that one of them does not have is None.

    Attributes:
      config, code, data, conditions: values of A and B by path, only those that differ.
      step: the first update with a metric that differs; None where none does.
      metrics: values of A and B at that update, by name, only those that differ.
      same_until: the last update that both have recorded with equal metrics; 0 for none.
      tests: the test metrics that count, of A and B, by name, equal ones too.
    """

    config: Mapping[str, Pair]
    code: Mapping[str, Pair]
    data: Mapping[str, Pair]
    conditions: Mapping[str, Pair]
    step: int | None
    metrics: Mapping[str, Pair]
    same_until: int
    tests: Mapping[str, Pair]


def compare(a: Run, b: Run) -> Difference:
    """Compare two runs.

    Metrics are compared for equality, at the updates that both have recorded: losses, figures and learning
    rates, not speeds, memory and power.

    Raises:
      InputError: the record of one is damaged, or its metrics are too large.
    """
    for run in (a, b):
        if run.state == DAMAGED:
            raise InputError(f"{run.folder}: config.json cannot be read: restore it from a copy")
    step, metrics, same_until = _first_difference(_metrics(a), _metrics(b))
    tests = (a.tests(), b.tests())
    return Difference(
        config=_differences(a, b, "config"),
        code=_differences(a, b, "code"),
        data=_differences(a, b, "data"),
        conditions=differences(*({name: run.record.get(name) for name in CONDITIONS} for run in (a, b))),
        step=step,
        metrics=metrics,
        same_until=same_until,
        tests={name: (tests[0].get(name), tests[1].get(name)) for name in {**tests[0], **tests[1]}},
    )


def _differences(a: Run, b: Run, part: str) -> dict[str, Pair]:
    return differences(a.record.get(part), b.record.get(part))


def differences(a: Any, b: Any) -> dict[str, Pair]:
    """Return what differs between two records, by path.

    >>> differences({"lr": "0.1", "data": {"train": "1"}}, {"lr": "0.2", "data": {"train": "1"}})
    {'lr': ('0.1', '0.2')}
    """
    left, right = _flat(a), _flat(b)
    return {
        path: (left.get(path), right.get(path))
        for path in {**left, **right}
        if left.get(path) != right.get(path)
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {} if value is None else {path: value}
    inner = ((f"{path}.{name}" if path else name, each) for name, each in value.items())
    return {where: leaf for name, each in inner for where, leaf in _flat(each, name).items()}


def _metrics(run: Run) -> dict[int, dict[str, Any]]:
    """Return the recorded metrics by update and name; of an update that was repeated, the last ones."""
    content = files.read(run.path / "metrics.jsonl", LIMIT)
    if content is None:
        if (run.path / "metrics.jsonl").exists():
            raise InputError(f"{run.folder}/metrics.jsonl is no file that can be read, or larger than 1 GiB")
        return {}
    found: dict[int, dict[str, Any]] = {}
    for line in content.data.splitlines():
        values = files.parse(line) or {}
        step = values.get("step")
        if isinstance(step, int):
            compared = {k: v for k, v in values.items() if "/" in k or k == "learning_rate"}
            found.setdefault(step, {}).update(compared)
    return found


def _first_difference(
    a: Mapping[int, Mapping[str, Any]], b: Mapping[int, Mapping[str, Any]]
) -> tuple[int | None, dict[str, Pair], int]:
    """Return the first update that differs, what differs there, and the last one before it that is equal."""
    same_until = 0
    for step in sorted(a.keys() & b.keys()):
        left, right = a[step], b[step]
        both = [name for name in left if name in right]
        parted = {name: (left[name], right[name]) for name in both if not _equal(left[name], right[name])}
        if parted:
            return step, parted, same_until
        same_until = step
    return None, {}, same_until


def _equal(a: Any, b: Any) -> bool:
    return a == b or json.dumps(a) == json.dumps(b)  # NaN is equal to NaN here
