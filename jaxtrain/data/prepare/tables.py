"""Data sets that are one table, kept as it was published: ``plain_file(name)``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

from jaxtrain.core.errors import InputError
from jaxtrain.core.files import write_bytes
from jaxtrain.data.data_dir import default_data_dir, parse_name
from jaxtrain.data.prepare.download import Progress, fetch
from jaxtrain.data.prepare.originals import Member


@dataclasses.dataclass(frozen=True)
class Plain:
    """One file, its checksum and where it is fetched."""

    member: Member
    url: str
    version: str = "1.0.0"


PLAIN: dict[str, Plain] = {
    # Zhou et al. 2021, "Informer": seven hourly readings of a transformer over two years.
    "etth1": Plain(
        Member("ETTh1.csv", 2_589_657, "8381763947c85f4be6ac456c508460d6"),
        "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",
    ),
}


def plain_file(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """The file of the prepared data set ``name``; None when it is not prepared or not of this kind.

    Args:
      data_dir: the folder of all data sets; None: ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    >>> plain_file("etth1", "/nowhere")
    """
    base, config, version = parse_name(name)
    plain = PLAIN.get(base)
    if plain is None or config is not None or version not in (None, plain.version):
        return None
    root = Path(data_dir).expanduser().absolute() if data_dir is not None else default_data_dir()
    path = root / base / plain.version / plain.member.name
    return path if path.is_file() else None


def write_plain(name: str, root: Path, source: Path | None, report: Progress) -> Path:
    """Puts the file of ``name`` into ``root``, whole or not at all, and returns its folder.

    Args:
      source: the file, or a folder that holds it; None: fetch it.

    Raises:
      InputError: it is missing, cannot be fetched, or is another file.
    """
    plain = PLAIN[name]
    with contextlib.ExitStack() as stack:
        if source is None:
            source = stack.enter_context(fetch(name, [plain.url], report))
        path = source / plain.member.name if source.is_dir() else source
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        data = path.read_bytes()
        problem = plain.member.problem(data)
        if problem is not None:
            raise InputError(f"{path}: {problem}")
    folder = root / name / plain.version
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / plain.member.name, data)
    except OSError as error:
        raise InputError(f"cannot write {name} to {root}: {error}") from error
    return folder
