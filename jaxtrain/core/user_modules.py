"""Python files loaded by their path, under a module name that any other process can restore."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType

from jaxtrain.core.errors import InputError
from jaxtrain.core.text import first_line

PREFIX = "jaxtrain_file_"


def load(path: str | Path) -> ModuleType:
    """The module of the file at ``path``; the same object when it is asked for again.

    The module is registered in ``sys.modules`` before it runs (dataclasses need that) under a name made
    of its stem and its path, so two files of one name never meet.

    Raises:
      InputError: the file is missing, or raises while it is imported.
    """
    path = Path(path).resolve()
    name = f"{PREFIX}{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # sys.exit() and Ctrl-C too: nothing half-loaded may stay
        del sys.modules[name]
        if isinstance(error, InputError) or not isinstance(error, Exception):
            raise
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    return module


class UserModule:
    """The files loaded so far; unpickling it loads them again, before whatever comes after it.

    A worker process that is sent an object of a class from such a file cannot import the class's module
    by name. Sent after this, it can.
    """

    def __init__(self, paths: tuple[str, ...] | None = None) -> None:
        self.paths = _loaded_paths() if paths is None else paths
        for path in self.paths:
            load(path)

    def __reduce__(self) -> tuple[type[UserModule], tuple[tuple[str, ...]]]:
        return UserModule, (self.paths,)


def _loaded_paths() -> tuple[str, ...]:
    modules = [m for name, m in sys.modules.items() if name.startswith(PREFIX)]
    return tuple(str(m.__file__) for m in modules)
