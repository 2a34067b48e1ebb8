"""The report of an evaluation: what was measured, from which all output is made."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.files import as_json
from jaxtrain.evaluation.bootstrap import LEVEL, Bootstrap, Interval
from jaxtrain.evaluation.collect import GROUP, LIMIT, ROWS, example_rows
from jaxtrain.evaluation.figures import Figures, figures_of
from jaxtrain.evaluation.groups import Gap, Group, group_figures, largest_gaps
from jaxtrain.metrics.figures import REPORT
from jaxtrain.program.loader import EXAMPLE_ID

SCORES_LEFT_OUT = (
    f"AUROC and average precision are left out: the scores of all examples are more than {LIMIT:,} numbers"
)

TOO_SLOW = (
    "AUROC and average precision have no intervals: {:,} resamples of {:,} scores would take minutes: use "
    "fewer with --ci N"
)


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of an evaluation.

    Attributes:
      values: the loss's own metrics by name, numbers and tables.
      figures: those of the task report that the loss does not report too, numbers and arrays by class.
      reliability: the columns of the reliability curve; None where there are no probabilities.
      intervals: the bootstrap interval of each number; {} where they were not asked for.
      bootstrap: how they were computed.
      field: the field whose values are the groups; None without groups.
      groups: their figures, with intervals.
      ids: the position of each example in the split: int ``[n]``; None where nothing was collected.
      examples: figures of the collected examples, and the columns of a file of them.
    """

    values: dict[str, Any]
    figures: dict[str, Any]
    reliability: dict[str, Any] | None = None
    intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
    bootstrap: Bootstrap | None = None
    field: str | None = None
    groups: tuple[Group, ...] = ()
    ids: np.ndarray | None = None
    examples: Figures | None = None

    @functools.cached_property
    def gaps(self) -> dict[str, Gap]:
        """The largest gap of each figure between groups."""
        return largest_gaps(list(self.groups)) if self.groups else {}

    def as_json(self) -> dict[str, Any]:
        """Return all figures by name; what is undefined in tables of intervals, bins and groups is None."""
        body: dict[str, Any] = {**self.values, **self.figures}
        if self.reliability is not None:
            body["reliability"] = as_json(self.reliability)
        if self.bootstrap is not None:
            about = {**dataclasses.asdict(self.bootstrap), "level": LEVEL, "method": "percentile"}
            body["bootstrap"] = {
                **about,
                **({"intervals": as_json(self.intervals)} if self.intervals else {}),
            }
        if self.groups:
            groups = {
                "field": self.field,
                "by_value": {
                    group.name: {"examples": group.examples, **group.figures, "intervals": group.intervals}
                    for group in self.groups
                },
                "largest_gaps": {name: dataclasses.asdict(gap) for name, gap in self.gaps.items()},
            }
            body["groups"] = as_json(groups)
        return body


def check_collects(report: Any, wanted: list[str]) -> None:
    """Raise InputError if flags need what is collected of each example, and nothing is for this report.

    Args:
      report: a task report, or None.
      wanted: the flags, such as ``["--ci"]``.
    """
    if wanted and example_rows.dispatch(type(report)) is example_rows.dispatch(object):
        what = "names none" if report is None else "has one of its own"
        raise InputError(
            f"{', '.join(wanted)}: this needs a task report of jaxtrain.metrics, and the experiment {what}: "
            "add report=metrics.Classification(), or another, to the experiment"
        )


def make_report(
    report: Any,
    values: Mapping[str, Any],
    by: str | None = None,
    ci: Bootstrap | None = None,
    wanted: list[str] | None = None,
) -> tuple[Report, list[str]]:
    """Make the report of an evaluation; also returns notes for the user, a line each.

    Args:
      report: the task report; None where there is none.
      values: what an evaluation with ``Collect`` computed.
      by: the name of the field with the groups, if any.
      ci: compute intervals of all figures in this way; None computes those of groups only.
      wanted: flags that need what is collected of each example.

    Raises:
      InputError: more would have to be collected than ``LIMIT``, or there are too many groups.
    """
    values = dict(values)
    figures, rows = values.pop(REPORT, {}), values.pop(ROWS, None)
    kept, notes = without_repeats(figures, values), list[str]()
    if rows is None:
        if wanted:
            raise InputError(
                f"{', '.join(wanted)}: more than {LIMIT:,} numbers would have to be collected: evaluate "
                "fewer examples, such as with --source"
            )
        return Report(values, kept), notes
    ids, groups = rows.pop(EXAMPLE_ID), rows.pop(GROUP, None)
    if "rank" in rows and "scores" not in rows:
        notes.append(SCORES_LEFT_OUT)
    examples = figures_of(report, rows)
    numbers, tables = examples.numbers(), examples.tables()
    rename, reliability = _shown_names(numbers, values), tables.pop("reliability", None)
    kept |= {k: v for k, v in _renamed(numbers, rename).items() if k not in kept and k not in values}
    kept |= {k: v for k, v in tables.items() if k not in figures}
    bootstrap, intervals, by_group = ci, dict[str, Interval](), tuple[Group, ...]()
    if ci is not None:
        intervals = _renamed(ci.intervals(examples, len(ids)), rename)
        if not ci.ranks(examples.ranking_work):
            notes.append(TOO_SLOW.format(ci.resamples, examples.ranking_work))
    if by is not None and groups is not None:
        bootstrap = ci or Bootstrap()
        by_group = tuple(
            dataclasses.replace(
                group, figures=_renamed(group.figures, rename), intervals=_renamed(group.intervals, rename)
            )
            for group in group_figures(report, rows, groups, by, bootstrap)
        )
    made = Report(
        values, kept, reliability, intervals, bootstrap, by if by_group else None, by_group, ids, examples
    )
    return made, notes


def without_repeats(figures: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report's figures without those that the loss reports too.

    One that differs from the loss's metric of the same name is called ``report_NAME``.

    >>> without_repeats({"accuracy": 0.5, "recall": 1.0}, {"accuracy": 0.5})
    {'recall': 1.0}
    """
    kept = {}
    for name, figure in figures.items():
        if name not in values:
            kept[name] = figure
        elif not _same(figure, values[name]):
            kept[f"report_{name}"] = figure
    return kept


def _shown_names(numbers: Mapping[str, float], values: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures that are shown under another name, because the loss reports one of theirs."""
    names = {
        name: f"report_{name}"
        for name, number in numbers.items()
        if name in values and not _same(number, values[name], 1e-5)
    }
    if "log_loss" in numbers and _same(numbers["log_loss"], values.get("loss"), 1e-5):
        names["log_loss"] = "loss"
    return names


def _renamed(figures: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    return {rename.get(name, name): value for name, value in figures.items()}


def _same(a: Any, b: Any, relative: float = 1e-6) -> bool:
    """Return whether both are the same number, NaN included."""
    if not (isinstance(a, int | float) and isinstance(b, int | float)):
        return False
    return math.isclose(a, b, rel_tol=relative) or (math.isnan(a) and math.isnan(b))
