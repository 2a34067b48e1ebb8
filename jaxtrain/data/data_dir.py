"""Where prepared data sets lie: names, folders and file formats; imports no TFDS, opens no network."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtrain.core import safe_names
from jaxtrain.core.errors import InputError

_NAME = re.compile(r"(?P<base>[^/:]+)(/(?P<config>[^/:]+))?(:(?P<version>[0-9*]+(\.[0-9*]+){2}))?")

# Where TFDS writes the names of classes in features.json, now and in older versions.
_CODE = ("pythonClassName", "python_class_name", "type")


def default_data_dir() -> Path:
    """Where data sets live when nothing else is said: ``$TFDS_DATA_DIR``, else the TFDS default.

    >>> default_data_dir().is_absolute()
    True
    """
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()


def parse_name(name: str) -> tuple[str, str | None, str | None]:
    """Splits ``base[/config][:version]`` into its three parts.

    >>> parse_name("imdb_reviews/plain_text:1.0.0")
    ('imdb_reviews', 'plain_text', '1.0.0')
    >>> parse_name("mnist")
    ('mnist', None, None)

    Raises:
      InputError: ``name`` has another form.
    """
    match = _NAME.fullmatch(name)
    if match is None or not all(
        part is None or safe_names.is_name(part) for part in match.group("base", "config")
    ):
        raise InputError(
            f"data set {name!r}: expected NAME, NAME/CONFIG or NAME/CONFIG:1.2.3 of letters, digits, '.', "
            "'_' and '-', such as cifar10, imdb_reviews/plain_text or mnist:3.0.1"
        )
    return match["base"], match["config"], match["version"]


def find_folder(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder of a prepared data set that can be read here, newest version first; else None.

    Looks at names and two small JSON files only: no network, no TFDS import.
    """
    return next((f for f in folders(name, data_dir) if "array_record" in file_formats(f)), None)


def folders(name: str, data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """All complete folders of data set ``name``, in any file format, newest version first."""
    base, config, version = parse_name(name)
    root = Path(data_dir).expanduser().absolute() if data_dir is not None else default_data_dir()
    parent = root / base
    config = config or _default_config(parent)
    parent = parent / config if config else parent
    wanted = re.compile(re.escape(version or "*.*.*").replace(r"\*", r"\d+"))
    found = [
        path
        for path in (parent.iterdir() if parent.is_dir() else ())
        # A prepare under way, or killed, has another name: a version is its name at the very end.
        if wanted.fullmatch(path.name) and file_formats(path)
    ]
    return sorted(found, key=lambda p: tuple(map(int, p.name.split("."))), reverse=True)


def not_prepared(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """One line: what is missing, where, and the command that provides it."""
    return (
        f"data set {name} is not prepared in {data_dir or default_data_dir()}: "
        f"run: python -m jaxtrain prepare {name}{data_dir_option(data_dir)}"
    )


def data_dir_option(data_dir: str | os.PathLike[str] | None) -> str:
    """What a ``prepare`` command needs besides the name to work in ``data_dir``."""
    default = default_data_dir()
    return f" --data-dir {data_dir}" if Path(data_dir or default) != default else ""


def file_formats(folder: Path) -> tuple[str, ...]:
    """The record formats a version folder holds; empty when it is no complete data set."""
    if not (folder / "features.json").is_file():
        return ()
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
    except (OSError, ValueError):
        return ()
    # Folders written before the field existed are all TFRecord.
    return (info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", ()))


def _default_config(parent: Path) -> str | None:
    """The config that TFDS means by the bare name, as it recorded it beside the configs."""
    try:
        metadata = json.loads((parent / ".config" / "metadata.json").read_text())
    except (OSError, ValueError):
        return None
    config: str | None = metadata.get("default_config_name")
    if config:
        safe_names.check(config, f"{parent}: default config", "prepare the data set again")
    return config


def check_features(folder: Path) -> None:
    """Refuse a ``features.json`` that names classes which TFDS does not have: TFDS imports what it names.

    Raises:
      InputError: there is one.
    """
    path = folder / "features.json"
    try:
        named = list(_python_names(json.loads(path.read_text())))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): prepare the data set again") from error
    for name in named:
        if not name.startswith("tensorflow_datasets."):
            raise InputError(
                f"{path} names {name!r}, which is no feature of TFDS's own: prepare the data set again"
            )


def _python_names(value: Any) -> Iterator[str]:
    """What stands under ``_CODE``, in JSON that stands as text in JSON too."""
    if isinstance(value, dict):
        yield from (v for key, v in value.items() if key in _CODE and isinstance(v, str) and "." in v)
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _python_names(item)
    elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            yield from _python_names(json.loads(value))
