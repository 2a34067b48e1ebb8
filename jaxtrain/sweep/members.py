"""Which runs make up a sweep: every combination of the grid's values, with every seed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.core import redact
from jaxtrain.core.errors import InputError
from jaxtrain.experiment import Experiment, config_hash, override
from jaxtrain.experiment.setting_values import split_values

MAX_MEMBERS = 10_000


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      settings: values by path, as text; empty without a grid.
      seed: its seed.
      experiment: with both.
    """

    settings: dict[str, str]
    seed: int
    experiment: Experiment

    @property
    def label(self) -> str:
        """``optimizer.lr=0.1 seed=3``."""
        return " ".join(
            [*(f"{path}={text}" for path, text in self.shown_settings.items()), f"seed={self.seed}"]
        )

    @property
    def shown_settings(self) -> dict[str, str]:
        """The settings without secrets."""
        return {
            path: redact.redact_setting(f"{path}={text}").partition("=")[2]
            for path, text in self.settings.items()
        }

    @property
    def folder_name(self) -> str:
        """``HASH-seedS``, as the default folder of a run."""
        return f"{config_hash(self.experiment)}-seed{self.seed}"


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Parse ``PATH=V1,V2,...``; commas inside of brackets and quotes belong to a value.

    Raises:
      InputError: a text has another form, or a path or a value twice.

    >>> parse_grid(["optimizer.lr=0.1,0.2", "model.widths=(32,64),(64,)"])
    {'optimizer.lr': ['0.1', '0.2'], 'model.widths': ['(32,64)', '(64,)']}
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        path, separator, values = text.partition("=")
        found = list(split_values(values))
        if not separator or not all(path.split(".")) or not all(found):
            raise InputError(f"--grid {text}: write PATH=V1,V2, such as optimizer.lr=0.05,0.1")
        if path == "seed":
            raise InputError(f"--grid {text}: give --seeds N, and the first one with --set seed=S")
        if path == "select":
            raise InputError(f"--grid {text}: a sweep compares one metric, give it with --set select=METRIC")
        if path in grid:
            raise InputError(f"--grid {text}: {path} is given twice; list all of its values once")
        if len(set(found)) < len(found):
            raise InputError(f"--grid {text}: a value is given twice")
        grid[path] = found
    return grid


def expand(experiment: Experiment, grid: Mapping[str, Sequence[str]], seeds: int) -> list[Cell]:
    """Return the runs of a sweep: all combinations, the first path slowest, each with ``seeds`` seeds.

    Args:
      experiment: what is varied; its seed is the first one.
      grid: values by path, as text.
      seeds: number of seeds, at least 1.

    Raises:
      InputError: a path or a value is wrong, or two combinations are the same experiment.

    >>> from jaxtrain.experiment import find
    >>> cells = expand(find("digits_cnn").load()[0], {"optimizer.lr.peak": ["0.1", "0.2"]}, 2)
    >>> [cell.label for cell in cells]
    ['optimizer.lr.peak=0.1 seed=0', 'optimizer.lr.peak=0.1 seed=1', 'optimizer.lr.peak=0.2 seed=0',
    'optimizer.lr.peak=0.2 seed=1']
    """
    if not isinstance(seeds, int) or seeds < 1:
        raise InputError(f"--seeds {seeds}: give a number of seeds, 1 or more")
    count = seeds
    for values in grid.values():
        count *= len(values)
    if count > MAX_MEMBERS:
        raise InputError(f"{count:,} runs are more than {MAX_MEMBERS:,}: give fewer values or seeds")
    last = experiment.seed + seeds - 1
    if last >= 2**31:
        raise InputError(f"--seeds {seeds} from seed {experiment.seed}: seeds must be below 2**31")
    cells: list[Cell] = []
    known: dict[str, dict[str, str]] = {}
    for combination in itertools.product(*grid.values()):
        settings = dict(zip(grid, combination, strict=True))
        changed = override(experiment, [f"{path}={text}" for path, text in settings.items()])
        other = known.setdefault(config_hash(changed), settings)
        if other is not settings:
            raise InputError(f"{_text(other)} and {_text(settings)} are the same experiment: leave one out")
        for seed in range(experiment.seed, last + 1):
            cells.append(Cell(settings, seed, dataclasses.replace(changed, seed=seed)))
    return cells


def _text(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{path}={text}" for path, text in settings.items())
