"""Load Python files by path, under module names that another process can restore.

Such a file may import modules and packages from its own folder (``_Siblings``).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line

PREFIX = "jaxtrain_file_"


class _Siblings:
    """The finder of modules in the folder of the file that was loaded last.

    The standard library and installed packages come before the folder, and the folder before the working
    directory. Two folders may have modules of the same name: ``sys.modules`` has those of one folder.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self._names: dict[str, set[str]] = {}  # by folder: top-level modules that were found there
        self._aside: dict[str, dict[str, ModuleType]] = {}  # by folder: its modules while another is current

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        """Return the spec of a top-level module of the folder (the interface of ``sys.meta_path``)."""
        if path is not None or self.folder is None or name in sys.stdlib_module_names:
            return None
        spec = PathFinder.find_spec(name, [self.folder])
        if spec is None or spec.loader is None or _is_installed(name):
            return None
        self._names.setdefault(self.folder, set()).add(name)
        return spec

    def use(self, folder: str) -> None:
        """Find modules in ``folder`` from now on."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        if folder == self.folder:
            return
        if self.folder is not None:
            names = self._names.get(self.folder, set())
            found = [name for name in tuple(sys.modules) if name.partition(".")[0] in names]
            self._aside[self.folder] = {name: sys.modules.pop(name) for name in found}
        self.folder = folder
        sys.modules.update(self._aside.pop(folder, {}))


_siblings = _Siblings()


def load(path: str | Path) -> ModuleType:
    """Import the file at ``path``; a second call returns the same module.

    The module is registered in ``sys.modules`` before it runs (dataclasses need that), under a name made
    of its stem and its path, so that two files with the same name do not collide. What it prints goes to
    stderr, because stdout belongs to the command.

    Raises:
      InputError: the file is missing, or raises an error or exits while it is imported.
    """
    path = Path(os.path.realpath(path))  # resolve() fails on a loop of links
    name = f"{PREFIX}{path.stem}_{zlib.crc32(str(path).encode(errors='surrogateescape')):08x}"
    if name in sys.modules:
        _siblings.use(str(path.parent))
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _siblings.use(str(path.parent))
    try:
        with import_errors(str(path)):
            spec.loader.exec_module(module)
    except BaseException:  # Ctrl-C too: no half-loaded module may stay
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def import_errors(what: str) -> Iterator[None]:
    """Import user code in this block: its errors and exits become an InputError about ``what``.

    Raises:
      InputError: the code raised it, or any other error but KeyboardInterrupt, or called ``sys.exit``.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr), _no_usage():
            yield
    except (InputError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        code = first_line(str(error.code or 0))
        raise InputError(
            f"{what} cannot be imported: SystemExit: {code}: move what ends the process, such as "
            'sys.exit() or parse_args(), under if __name__ == "__main__"'
        ) from error
    except BaseException as error:
        raise InputError(f"{what} cannot be imported: {type(error).__name__}: {first_line(error)}") from error


class UserModule:
    """The files loaded so far; unpickling it loads them again.

    A worker process cannot import such a file by its module name, so it could not unpickle an object of a
    class from it, or from a module beside it. Send this first.
    """

    def __init__(self, paths: tuple[str, ...] | None = None) -> None:
        self.paths = _loaded_paths() if paths is None else paths
        for path in paths or ():
            load(path)

    def __reduce__(self) -> tuple[type[UserModule], tuple[tuple[str, ...]]]:
        return UserModule, (self.paths,)


def _loaded_paths() -> tuple[str, ...]:
    """Return the files loaded so far, those in the current folder last."""
    modules = [m for name, m in sys.modules.copy().items() if name.startswith(PREFIX)]  # threads import too
    paths = [str(m.__file__) for m in modules]
    return tuple(sorted(paths, key=lambda path: str(Path(path).parent) == _siblings.folder))


def _is_installed(name: str) -> bool:
    """Return whether a module is found outside of the working directory."""
    here = {"", "."}
    with contextlib.suppress(OSError):  # it was deleted
        here.add(str(Path.cwd()))
    spec = PathFinder.find_spec(name, [entry for entry in sys.path if entry not in here])
    return spec is not None and spec.loader is not None


@contextlib.contextmanager
def _no_usage() -> Iterator[None]:
    """Let argparse raise its errors without printing the usage of a parser before."""

    def error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise SystemExit(f"argparse: {message}")

    before = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = error  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = before  # type: ignore[method-assign]
