"""Data sets that are one csv table, stored as published: ``table_file(name)``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

from jaxtrain.core.errors import InputError
from jaxtrain.core.files import write_bytes
from jaxtrain.data import paths
from jaxtrain.data.data_dir import default_data_dir, parse_name
from jaxtrain.data.prepare.download import Progress, fetch
from jaxtrain.data.prepare.originals import Member


@dataclasses.dataclass(frozen=True)
class Table:
    """One file, its checksum and its URL."""

    member: Member
    url: str
    version: str = "1.0.0"


TABLES: dict[str, Table] = {
    # Zhou et al. 2021, "Informer": seven hourly measurements of a power transformer over two years.
    "etth1": Table(
        Member("ETTh1.csv", 2_589_657, "8381763947c85f4be6ac456c508460d6"),
        "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",
    ),
}


def table_file(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the file of the prepared data set ``name``; None if it is not prepared or not a table.

    Args:
      data_dir: the folder of all data sets; None: ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    >>> table_file("etth1", "/nowhere")
    """
    base, config, version = parse_name(name)
    table = TABLES.get(base)
    if table is None or config is not None or version not in (None, table.version):
        return None
    parent = default_data_dir() / base if data_dir is None else paths.resolve(Path(data_dir, base))
    path = parent / table.version / table.member.name
    return path if path.is_file() else None


def write_table(name: str, root: Path, source: Path | None, report: Progress) -> Path:
    """Write the table ``name`` to ``root`` atomically and return its folder.

    Args:
      source: the file, or a folder that holds it; None: download it.

    Raises:
      InputError: it is missing, cannot be downloaded, or is not the original.
    """
    table = TABLES[name]
    with contextlib.ExitStack() as stack:
        if source is None:
            source = stack.enter_context(fetch(name, [table.url], report))
        path = source / table.member.name if source.is_dir() else source
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        data = path.read_bytes()
        problem = table.member.problem(data)
        if problem is not None:
            raise InputError(f"{path}: {problem}")
    folder = root / name / table.version
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / table.member.name, data)
    except OSError as error:
        raise InputError(f"cannot write {name} to {root}: {error}") from error
    return folder
