"""``run --list``: one line an experiment, without waiting for JAX where nothing has changed since the last.

To count parameters an experiment is loaded and its model traced, which takes JAX and some tenths of a second.
What was found is kept for the next time, by what is in the file and which code it was found with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtrain import __version__
from jaxtrain.core import cache, redact
from jaxtrain.core.errors import InputError
from jaxtrain.core.files import write_json
from jaxtrain.experiment.registry import PACKAGE, discover

if TYPE_CHECKING:
    from jaxtrain.experiment.registry import Entry

FILE = "listing.json"
MOST = 1000  # rows that are kept
UNKNOWN = "–"  # parameters, until the data set is prepared
COLUMNS = ("name", "what it is", "data", "model", "parameters")


def show() -> int:
    """Print the table; returns the exit code. Reads no data and starts no backend."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column == "parameters" else "left")
    known, rows, code = _read(), {}, _files(PACKAGE.rglob("*.py"))
    for entry in discover():
        key = _key(entry, code)
        row = known.get(key) or _described(entry)
        if len(row) == len(COLUMNS) - 1 and row[-1] != UNKNOWN and entry.point is None:
            rows[key] = row
        table.add_row(entry.name, *row)
    if rows.keys() - known.keys():
        _write({**rows, **known})
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, width=width).print(table)
    return 0


def _described(entry: Entry) -> list[str]:
    from jaxtrain.program.check_fields import describe_experiment

    try:
        experiment, line = entry.load()
        return [line, *describe_experiment(experiment)]
    except InputError as error:  # one broken file must not hide the others
        return [redact.redact(f"cannot be loaded: {error}")]  # before a cell cuts it


def _key(entry: Entry, code: str) -> str:
    """Stands for the experiment's file, its neighbours, which it may import, and jaxtrain's ``code``."""
    near = _files(Path(entry.origin).parent.glob("*.py")) if entry.point is None else ""
    return _digest((__version__, entry.name, entry.origin, near, code))


def _files(paths: Iterable[Path]) -> str:
    """Stands for what is in the files, as far as their sizes and times tell."""
    return _digest([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)])


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def _read() -> dict[str, list[str]]:
    folder = cache.private_folder("listing")
    try:
        found = json.loads((folder / FILE).read_text()) if folder else {}
        rows = {key: [str(text) for text in row] for key, row in found.items()}
        return {key: row for key, row in rows.items() if len(row) == len(COLUMNS) - 1}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(rows: dict[str, list[str]]) -> None:
    """The latest first; all or nothing, for another process may do the same."""
    folder = cache.private_folder("listing")
    if folder is None:
        return
    with contextlib.suppress(OSError):
        write_json(folder / FILE, dict(list(rows.items())[:MOST]))
