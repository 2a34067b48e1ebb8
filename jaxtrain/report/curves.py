"""The series of runs as JSON for the page: thinned, with means and deviations over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtrain.report.compare import Group
from jaxtrain.report.metrics_file import Thinned, thin
from jaxtrain.report.runs import Run

POINTS = 400_000
"""About how many points a page has at most: 6 MB."""
MOST_BUCKETS, FEWEST_BUCKETS = 1000, 10
CHARTS = 48
"""Most charts of a page."""
SPLITS = ("train", "valid", "test")
RESOURCES = (
    "examples_per_second",
    "tokens_per_second",
    "flops_per_second",
    "step_ms_p50",
    "step_ms_p99",
    "device_bytes",
    "device_peak_bytes",
    "process_rss_bytes",
    "process_rss_peak_bytes",
    "power_watts",
    "energy_joules",
    "joules_per_million_examples",
)
"""Numbers of throughput, memory and energy; the page draws them in a section of their own."""
FIRST = ("loss", "accuracy")


@dataclasses.dataclass(frozen=True)
class Curves:
    """The charts of a page as JSON, and how the series were thinned.

    Attributes:
      body: ``charts`` (name and section), ``runs`` (series by name and the scale of the x axis of each) and
        ``groups`` (means and deviations).
      notes: lines for the page.
    """

    body: dict[str, Any]
    notes: list[str]


def make_curves(runs: Sequence[Run], groups: Sequence[Group]) -> Curves:
    """Return what the page draws."""
    charts, left_out = charts_of(runs)
    shown = {name for chart in charts for name in chart["series"]}
    count = sum(len(shown.intersection(run.metrics.names)) for run in runs)
    buckets = max(FEWEST_BUCKETS, min(MOST_BUCKETS, POINTS // max(1, 2 * count)))
    thinned: list[dict[str, Thinned]] = []
    longest, notes = 0, []
    for run in runs:
        series = {}
        for name in (name for name in run.metrics.names if name in shown):
            step, value = run.metrics.series(name)
            longest = max(longest, len(step))
            series[name] = thin(step, value, buckets)
        thinned.append(series)
    if longest > 2 * buckets:
        notes.append(
            f"Series of more than {2 * buckets:,} points (the longest has {longest:,}) are thinned: of each "
            f"of {buckets:,} buckets the lowest and the highest value are drawn. Smoothing and means over "
            "seeds take the means of the buckets."
        )
    if left_out:
        notes.append(f"{left_out} more metrics are not drawn: a page has at most {CHARTS} charts.")
    notes += [line for run in runs for line in _notes(run)]
    body = {
        "charts": charts,
        "runs": [
            {"series": {name: _series(one) for name, one in series.items()}, **_scales(run)}
            for run, series in zip(runs, thinned, strict=True)
        ],
        "groups": [
            {name: band for name in sorted(shown) if (band := _band(group, thinned, name)) is not None}
            for group in groups
        ],
    }
    return Curves(body, notes)


def charts_of(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], int]:
    """Return the charts, the loss first, and how many are left out.

    Splits of a metric share a chart: ``train/loss`` and ``test/loss`` are drawn as ``loss``.
    """
    charts: dict[str, dict[str, Any]] = {}
    for run in runs:
        for name in run.metrics.names:
            split, _, rest = name.partition("/")
            title = rest if split in SPLITS and rest else name
            section = "resources" if name in RESOURCES else "curves"
            chart = charts.setdefault(title, {"name": title, "section": section, "series": []})
            if name not in chart["series"]:
                chart["series"].append(name)
    charts.pop("epoch", None)  # an x axis

    def rank(chart: dict[str, Any]) -> tuple[int, int]:
        name = chart["name"]
        evaluated = any(one.startswith(("valid/", "test/")) for one in chart["series"])
        order = FIRST.index(name) if name in FIRST else len(FIRST)
        if name in RESOURCES:
            return 2, RESOURCES.index(name)
        return 0 if evaluated or name in FIRST else 1, order

    found = sorted(charts.values(), key=rank)
    for chart in found:
        chart["series"].sort(
            key=lambda name: SPLITS.index(split) if (split := name.split("/")[0]) in SPLITS else 9
        )
    return found[:CHARTS], max(0, len(found) - CHARTS)


def _notes(run: Run) -> list[str]:
    metrics, lines = run.metrics, []
    if metrics.bad_lines:
        lines.append(
            f"{run.label}: {metrics.bad_lines:,} lines of metrics.jsonl cannot be read and are left out."
        )
    if metrics.not_finite:
        names = ", ".join(f"{name} ({count:,})" for name, count in list(metrics.not_finite.items())[:5])
        lines.append(f"{run.label}: values that are not finite are gaps: {names}.")
    return lines


def _series(one: Thinned) -> dict[str, Any]:
    body: dict[str, Any] = {"x": rounded(one.step), "y": rounded(one.value)}
    if one.mean is not None:
        body["mean"] = {"x": rounded(one.mean[0]), "y": rounded(one.mean[1])}
    return body


def _scales(run: Run) -> dict[str, Any]:
    """Return what turns a step into an epoch and into seconds of training: pairs to interpolate between."""
    scales: dict[str, Any] = {}
    step, epoch = run.metrics.series("epoch")
    if len(step) and step[-1] > 0 and np.isfinite(epoch[-1]):
        scales["epoch"] = {"x": [0, float(step[-1])], "y": [0, float(epoch[-1])]}
    step, seconds = training_seconds(run)
    if len(step):
        places = np.unique(np.linspace(0, len(step) - 1, min(len(step), 200)).astype(int))
        scales["seconds"] = {"x": rounded(step[places]), "y": rounded(seconds[places])}
    return scales


def training_seconds(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and the seconds of training until each, from the logged speed; empty where it is unknown.

    Without compilation, evaluation and saving.
    """
    step, speed = run.metrics.series("examples_per_second")
    right = np.isfinite(speed) & (speed > 0)
    step, speed = step[right], speed[right]
    try:
        batch = float(run.config["batch"])
    except (KeyError, ValueError):
        return np.zeros(0), np.zeros(0)
    if not len(step) or not batch > 0:
        return np.zeros(0), np.zeros(0)
    spans = np.diff(step, prepend=0.0) * batch / speed
    return np.append(0.0, step), np.append(0.0, np.cumsum(spans))


def _band(group: Group, thinned: Sequence[dict[str, Thinned]], name: str) -> dict[str, Any] | None:
    """Return mean and standard deviation of a series over the runs of a group; None of fewer than two."""
    lines = [thinned[number][name].line for number in group.runs if name in thinned[number]]
    lines = [(x[finite], y[finite]) for x, y in lines if (finite := np.isfinite(y)).any()]
    if len(lines) < 2:
        return None
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.unique(np.concatenate([x for x, _ in lines]))
    grid = grid[(grid >= start) & (grid <= end)]
    if not len(grid):
        return None
    if len(grid) > 2 * MOST_BUCKETS:
        grid = np.linspace(start, end, MOST_BUCKETS)
    values = np.stack([np.interp(grid, x, y) for x, y in lines])
    mean, std = values.mean(0), values.std(0, ddof=1)
    return {"x": rounded(grid), "mean": rounded(mean), "std": rounded(std), "n": len(lines)}


def rounded(values: np.ndarray) -> list[float | None]:
    """Return numbers for JSON with seven significant digits; None for NaN and infinity.

    >>> rounded(np.array([1 / 3, 25.0, np.nan]))
    [0.3333333, 25, None]
    """
    return [_rounded(float(value)) for value in values]


def _rounded(value: float) -> float | None:
    if not np.isfinite(value):
        return None
    if value == int(value) and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.7g}")
