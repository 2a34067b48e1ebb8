"""``run --list``: the experiments by name, without importing any of them.

``--list`` reads the docstring of each file, and whether it can be loaded as an experiment. ``--list --long``
also loads each file and traces its model to count the parameters: this takes JAX and some tenths of a second.
"""

from __future__ import annotations

import ast
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from jaxtrain.core import redact
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line, printable
from jaxtrain.experiment.registry import Entry, discover

UNKNOWN = "–"
NOTHING = "it must define EXPERIMENT = Experiment(...)"
_ENDS = frozenset(["exit()", "quit()", "sys.exit()", "os._exit()"])
# These are run at another time, or perhaps not at all.
_LATER = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.If,
    ast.IfExp,
    ast.BoolOp,
    ast.Try,
    ast.While,
)


def show(long: bool = False) -> int:
    """Print the table and return the exit code. Reads no data and starts no backend."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "what it is", *(("data", "model") if long else ())):
        table.add_column(column)
    if long:
        table.add_column("parameters", justify="right")
    for entry in discover():
        row = describe(entry) if long else [summary(entry)]
        table.add_row(*(_shown(cell) for cell in (entry.name, *row)))
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, markup=False, emoji=False, width=width).print(table)
    return 0


def summary(entry: Entry) -> str:
    """Return the first line of the docstring in an experiment's file, or why it cannot be read or loaded.

    >>> from jaxtrain.experiment import find
    >>> summary(find("digits_cnn"))
    'Handwritten 8×8 digits, without a download: the experiment to run first.'
    """
    file = Path(entry.origin) if entry.point is None else _module_file(entry.point.module)
    if file is None:
        return f"entry point {entry.origin}"
    try:
        tree = ast.parse(file.read_bytes())
        fault = _end_of_process(tree) or (None if entry.point or _defines_experiment(tree) else NOTHING)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"cannot be read: {_reason(error)}"
    return f"cannot be loaded: {fault}" if fault else first_line(ast.get_docstring(tree) or "") or UNKNOWN


def describe(entry: Entry) -> list[str]:
    """Load an experiment; return its summary, data, model and parameter count, or why it cannot be loaded."""
    from jaxtrain.program.check_fields import describe_experiment

    try:
        experiment, line = entry.load()
        return [line, *describe_experiment(experiment)]
    except (Exception, SystemExit) as error:  # one broken file must not hide the others
        return [f"cannot be loaded: {_reason(error)}"]


def _end_of_process(tree: ast.Module) -> str | None:
    """Return which call ends the process when a module is imported, and what to do; None if none is seen."""
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, _LATER):
            continue
        if isinstance(node, ast.Call):
            call = f"{ast.unparse(node.func)}()"
            if call in _ENDS or (call.endswith(".parse_args()") and not node.args and not node.keywords):
                return f'line {node.lineno}: {call} ends the process: move it under if __name__ == "__main__"'
        nodes += ast.iter_child_nodes(node)
    return None


def _defines_experiment(tree: ast.Module) -> bool:
    """Return whether a module could have ``EXPERIMENT``: assigned, imported, or named in any other way."""
    names = [
        getattr(node, name, None) for node in ast.walk(tree) for name in ("id", "name", "asname", "value")
    ]
    return any(name in ("EXPERIMENT", "*", "__getattr__") for name in names if isinstance(name, str))


def _shown(cell: str) -> str:
    """Return a cell without secrets and control characters."""
    return printable(redact.redact(cell))


def _module_file(name: str) -> Path | None:
    """Find the source file of a module without importing its packages; None if it has none."""
    path, spec, parts = None, None, name.split(".")
    for end in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:end]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _reason(error: BaseException) -> str:
    line, kind = first_line(error), type(error).__name__
    return line if isinstance(error, InputError) or line == kind else f"{kind}: {line}"
