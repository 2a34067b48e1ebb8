"""Sweeps: the metric of each setting, parallel coordinates, and how much each setting matters."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtrain.report.compare import best_valid
from jaxtrain.report.runs import Run, Sweep

FEWEST = 8
"""Importance is not computed for fewer settings."""
FOLDS, TREES, SHUFFLES = 5, 100, 20


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a sweep.

    Attributes:
      values: texts of the parameters that vary.
      runs: positions of its runs that have the metric.
      scores: the metric of each.
    """

    values: dict[str, str]
    runs: list[int]
    scores: list[float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.scores))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a sweep has found so far.

    Attributes:
      metric: its name, with the data it was computed on.
      higher: whether higher is better.
      names: of the parameters that vary.
      settings: that have at least one score, the best first.
      waiting: members without a score.
      repeats: whether a setting has several scores, as of several seeds.
    """

    metric: str
    higher: bool
    names: list[str]
    settings: list[Setting]
    waiting: int

    @property
    def repeats(self) -> bool:
        return any(len(one.scores) > 1 for one in self.settings)


@dataclasses.dataclass(frozen=True)
class Importance:
    """How much each parameter matters to a random forest that predicts the metric.

    Attributes:
      r2: the share of the variance between settings that it explains where it was not fitted, at most 1.
      loss: by parameter, by how much that share falls when the parameter's values are shuffled.
      why: why there is none, else None.
    """

    r2: float | None
    loss: dict[str, float]
    why: str | None = None


def outcome(sweep: Sweep, runs: Sequence[Run]) -> Outcome:
    """Return the metric of each setting: on the validation set, or on the test set without one.

    Members without a result do not count. On the validation set it is the value of the best checkpoint where
    the same metric has chosen it, else that of the last evaluation.
    """
    started = [runs[number] for number in sweep.members if number is not None]
    select = started[0].config.get("select", "").strip("'\"") if started else ""
    name = (sweep.metric or select).removeprefix("-")
    lower = (sweep.metric or select).startswith("-") or select == f"-{name}"
    split = "valid" if any(run.metrics.last(f"valid/{name}") is not None for run in started) else "test"
    settings: dict[tuple[tuple[str, str], ...], Setting] = {}
    waiting = 0
    for values, number in zip(sweep.settings, sweep.members, strict=True):
        score = None if number is None else _score(runs[number], split, name)
        if number is None or score is None:
            waiting += 1
            continue
        one = settings.setdefault(tuple(sorted(values.items())), Setting(values, [], []))
        one.runs.append(number)
        one.scores.append(score)
    paths = list(dict.fromkeys(path for values in sweep.settings for path in values))
    names = [path for path in paths if len({values.get(path) for values in sweep.settings}) > 1]
    ordered = sorted(settings.values(), key=lambda one: one.mean if lower else -one.mean)
    return Outcome(f"{split} {name}", not lower, names, ordered, waiting)


def _score(run: Run, split: str, name: str) -> float | None:
    best = best_valid(run)
    if run.result is None:
        return None
    if split == "test":
        found = run.numbers("test").get(name)
    elif best is not None and best[0] == name:
        found = best[1]
    else:
        found = run.metrics.last(f"valid/{name}")
    return found if found is not None and math.isfinite(found) else None


def column(texts: Sequence[str]) -> tuple[list[float], dict[float, str] | None]:
    """Return the values of a parameter as numbers, and the text of each where they are no numbers.

    >>> column(["0.1", "1e-3"])
    ([0.1, 0.001], None)
    >>> column(["'adam'", "'sgd'", "'adam'"])
    ([0.0, 1.0, 0.0], {0.0: "'adam'", 1.0: "'sgd'"})
    """
    numbers = [_as_number(text) for text in texts]
    if all(number is not None for number in numbers):
        return [float(number) for number in numbers if number is not None], None
    order = sorted(set(texts))
    return [float(order.index(text)) for text in texts], {float(n): text for n, text in enumerate(order)}


def _as_number(text: str) -> float | None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def coordinates(found: Outcome) -> dict[str, Any]:
    """Return the axes and lines of parallel coordinates as JSON.

    Each axis has ``ticks``, pairs of a place in [0, 1] and a text, and ``at``, the place of each setting.
    """
    axes = []
    for name in found.names:
        texts = [one.values.get(name, "–") for one in found.settings]
        numbers, words = column(texts)
        axes.append({"name": name, "texts": texts, **_axis(numbers, words)})
    scores = [one.mean for one in found.settings]
    axes.append({"name": found.metric, "texts": [f"{x:.5g}" for x in scores], **_axis(scores, None)})
    return {"axes": axes, "scores": scores, "higher": found.higher}


def _axis(numbers: Sequence[float], words: dict[float, str] | None) -> dict[str, Any]:
    """Place values on an axis; on a logarithmic one where they are positive and span a factor of 20."""
    values = np.asarray(numbers, np.float64)
    low, high = values.min(), values.max()
    log = words is None and low > 0 and high / low >= 20
    places = np.log(values) if log else values
    span = float(np.ptp(places)) or 1.0
    at = np.full(len(places), 0.5) if np.ptp(places) == 0 else (places - places.min()) / span
    known = np.unique(values)
    if len(known) > 6:
        known = np.array([low, high]) if log else np.linspace(low, high, 5)
    ticks = []
    for value in known:
        place = np.interp(np.log(value) if log else value, np.sort(places), np.sort(at))
        ticks.append([round(float(place), 5), f"{value:.4g}" if words is None else words[float(value)]])
    return {"at": [round(float(x), 5) for x in at], "ticks": ticks, "log": bool(log)}


def importance(found: Outcome) -> Importance:
    """Return how much each parameter matters: permutation importance of a random forest on held-out settings.

    The mean over seeds of each setting is predicted from the parameters, in five folds. The importance of a
    parameter is the fall of R² on the held-out settings when its values are shuffled among them, the mean of
    20 shuffles. It says what the forest uses, within the values that were tried; where it predicts no better
    than the mean, nothing is said. Source: Breiman, Random Forests, 2001, section 10.
    """
    count = len(found.settings)
    if count < FEWEST:
        return Importance(
            None, {}, f"it needs at least {FEWEST} settings with a result, and there are {count}"
        )
    if len(found.names) < 2:
        return Importance(None, {}, "only one parameter varies")
    scores = np.array([one.mean for one in found.settings])
    if not np.ptp(scores) > 0:
        return Importance(None, {}, "all settings have the same result")
    texts = [[one.values.get(name, "–") for one in found.settings] for name in found.names]
    inputs = np.array([column(one)[0] for one in texts]).T
    held, shuffled = _held_out(inputs, scores)
    total = float(((scores - scores.mean()) ** 2).sum())
    r2 = 1 - float(((held - scores) ** 2).sum()) / total
    if r2 <= 0:
        return Importance(r2, {}, "a forest predicts settings that it has not seen no better than their mean")
    falls = ((shuffled - scores) ** 2).sum(-1).mean(-1) / total - (1 - r2)
    return Importance(r2, {name: float(fall) for name, fall in zip(found.names, falls, strict=True)})


def _held_out(inputs: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions of held-out settings ``[n]``, and with a parameter shuffled ``[params, 20, n]``."""
    from sklearn.ensemble import RandomForestRegressor

    rng, (count, params) = np.random.default_rng(0), inputs.shape
    fold = rng.permutation(count) % FOLDS
    held = np.zeros(count)
    shuffled = np.zeros((params, SHUFFLES, count))
    orders = [[rng.permutation(count) for _ in range(SHUFFLES)] for _ in range(params)]
    for number in range(FOLDS):
        rows = np.flatnonzero(fold == number)
        forest = RandomForestRegressor(TREES, random_state=0)
        forest.fit(np.delete(inputs, rows, 0), np.delete(scores, rows))
        held[rows] = forest.predict(inputs[rows])
        for param in range(params):
            changed = np.repeat(inputs[rows][None], SHUFFLES, 0)
            changed[..., param] = [inputs[order[rows], param] for order in orders[param]]
            predicted = forest.predict(changed.reshape(-1, params))
            shuffled[param, :, rows] = predicted.reshape(SHUFFLES, -1).T
    return held, shuffled
