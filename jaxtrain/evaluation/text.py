"""A report as tables for the terminal: titles, and rows of text by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.evaluation.bootstrap import LEVEL, Interval
from jaxtrain.evaluation.report import Report
from jaxtrain.monitor import split_tables

Table = tuple[str, dict[str, str]]
"""A title, and the text of each row by its name."""

AVERAGES = ("macro", "micro", "weighted")
SHARES = ("accuracy", "exact_match", "ece", "precision", "recall", "f1", "iou", "mean_iou")
"""Figures that are shown in per cent, also as averages."""
SHOWN_CLASSES = 1000
"""Most classes of a table; JSON has the figures of any number."""
MATRIX_SHOWN = 15
"""Most classes of a confusion matrix on the terminal."""
GROUP_COLUMNS = 4
"""Figures side by side in a table of groups."""


def tables_of(
    report: Report, title: str, task: str, columns: Sequence[str], names: Sequence[str] | None
) -> list[Table]:
    """Return the tables of a report.

    Args:
      report: what is shown.
      title: of the first table, the loss's own metrics.
      task: title of the task report's numbers.
      columns: figures by class that are shown, besides AUROC and average precision.
      names: of the classes.
    """
    values, figures = split_tables(report.values)[0], split_tables(report.figures)[0]
    averages = {name for name in figures if plain_name(name) != name}
    own = {name: value for name, value in figures.items() if name not in averages}
    tables = [
        (title, {name: _with_interval(name, value, report.intervals) for name, value in values.items()}),
        (task, {name: _with_interval(name, value, report.intervals) for name, value in own.items()}),
        ("averages over classes", _averages(figures, report.intervals)),
        ("by class", _by_class(report.figures, (*columns, "auroc", "average_precision"), names)),
        ("confusion matrix (rows: true class, columns: predicted)", _confusion(report.figures, names)),
        ("reliability", _reliability(report.reliability)),
        *_groups(report),
    ]
    return [(title, rows) for title, rows in tables if rows]


def notes_of(report: Report) -> list[str]:
    """Return the lines below the tables: how intervals were computed, and what is not shown."""
    lines = []
    if report.bootstrap is not None:
        lines.append(
            f"[low, high]: {100 * LEVEL:g} % interval of {report.bootstrap.resamples:,} bootstrap "
            f"resamples of the examples, seed {report.bootstrap.seed}"
        )
    classes = np.size(report.figures.get("support", ()))
    if classes > SHOWN_CLASSES:
        lines.append(f"figures by class of {classes:,} classes: --json prints them")
    return lines


def number_text(name: str, value: float) -> str:
    """Return a figure as text: a share in per cent, a count as it is, NaN as "undefined".

    >>> number_text("accuracy", 0.9556), number_text("r2", 0.5), number_text("auroc", float("nan"))
    ('95.56 %', '0.5000', 'undefined')
    """
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "undefined"
    share = plain_name(name) in SHARES or (name.startswith("top") and name[3:].isdigit())
    return f"{100 * value:.2f} %" if share else f"{value:.4f}"


def plain_name(name: str) -> str:
    """Return the name of a figure without that of its average: ``f1`` of ``macro_f1``."""
    average, _, rest = name.partition("_")
    return rest if average in AVERAGES else name


def _with_interval(name: str, value: float, intervals: Mapping[str, Interval]) -> str:
    if name not in intervals:
        return number_text(name, value)
    low, high = (number_text(name, x).removesuffix(" %") for x in intervals[name])
    return f"{number_text(name, value)}  [{low}, {high}]"


def _averages(figures: Mapping[str, Any], intervals: Mapping[str, Interval]) -> dict[str, str]:
    found = dict.fromkeys(plain_name(name) for name in figures if plain_name(name) != name)
    cells: dict[str, list[str]] = {"": [*AVERAGES]}
    for figure in found:
        full = [f"{average}_{figure}" for average in AVERAGES]
        cells[figure] = [
            _with_interval(name, figures[name], intervals) if name in figures else "" for name in full
        ]
    return _aligned(cells) if found else {}


def _by_class(
    figures: Mapping[str, Any], columns: Sequence[str], names: Sequence[str] | None
) -> dict[str, str]:
    table = {name: np.asarray(figures[name]) for name in columns if np.ndim(figures.get(name, 0)) == 1}
    classes = len(next(iter(table.values()))) if table else 0
    if not 0 < classes <= SHOWN_CLASSES:
        return {}
    cells = {"class": list(table)}
    for number, label in enumerate(class_labels(classes, names)):
        cells[label] = [number_text(name, column[number].item()) for name, column in table.items()]
    return _aligned(cells)


def class_labels(classes: int, names: Sequence[str] | None) -> list[str]:
    """Return a different text for each class: its name, or its number where it has none.

    >>> class_labels(3, ("cat", "cat"))
    ['cat', '1 cat', '2']
    """
    labels: list[str] = []
    for number in range(classes):
        name = names[number] if names and number < len(names) else str(number)
        labels.append(name if name not in labels else f"{number} {name}")
    return labels


def _confusion(figures: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, str]:
    matrix = confusion_of(figures)
    if matrix is None or len(matrix) > MATRIX_SHOWN:
        return {}
    cells = {"": [str(number) for number in range(len(matrix))]}
    for number, label in enumerate(class_labels(len(matrix), names)):
        shown = label if names is None else f"{number} {label.removeprefix(f'{number} ')}"
        cells[shown] = [f"{count:,}" for count in matrix[number]]
    return _aligned(cells)


def confusion_of(figures: Mapping[str, Any]) -> np.ndarray | None:
    """Return the counts of (true class, predicted class) among a report's figures; None without any."""
    if "confusion" in figures:
        return np.asarray(figures["confusion"])
    names = ("true_negatives", "false_positives", "false_negatives", "true_positives")
    counts = [figures.get(name) for name in names]
    return np.array(counts).reshape(2, 2) if all(isinstance(count, int) for count in counts) else None


def _reliability(table: Mapping[str, Any] | None) -> dict[str, str]:
    if table is None:
        return {}
    cells = {"probability in": ["examples", "probability", "accuracy"]}
    for low, high, *row in zip(*table.values(), strict=True):
        if row[0]:
            cells[f"{low:.3f}-{high:.3f}"] = [f"{row[0]:,}", *(f"{100 * x:.2f} %" for x in row[1:])]
    return _aligned(cells)


def _groups(report: Report) -> list[Table]:
    """Return the tables of groups, some figures side by side, and that of the gaps."""
    if not report.groups:
        return []
    figures, tables = list(report.groups[0].figures), []
    for start in range(0, len(figures), GROUP_COLUMNS):
        shown = figures[start : start + GROUP_COLUMNS]
        cells = {str(report.field): ["examples", *shown]}
        for group in report.groups:
            row = [_with_interval(name, group.figures[name], group.intervals) for name in shown]
            cells[f"= {group.name}"] = [f"{group.examples:,}", *row]
        tables.append((f"by {report.field}", _aligned(cells)))
    gaps = {"figure": ["largest gap", "lowest in", "highest in"]}
    for name, gap in report.gaps.items():
        gaps[name] = [number_text(name, gap.size), gap.lowest, gap.highest]
    return [*tables, (f"largest gaps between values of {report.field}", _aligned(gaps))]


def _aligned(cells: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return rows of cells as text, each column as wide as its widest cell and aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*cells.values(), strict=True)]
    return {
        name: "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for name, row in cells.items()
    }
