"""Load Python files by path, under module names that another process can restore."""

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
    """Import the file at ``path``; a second call returns the same module.

    The module is registered in ``sys.modules`` before it runs (dataclasses need that), under a name made
    of its stem and its path, so that two files with the same name do not collide.

    Raises:
      InputError: the file is missing, or raises an error while it is imported.
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
    except BaseException as error:  # sys.exit() and Ctrl-C too: no half-loaded module may stay
        del sys.modules[name]
        if isinstance(error, InputError) or not isinstance(error, Exception):
            raise
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    return module


class UserModule:
    """The files loaded so far; unpickling it loads them again.

    A worker process cannot import such a file by its module name, so it could not unpickle an object of a
    class from it. Send this first.
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
