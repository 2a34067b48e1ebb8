"""Find prepared data sets on disk: names, folders and file formats, without TFDS or a network."""

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
from jaxtrain.data import paths

_NAME = re.compile(r"(?P<base>[^/:]+)(/(?P<config>[^/:]+))?(:(?P<version>[0-9*]+(\.[0-9*]+){2}))?")

# The keys under which TFDS writes class names in features.json, now and in older versions.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")


def default_data_dir() -> Path:
    """Return the default folder of all data sets: ``$TFDS_DATA_DIR``, else the TFDS default.

    >>> default_data_dir().is_absolute()
    True
    """
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()


def parse_name(name: str) -> tuple[str, str | None, str | None]:
    """Split ``base[/config][:version]`` into its three parts.

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


def find_prepared(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of the newest prepared version in a readable format, or None.

    Looks only at names and two small JSON files: no network, no TFDS import.
    """
    return next((f for f in version_folders(name, data_dir) if "array_record" in file_formats(f)), None)


def version_folders(name: str, data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return all complete folders of data set ``name``, in any file format, newest version first."""
    base, config, version = parse_name(name)
    parent = default_data_dir() / base if data_dir is None else paths.resolve(Path(data_dir, base))
    config = config or _default_config(parent)
    parent = parent / config if config else parent
    pattern = re.compile(re.escape(version or "*.*.*").replace(r"\*", r"\d+"))
    found = [
        path
        for path in (parent.iterdir() if parent.is_dir() else ())
        # An unfinished prepare has another name: its folder is renamed to the version at the end.
        if pattern.fullmatch(path.name) and file_formats(path)
    ]
    return sorted(found, key=lambda p: tuple(map(int, p.name.split("."))), reverse=True)


def not_prepared_message(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """Return one line: what is missing, where, and the command that provides it."""
    return (
        f"data set {name} is not prepared in {data_dir or default_data_dir()}: "
        f"run: python -m jaxtrain prepare {name}{data_dir_option(data_dir)}"
    )


def data_dir_option(data_dir: str | os.PathLike[str] | None) -> str:
    """Return the option that makes a ``prepare`` command use ``data_dir``; empty for the default."""
    default = default_data_dir()
    return f" --data-dir {data_dir}" if Path(data_dir or default) != default else ""


def file_formats(folder: Path) -> tuple[str, ...]:
    """Return the record formats of a version folder; empty if the data set is not complete."""
    if not (folder / "features.json").is_file():
        return ()
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
    except (OSError, ValueError):
        return ()
    # Folders from before the field existed are all TFRecord.
    return (info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", ()))


def _default_config(parent: Path) -> str | None:
    """Return the config that the name without a config means, from the metadata that TFDS wrote."""
    try:
        metadata = json.loads((parent / ".config" / "metadata.json").read_text())
    except (OSError, ValueError):
        return None
    config: str | None = metadata.get("default_config_name")
    if config:
        safe_names.check(config, f"{parent}: default config", "prepare the data set again")
    return config


def check_features(folder: Path) -> None:
    """Check that ``features.json`` names only TFDS's own classes, because TFDS imports what it names.

    Raises:
      InputError: it names another class.
    """
    path = folder / "features.json"
    try:
        names = list(_class_names(json.loads(path.read_text())))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): prepare the data set again") from error
    for name in names:
        if not name.startswith("tensorflow_datasets."):
            raise InputError(
                f"{path} names {name!r}, which is not a TFDS feature: prepare the data set again"
            )


def _class_names(value: Any) -> Iterator[str]:
    """Yield the values under ``_CLASS_KEYS``, also in JSON nested as text."""
    if isinstance(value, dict):
        yield from (v for key, v in value.items() if key in _CLASS_KEYS and isinstance(v, str) and "." in v)
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _class_names(item)
    elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            yield from _class_names(json.loads(value))
