"""Filters such as ``experiment=cifar_*`` and ``best.accuracy>0.9``, and the fields that they name."""

from __future__ import annotations

import datetime
import fnmatch
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import did_you_mean
from jaxtrain.runs.scan import Run, setting

FIELDS: dict[str, Callable[[Run], Any]] = {
    "experiment": lambda run: run.experiment,
    "folder": lambda run: run.folder,
    "state": lambda run: run.state,
    "step": lambda run: run.step,
    "steps": lambda run: run.steps,
    "metric": lambda run: None if run.metric is None else run.metric[1],
    "when": lambda run: run.when,
    "tag": lambda run: run.notes.tags,
    "note": lambda run: run.notes.note,
    "hash": lambda run: run.record.get("hash"),
    "git": lambda run: run.record.get("git"),
}
"""Fields of every run. Others are settings by their path, ``best.NAME``, ``test.NAME``, ``valid.NAME``,
``train.NAME`` and the numbers of ``result.json``."""

_ORDER = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_FILTER = re.compile(r"([\w./@+-]+?)\s*(!=|>=|<=|=|>|<)\s*(.*)", re.DOTALL)
_HOW = "write FIELD=VALUE, FIELD!=VALUE, FIELD>VALUE, >=, < or <=, in quotes for the shell"


class Filter(NamedTuple):
    """One condition.

    Attributes:
      field: what it is about.
      sign: ``=``, ``!=``, ``>``, ``>=``, ``<`` or ``<=``.
      value: as it was written.
    """

    field: str
    sign: str
    value: str

    def matches(self, run: Run) -> bool:
        """Return whether a run has this value; never where it does not have the field."""
        found = field(run, self.field)
        if found is None or found == "":
            return False
        if self.field == "tag":
            matched = any(fnmatch.fnmatchcase(tag, self.value) for tag in found)
            return matched == (self.sign == "=")
        if self.sign in _ORDER:
            compare = _ORDER[self.sign]
            if self.field == "when":
                return compare(found.replace(" ", "T"), self.value.replace(" ", "T"))
            number, wanted = _number(found), _number(self.value)
            return number is not None and wanted is not None and compare(number, wanted)
        number, wanted = _number(found), _number(self.value)
        if number is not None and wanted is not None:
            same = number == wanted
        else:
            same = fnmatch.fnmatchcase(str(found), self.value)
        return same == (self.sign == "=")


def parse(text: str) -> Filter:
    """Parse a filter.

    >>> parse("best.accuracy>=0.9")
    Filter(field='best.accuracy', sign='>=', value='0.9')

    Raises:
      InputError: it is not of this form, or compares with what is no number or time.
    """
    match = _FILTER.fullmatch(text)
    if match is None or not match[3]:
        raise InputError(f"{text!r} is not a filter: {_HOW}")
    found = Filter(*match.groups())
    if found.sign in _ORDER:
        if found.field == "tag":
            raise InputError(f"{text!r}: a tag is compared with = or !=")
        if found.field == "when" and not _is_time(found.value):
            raise InputError(
                f"{text!r}: {found.value!r} is not a time, such as 2026-11-30 or 2026-11-30T17:05"
            )
        if found.field != "when" and _number(found.value) is None:
            raise InputError(f"{text!r}: {found.value!r} is not a number, and {found.sign} compares numbers")
    return found


def select(runs: Iterable[Run], filters: Sequence[Filter], sort: str | None = None) -> list[Run]:
    """Return the runs that match all filters, sorted: the newest last, or the largest of a field.

    Args:
      runs: of ``scan.find``.
      filters: of ``parse``.
      sort: a field; runs without it come first.

    Raises:
      InputError: no run has a field that a filter or ``sort`` names.
    """
    every = list(runs)
    for name in dict.fromkeys([*(one.field for one in filters), *([] if sort is None else [sort])]):
        if every and name not in FIELDS and all(field(run, name) is None for run in every):
            known = {*FIELDS, *(known for run in every for known in names(run))}
            raise InputError(
                f"no run has the field {name!r}: {did_you_mean(name, sorted(known), otherwise=_ASK)}"
            )
    chosen = [run for run in every if all(one.matches(run) for one in filters)]
    if sort is None:
        return sorted(chosen, key=lambda run: (run.modified, run.folder))
    return sorted(chosen, key=lambda run: (*_sort_key(field(run, sort)), run.folder))


_ASK = "give a setting of config.json, best.NAME, test.NAME, or one of " + ", ".join(FIELDS)


def names(run: Run) -> list[str]:
    """Return the fields of a run other than ``FIELDS``."""
    config = run.record.get("config")
    return [
        *(config if isinstance(config, dict) else ()),
        *(f"best.{name}" for name in run.tests()),
        *(f"{split}.{name}" for split in ("test", "valid", "train") for name in run.metrics(split)),
        *(name for name, value in run.result.items() if isinstance(value, int | float)),
    ]


def field(run: Run, name: str) -> Any:
    """Return a field of a run; None where it does not have it."""
    if name in FIELDS:
        return FIELDS[name](run)
    start, _, rest = name.partition(".")
    if rest and start == "best" and rest in (tests := run.tests()):
        return tests[rest]
    if rest and start in ("test", "valid", "train") and rest in (values := run.metrics(start)):
        return values[rest]
    found = setting(run.record, name)
    if found is not None:
        return found
    result = run.result.get(name)
    return result if isinstance(result, int | float) else None


def _sort_key(value: Any) -> tuple[int, float, str]:
    """Order what is missing, then numbers (NaN first), then text."""
    if value is None:
        return 0, 0.0, ""
    number = _number(value)
    if number is None:
        return 3, 0.0, str(value)
    return (1, 0.0, "") if math.isnan(number) else (2, number, "")


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _is_time(text: str) -> bool:
    """Return whether ``text`` is an ISO date or time, or the first part of one, such as ``2026-11``.

    >>> [_is_time(text) for text in ("2026-11", "2026-11-30", "2026-11-30T17:05", "yesterday")]
    [True, True, True, False]
    """
    try:
        datetime.datetime.fromisoformat(text + "-01" if re.fullmatch(r"\d{4}-\d{2}", text) else text)
    except ValueError:
        return False
    return len(text) >= 7
