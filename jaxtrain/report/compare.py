"""Compare runs: seeds of one setting, means and deviations, what differs, and how to repeat each."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.report.runs import Run

CONDITIONS = ("overfit", "init_from", "mesh", "devices", "bits", "versions", "git", "code")
"""Entries of ``config.json`` besides the settings that are compared."""
MISSING = "–"


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one experiment whose settings are the same but for the seed.

    Attributes:
      label: what tells it from the other groups.
      runs: positions of its runs.
    """

    label: str
    runs: list[int]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by experiment and settings without the seed; in the order of their first runs."""
    places: dict[Any, list[int]] = {}
    for number, run in enumerate(runs):
        settings = tuple(sorted((k, v) for k, v in run.config.items() if k != "seed"))
        started = (run.name, settings, repr(run.record.get("overfit")), repr(run.record.get("init_from")))
        places.setdefault(started, []).append(number)
    groups = list(places.values())
    firsts = [runs[group[0]] for group in groups]
    names = _override_texts(firsts)
    if len(set(names)) < len(names):
        names = _setting_texts(firsts)
    labels = [
        first.label if len(group) == 1 else _shortened(name)
        for group, first, name in zip(groups, firsts, names, strict=True)
    ]
    repeated = {label for label in labels if labels.count(label) > 1}
    return [
        Group(f"{label} ({number + 1})" if label in repeated else label, group)
        for number, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]


def _override_texts(firsts: Sequence[Run]) -> list[str]:
    """Return the overrides of each run that not all have; the name of the experiment without any."""
    own = [
        [text for text in one.record.get("overrides", ()) if not text.startswith("seed=")] for one in firsts
    ]
    shared = set(own[0]).intersection(*own) if len(own) > 1 else set[str]()
    several = len({one.name for one in firsts}) > 1
    texts = []
    for one, overrides in zip(firsts, own, strict=True):
        parts = [text for text in overrides if text not in shared]
        texts.append(", ".join(([one.name] if several or not parts else []) + parts))
    return texts


def _setting_texts(firsts: Sequence[Run]) -> list[str]:
    """Return what tells each run from the others of its experiment, and the experiment's name if needed."""
    experiments = list(dict.fromkeys(one.name for one in firsts))
    texts = dict.fromkeys(range(len(firsts)), "")
    for name in experiments:
        places = [place for place, one in enumerate(firsts) if one.name == name]
        varied = [
            path for path, _ in differences([firsts[place].config for place in places]) if path != "seed"
        ]
        leaves = [path.rpartition(".")[2] for path in varied]
        short = [leaf if leaves.count(leaf) == 1 else path for leaf, path in zip(leaves, varied, strict=True)]
        for place in places:
            values = [firsts[place].config.get(path, MISSING) for path in varied]
            parts = [f"{leaf}={value}" for leaf, value in zip(short, values, strict=True)]
            texts[place] = ", ".join(([name] if len(experiments) > 1 or not parts else []) + parts)
    return list(texts.values())


def _shortened(text: str, longest: int = 50) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def differences(settings: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Return the paths whose texts are not all the same, with the text of each.

    >>> differences([{"lr": "0.1", "batch": "32"}, {"lr": "0.2", "batch": "32"}])
    [('lr', ['0.1', '0.2'])]
    """
    paths = list(dict.fromkeys(path for one in settings for path in one))
    rows = [(path, [one.get(path, MISSING) for one in settings]) for path in paths]
    return [(path, texts) for path, texts in rows if len(set(texts)) > 1]


def conditions(run: Run) -> dict[str, str]:
    """Return the settings of a run and the conditions under which it started, as texts by path."""
    return run.config | {
        path: text for name in CONDITIONS for path, text in _flat(name, run.record.get(name)).items()
    }


def _flat(path: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        return {p: text for k, v in value.items() for p, text in _flat(f"{path}.{k}", v).items()}
    if isinstance(value, list):
        counted = {str(one): value.count(one) for one in value}
        return {path: ", ".join(f"{n} × {one}" if n > 1 else one for one, n in counted.items())}
    return {} if value is None else {path: str(value)}


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (n - 1); NaN where undefined, as of one value.

    >>> mean_and_std([1.0, 2.0, 3.0])
    (2.0, 1.0)
    """
    array = np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        return math.nan, math.nan
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else math.nan


def number_text(value: float | None, digits: int = 5) -> str:
    """Return a number with ``digits`` significant digits.

    >>> [number_text(x) for x in (0.975, 12345.6, 66.0, float("nan"), None)]
    ['0.975', '12,346', '66', 'not finite', '–']
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}"


def with_deviation(values: Sequence[float], expected: int | None = None) -> str:
    """Return mean ± standard deviation, the latter with two digits, and n where it is not the expected one.

    >>> with_deviation([0.9741, 0.9805, 0.9778]), with_deviation([0.5, 0.7], 2)
    ('0.9775 ± 0.0032 (n = 3)', '0.60 ± 0.14')
    """
    mean, std = mean_and_std(values)
    count = "" if len(values) == expected else f" (n = {len(values)})"
    if math.isnan(std) or not math.isfinite(mean):
        return f"{number_text(mean)}{count}"
    if std <= 0:
        return f"{number_text(mean)} ± 0{count}"
    decimals = max(0, 1 - math.floor(math.log10(std)))
    if decimals > 12:
        return f"{number_text(mean)} ± {std:.1e}{count}"
    return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}{count}"


def figures(run: Run) -> dict[str, float]:
    """Return the numbers of a run's result by title: of the best step, the last, speed, memory, energy."""
    result = run.result or {}
    best = result.get("best")
    found = {f"test {name}, best step": value for name, value in run.numbers("best", "test").items()}
    if found and isinstance(best, dict):
        own = best_valid(run)
        found = {**({f"valid {own[0]}, best": own[1]} if own else {}), **found}
    found |= {f"test {name}": value for name, value in run.numbers("test").items()}
    top = run.numbers()
    titles = {
        "seconds": "seconds",
        "examples_per_second": "examples / s",
        "device_peak_bytes": "device memory, peak (MB)",
        "process_rss_peak_bytes": "process memory, peak (MB)",
        "energy_joules": "energy (J)",
    }
    for name, title in titles.items():
        if name in top:
            found[title] = top[name] / 1e6 if "MB" in title else top[name]
    return found


def best_valid(run: Run) -> tuple[str, float] | None:
    """Return the metric that chose the best checkpoint and its value there; None without a validation set."""
    score = run.numbers("best").get("valid")
    select = run.config.get("select", "").strip("'\"")
    if score is None:
        return None
    return select.removeprefix("-"), -score if select.startswith("-") else score


def state(run: Run) -> str:
    """Return how far a run is: ``finished``, or ``running`` or ``stopped`` with its last logged step."""
    if run.result is not None:
        return "finished"
    of = "" if run.steps is None else f" of {run.steps:,}"
    return f"{'running' if run.running else 'stopped'}, step {int(run.metrics.last_step):,}{of}"


def command(run: Run) -> str:
    """Return the command that trains the same: the overridden settings, and the mesh of the first start.

    Its data and its code are not in the run's folder.
    """
    record = run.record
    words = ["python", "-m", "jaxtrain.run", "--experiment", _experiment(record)]
    for setting in record.get("overrides", ()):
        words += ["--set", setting]
    if isinstance(record.get("overfit"), int):
        words += ["--overfit", str(record["overfit"])]
    source = record.get("init_from")
    if source:
        words += ["--init-from", source[0]]
        words += [word for rename in source[1] for word in ("--init-map", rename)]
    mesh, bits = record.get("mesh"), record.get("bits")
    if isinstance(mesh, dict):
        sizes = {k: v for k, v in mesh.items() if isinstance(v, int) and v > 1}
        if sizes:
            words += ["--mesh", ",".join(f"{name}={size}" for name, size in sizes.items())]
    if isinstance(bits, dict) and bits.get("deterministic") is True:
        words += ["--deterministic"]
    return shlex.join(words)


def _experiment(record: Mapping[str, Any]) -> str:
    """Return how the experiment is named: by its file where that is not in a folder of experiments."""
    origin = record.get("origin")
    if isinstance(origin, str) and origin.endswith(".py") and Path(origin).parent.name != "experiments":
        return origin
    return str(record["name"])
