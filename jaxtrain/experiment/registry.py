"""Find experiments by name or path.

Names are looked up in ``./experiments``, in the folders of the environment variable ``JAXTRAIN_EXPERIMENTS``,
among the entry points of installed packages (group ``jaxtrain.experiments``) and among the experiments that
are shipped with jaxtrain.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jaxtrain.core import user_modules
from jaxtrain.core.errors import InputError
from jaxtrain.core.text import did_you_mean, first_line

if TYPE_CHECKING:
    from jaxtrain.experiment.definition import Experiment

GROUP = "jaxtrain.experiments"
PACKAGE = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Entry:
    """An experiment that is found but not imported.

    Attributes:
      name: what ``--experiment`` calls it.
      origin: the path of its file, or the text of its entry point.
      point: the entry point; None for a file.
    """

    name: str
    origin: str
    point: metadata.EntryPoint | None = None

    def load(self) -> tuple[Experiment, str]:
        """Import it; return the experiment and the first line of its module's docstring.

        Raises:
          InputError: the file cannot be imported or holds no ``EXPERIMENT``.
        """
        from jaxtrain.experiment.definition import Experiment  # here, because listing names needs no JAX

        found = self._import()
        experiment = getattr(found, "EXPERIMENT", None) if isinstance(found, ModuleType) else found
        if not isinstance(experiment, Experiment):
            raise InputError(f"{self.origin} must define EXPERIMENT = Experiment(...)")
        return experiment, first_line(self.module().__doc__ or "")

    def module(self) -> ModuleType:
        """Import it; return the module that defines it. Raises as ``load``."""
        found = self._import()
        return found if self.point is None else sys.modules[self.point.module]

    def _import(self) -> Any:
        """Return the module of a file, or what an entry point names."""
        if self.point is None:
            return user_modules.load(self.origin)
        try:
            return self.point.load()
        except Exception as error:
            raise InputError(
                f"entry point {self.origin} cannot be loaded: {type(error).__name__}: {error}"
            ) from error


def find(name: str) -> Entry:
    """Return the entry called ``name``, or that of the file at the path ``name``.

    Raises:
      InputError: no experiment has this name (with a suggestion), or two different ones have it.

    >>> find("digits_cnn").name
    'digits_cnn'
    """
    if name.endswith(".py") or os.sep in name:
        path = Path(name)
        if not path.is_file():
            raise InputError(f"experiment file {name} does not exist")
        return Entry(path.stem, str(path.resolve()))
    entries = discover()
    named = [entry for entry in entries if entry.name == name]
    if not named:
        names = [entry.name for entry in entries]
        hint = did_you_mean(name, names, otherwise="see python -m jaxtrain.run --list")
        raise InputError(f"no experiment is called {name}: {hint}")
    for other in named[1:]:
        if not _same(named[0], other):
            raise InputError(
                f"two different experiments are called {name}: {named[0].origin} and {other.origin}; "
                "rename one, or give its path to --experiment"
            )
    return named[0]


def discover() -> list[Entry]:
    """Return all entries, sorted by name, without importing them; identical copies of a file count once."""
    folders = [Path("experiments")]
    folders += [Path(f) for f in os.environ.get("JAXTRAIN_EXPERIMENTS", "").split(os.pathsep) if f]
    entries = [e for folder in folders for e in _in_folder(folder)]
    entries += [Entry(p.name, f"{p.name} = {p.value}", p) for p in metadata.entry_points(group=GROUP)]
    entries += _in_folder(_shipped_folder())
    unique: list[Entry] = []
    for entry in sorted(entries, key=lambda e: e.name):
        if not any(entry.name == other.name and _same(entry, other) for other in unique):
            unique.append(entry)
    return unique


def _shipped_folder() -> Path:
    """Return the folder of the shipped experiments: in the package, or next to it in a source checkout."""
    inside = PACKAGE / "experiments"
    return inside if inside.is_dir() else PACKAGE.parent / "experiments"


def _in_folder(folder: Path) -> list[Entry]:
    """Return an entry for each ``.py`` file whose name does not start with an underscore."""
    files = [p for p in sorted(folder.glob("*.py")) if not p.name.startswith("_")]
    return [Entry(path.stem, str(path.resolve())) for path in files]


def _same(a: Entry, b: Entry) -> bool:
    """Return whether both are one entry point, one file, or two files of the same bytes."""
    if a.point is not None or b.point is not None:
        return a.origin == b.origin
    return a.origin == b.origin or Path(a.origin).read_bytes() == Path(b.origin).read_bytes()
