"""Find data files named by a relative path, so that a run reads the same ones wherever it is resumed from."""

from __future__ import annotations

from pathlib import Path

_folders: tuple[Path, ...] = ()
_found: dict[str, Path] = {}
_stamps: dict[str, tuple[int, ...]] = {}


def set_base_folders(*folders: str | Path | None) -> None:
    """Set where this process looks for relative paths, before it looks in the working directory.

    Args:
      folders: first the folder of the experiment's file, then the working directory of the run's first
        start; None is left out.
    """
    global _folders  # noqa: PLW0603 - like the working directory, it belongs to the process
    _folders = tuple(Path(folder).absolute() for folder in folders if folder is not None)
    forget()


def resolve(path: str | Path) -> Path:
    """Return the absolute path of a data file or folder.

    A relative path is looked up in the base folders, in order, and then in the working directory. Where it
    exists nowhere, the result is in the last base folder, or in the working directory if there is none. The
    result is kept until ``forget``.

    >>> resolve("/data/table.csv")
    PosixPath('/data/table.csv')
    """
    name, expanded = str(path), Path(path).expanduser()
    if expanded.is_absolute():
        return expanded
    if name in _found:
        return _found[name]
    here = expanded.absolute()
    for place in (*(folder / expanded for folder in _folders), here):
        if place.exists():
            _found[name] = place
            return place
    return _folders[-1] / expanded if _folders else here


def stamp(path: str | Path) -> tuple[int, ...]:
    """Return what changes when a file is replaced or written, for the key of a cache; () if it is missing.

    The file system is asked once, until ``forget``: a file that changes during a run is not read again.
    """
    name = str(path)
    if name not in _stamps:
        try:
            status = Path(path).stat()
        except OSError:
            return ()
        _stamps[name] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return _stamps[name]


def forget() -> None:
    """Ask the file system again, as at the start of a run in a process that has had another one."""
    _found.clear()
    _stamps.clear()


def notes() -> list[str]:
    """Return a line for each relative path that names another file in the working directory."""
    lines = []
    for name, path in sorted(_found.items()):
        here = Path(name).expanduser().absolute()
        if here.exists() and not here.samefile(path):
            lines.append(f"{name} is {path}, and not {here}: give the full path if that is not intended")
    return lines


class BaseFolders:
    """The base folders of this process; unpickling it sets them in another."""

    def __init__(self, folders: tuple[Path, ...] | None = None) -> None:
        self.folders = _folders if folders is None else folders
        if folders is not None:
            set_base_folders(*folders)

    def __reduce__(self) -> tuple[type[BaseFolders], tuple[tuple[Path, ...]]]:
        return BaseFolders, (self.folders,)
