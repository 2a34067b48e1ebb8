"""The outcome of a sweep: a metric of every setting over its seeds, compared with the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.core.errors import RunError
from jaxtrain.sweep.members import Cell
from jaxtrain.sweep.statistics import compare, summarize

Outcome = dict[str, Any] | RunError
"""The result of a member, or why it failed."""


def tabulate(cells: Sequence[Cell], outcomes: Sequence[Outcome], select: str) -> dict[str, Any]:
    """Return the table as JSON: a row for each setting, the first one being the baseline.

    Args:
      cells: the members.
      outcomes: of each.
      select: the experiment's ``select``; its metric is compared.

    Returns:
      ``metric``; ``split``, ``"valid"`` where members have a best checkpoint by a validation set (its score
      is compared, and its test metric shown) or ``"test"`` (of the last step); ``settings``, the rows.
    """
    metric = select.removeprefix("-")
    results = [found for found in outcomes if not isinstance(found, RunError)]
    split = "valid" if results and all("best" in found for found in results) else "test"
    groups: dict[tuple[tuple[str, str], ...], list[tuple[Cell, Outcome]]] = {}
    for cell, outcome in zip(cells, outcomes, strict=True):
        groups.setdefault(tuple(cell.settings.items()), []).append((cell, outcome))
    rows: list[dict[str, Any]] = []
    baseline: dict[int, float] = {}
    for members in groups.values():
        values, tests = _values(members, select, split), _values(members, select, "test of best")
        row: dict[str, Any] = {"settings": members[0][0].shown_settings, "n": len(values)}
        row["failed"] = [
            {"seed": cell.seed, "why": str(outcome)}
            for cell, outcome in members
            if isinstance(outcome, RunError)
        ]
        row["values"] = {str(seed): value for seed, value in values.items()}
        if values:
            row |= summarize(list(values.values()))._asdict()
        if split == "valid" and tests:
            row["test"] = summarize(list(tests.values()))._asdict()
        if not rows:
            baseline = values
        elif (difference := compare(values, baseline)) is not None:
            row["difference"] = difference._asdict()
        rows.append(row)
    return {"metric": metric, "lower_is_better": select != metric, "split": split, "settings": rows}


def _values(members: Sequence[tuple[Cell, Outcome]], select: str, split: str) -> dict[int, float]:
    """Return the metric by seed, of the members that have one."""
    found, metric = {}, select.removeprefix("-")
    for cell, outcome in members:
        if isinstance(outcome, RunError):
            continue
        if split == "valid":  # a score, of which the higher one is better
            value = outcome["best"]["valid"] * (1 if select == metric else -1)
        else:
            value = (outcome["best"] if split == "test of best" and "best" in outcome else outcome)[
                "test"
            ].get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            found[cell.seed] = float(value)
    return found


def lines(table: Mapping[str, Any]) -> dict[str, str]:
    """Return the table as text: a line for each setting."""
    shown = {}
    for row in table["settings"]:
        name = " ".join(f"{path}={text}" for path, text in row["settings"].items()) or "all seeds"
        shown[name] = _line(row, table["metric"])
    better = "lower" if table["lower_is_better"] else "higher"
    compared = "validation set, best checkpoint" if table["split"] == "valid" else "test set, last update"
    return {**shown, "compared": f"{table['metric']}, {better} is better ({compared})"}


def _line(row: Mapping[str, Any], metric: str) -> str:
    """``accuracy 98.61 ± 0.24 % (95 % interval of the mean ± 0.20, n = 8)``."""
    parts = []
    if row["n"]:
        scale, unit = (100, " %") if metric == "accuracy" or metric.startswith("top") else (1, "")

        def number(value: float, sign: str = "") -> str:
            return f"{scale * value:{sign}.{2 if unit else 4}f}"

        spread = "" if row["std"] is None else f" ± {number(row['std'])}"
        interval = "" if row["ci95"] is None else f"95 % interval of the mean ± {number(row['ci95'])}, "
        parts.append(f"{metric} {number(row['mean'])}{spread}{unit} ({interval}n = {row['n']})")
        if "test" in row:
            test = row["test"]
            spread = "" if test["std"] is None else f" ± {number(test['std'])}"
            parts.append(f"test {number(test['mean'])}{spread}{unit}")
        if "difference" in row:
            found = row["difference"]
            width = "" if found["ci95"] is None else f" ± {number(found['ci95'])}"
            p = "" if found["p"] is None else f", p = {found['p']:.2g}"
            parts.append(f"{number(found['mean'], '+')}{width}{unit} to the baseline{p}")
    if row["failed"]:
        parts.append(f"{len(row['failed'])} failed")
    return "; ".join(parts) or "no result"
