"""The code that an experiment depends on: checksums of its file and of the user's modules that it imports.

Counted are the file itself and, from module to module, what its import statements name, except the standard
library, installed packages and jaxtrain. Packages installed as editable count, and so does the rest of the
experiment's own package. A module that is imported under a computed name counts only where a module
contains it as a global.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.machinery
import importlib.util
import site
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.core.user_modules import PREFIX

PACKAGE = Path(__file__).resolve().parent.parent
INSTALLED = ("site-packages", "dist-packages")  # names of folders


def digests(module: types.ModuleType | None, experiment: Any) -> dict[str, str]:
    """Return a checksum of every file of the user's code, by its path as an import would name it.

    The paths do not depend on where the files are: ``exp.py``, ``helpers.py``, ``nets/blocks.py``.

    Args:
      module: of the experiment, or the ``__main__`` of a script; None if there is no file.
      experiment: the modules of its parts count, too.
    """
    root = None if module is None else module.__name__
    package = (root or "").partition(".")[0]
    queue = [name for name in (root, *sorted(set(_modules_of(experiment)))) if name]
    found, seen = {}, set(queue)
    while queue:
        name = queue.pop()
        path = _file_of(name)
        own = path is not None and (name == root or name.partition(".")[0] == package or _is_own(path))
        if path is not None and own:
            try:
                source = path.read_bytes()
            except OSError:
                continue
            found[_relative(name, path)] = hashlib.sha256(source).hexdigest()[:16]
            names = {*_imported(name, path, source), *_globals(name)} - seen
        elif path is None and name.partition(".")[0] not in sys.stdlib_module_names:
            names = set()  # a namespace package: its modules are named, too
        else:
            continue
        seen |= names
        queue += sorted(names)
    return dict(sorted(found.items()))


def main_module() -> types.ModuleType | None:
    """Return the script that this process runs; None in a notebook, an interactive session or a tool."""
    path = _file_of("__main__")
    own = path is not None and path.is_file() and _is_own(path)
    return sys.modules["__main__"] if own else None


def is_interactive() -> bool:
    """Return whether ``__main__`` has no file, as in a notebook: its code cannot be compared later."""
    path = _file_of("__main__")
    return path is None or not path.is_file()  # what is read from stdin has the name <stdin>


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the files that differ, those that are new or gone marked; a renamed file is no difference.

    >>> changes({"exp.py": "1", "old.py": "2"}, {"exp.py": "3", "new.py": "2", "nets.py": "4"})
    ['exp.py', 'nets.py (new)']
    """
    changed = [path for path in now if path in before and before[path] != now[path]]
    added = [path for path in now if path not in before and now[path] not in before.values()]
    gone = [path for path in before if path not in now and before[path] not in now.values()]
    return [*changed, *(f"{path} (new)" for path in added), *(f"{path} (gone)" for path in gone)]


def _modules_of(value: Any) -> Iterator[str]:
    """Yield the module names of the classes and functions that an experiment consists of."""
    yield getattr(value, "__module__", None) or type(value).__module__
    yield type(value).__module__
    if isinstance(value, functools.partial):
        parts: Iterable[Any] = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, tuple | list):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, f.name, None) for f in dataclasses.fields(value) if f.name != "parent"]
    else:
        return
    for part in parts:
        yield from _modules_of(part)


def _file_of(name: str) -> Path | None:
    """Return the source file of a module, without importing it; None if it has none."""
    module = sys.modules.get(name)
    if module is not None:
        origin = getattr(module, "__file__", None)
    else:
        spec = _find_spec(name)
        origin = spec.origin if spec is not None and spec.has_location else None
    return None if origin is None else Path(origin)


def _find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
    parent, _, _ = name.rpartition(".")
    try:
        if not parent:
            return importlib.util.find_spec(name)
        module = sys.modules.get(parent)
        if module is not None:
            locations = getattr(module, "__path__", None)
        else:
            spec = _find_spec(parent)
            locations = None if spec is None else spec.submodule_search_locations
        return None if locations is None else importlib.machinery.PathFinder.find_spec(name, list(locations))
    except (ImportError, ValueError, AttributeError):
        return None


@functools.cache
def _excluded() -> tuple[Path, ...]:
    scheme = sysconfig.get_paths()
    folders = [scheme[name] for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    folders += [site.getusersitepackages(), *site.getsitepackages()]
    return (PACKAGE, *{Path(folder).resolve() for folder in folders})


def _is_own(path: Path) -> bool:
    """Return whether a file is the user's: not of Python, of an installed package or of jaxtrain."""
    resolved = path.resolve()
    if any(part in INSTALLED for part in resolved.parts):
        return False
    return not any(resolved.is_relative_to(folder) for folder in _excluded())


def _relative(name: str, path: Path) -> str:
    """Return the path of a module as its import names it: ``nets/blocks.py`` of ``nets.blocks``."""
    if name == "__main__" or name.startswith(PREFIX):
        return path.name
    parts = name.split(".")
    folders = parts if path.stem == "__init__" else parts[:-1]
    return "/".join([*folders, path.name])


def _imported(name: str, path: Path, source: bytes) -> Iterator[str]:
    """Yield the modules that the import statements of a file name, those inside functions included."""
    if path.suffix != ".py":
        return
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    if name == "__main__":  # python -m app.train
        package = getattr(sys.modules[name], "__package__", None) or ""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from _with_parents(base)
            yield from (f"{base}.{alias.name}" for alias in node.names if base)
        elif isinstance(node, ast.Call) and (called := _import_by_name(node)):
            yield from _with_parents(called if called[0] != "." else _absolute(called, package))


def _import_by_name(call: ast.Call) -> str:
    """Return the name in ``importlib.import_module("name")`` or ``__import__("name")``; "" of other calls."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    name = call.args[0] if call.args and function in ("import_module", "__import__") else None
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""


def _absolute(name: str, package: str) -> str:
    try:
        return importlib.util.resolve_name(name, package)
    except ImportError:
        return ""


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[: n + 1]) for n in range(len(parts)) if name)


def _globals(name: str) -> Iterator[str]:
    """Yield the modules that a module contains as globals, also those of its classes and functions."""
    for value in list(vars(sys.modules[name]).values()) if name in sys.modules else ():
        if isinstance(value, types.ModuleType):
            yield value.__name__
        elif isinstance(value, type | types.FunctionType) and isinstance(value.__module__, str):
            yield value.__module__
