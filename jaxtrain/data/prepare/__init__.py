"""Download a data set and write it in the TensorFlow Datasets layout: ``prepare(name)``.

The small image sets of ``originals.ORIGINALS`` and the ``catalog.COLLECTIONS`` are written from their
original files without TensorFlow, as the stock TFDS builders would: same version, features, names and example
order. The ``tables.TABLES`` are stored as published. Every other name goes through its stock TFDS builder,
which needs TensorFlow.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import re
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.core.files import user_path
from jaxtrain.core.text import did_you_mean
from jaxtrain.data.data_dir import (
    data_dir_option,
    default_data_dir,
    file_formats,
    find_prepared,
    parse_name,
    version_folders,
)
from jaxtrain.data.prepare.archives import load_members
from jaxtrain.data.prepare.catalog import COLLECTIONS, Collection, find_collection
from jaxtrain.data.prepare.download import Progress, fetch, fetch_members, open_url, verify_checksum
from jaxtrain.data.prepare.originals import ORIGINALS, DataSetInfo, Examples, Original, Parsed, Split
from jaxtrain.data.prepare.tables import TABLES, Table, table_file, write_table
from jaxtrain.data.prepare.writer import silence_tfds, write_data_set

# The command in an error message, up to the name of the data set.
_COMMAND = re.compile(r"python -m jaxtrain prepare [^\s:,]+")


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write data set ``name`` in the TFDS layout (``array_record``) and return its folder.

    Does nothing if it is already prepared. The write is atomic, whatever interrupts it and however many
    processes do it at the same time.

    Original files of the small image sets, tiny_shakespeare and etth1 are checked against their known
    checksums (cifar100's two lists of class names have none: their lengths are checked). The archives of
    imdb_reviews, movielens/100k-ratings and oxford_iiit_pet are checked only when they are downloaded here:
    ``source`` may be a subset or a repacked archive, in which the paths of the examples are checked.

    Args:
      name: a TFDS name: ``"cifar10"``, ``"imdb_reviews/plain_text"``.
      data_dir: the folder of all data sets; None: ``$TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``.
      source: original files already on this machine: a .tar.gz, .tar or .zip archive, or a folder
        that holds the files or such an archive. None: download them (imagenet2012 must be downloaded
        by hand). For names that go through their stock TFDS builder, the ``manual_dir`` of TFDS.
      progress: called as ``progress(label, done, total)``, in bytes while downloading and in examples
        while writing; total is 0 if it is not known.

    Raises:
      InputError: no such data set, no network, a file is missing or not the original, or TensorFlow
        is needed and not installed.

    >>> prepare("cifer10", data_dir="/nowhere")
    Traceback (most recent call last):
        ...
    jaxtrain.core.errors.InputError: unknown data set 'cifer10': did you mean cifar10?
    """
    try:
        return _prepare(name, data_dir, source, progress)
    except InputError as error:
        # The functions below do not know the folder, so the option is added to their commands here.
        option = data_dir_option(data_dir)
        raise InputError(_COMMAND.sub(lambda found: found[0] + option, str(error))) from error


def _prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    source: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Path:
    table = table_file(name, data_dir)
    folder = table.parent if table is not None else find_prepared(name, data_dir)
    if folder is not None:
        return folder
    root = user_path(data_dir) if data_dir is not None else default_data_dir()
    report = progress or (lambda label, done, total: None)
    files = user_path(source) if source is not None else None
    base, config, version = parse_name(name)
    own = TABLES.get(base) or ORIGINALS.get(base) or find_collection(base, config)
    if own is None:
        return _prepare_stock(name, root, files, report)
    full = own.full if isinstance(own, DataSetInfo) else base
    requested = f"{base}/{config}" if config else base
    if requested not in (base, full) or version not in (None, own.version):
        raise InputError(f"data set {name}: only {full}:{own.version} can be prepared")
    if isinstance(own, Table):
        return write_table(base, root, files, report)
    _check_unoccupied(name, root / full / own.version)
    if isinstance(own, Original):
        _prepare_original(own, root, files, report)
    else:
        _prepare_collection(own, root, files, report)
    return _find_result(name, root)


def _check_unoccupied(name: str, folder: Path) -> None:
    """Raise if ``folder`` exists without a readable data set: TFDS would take it for the finished one."""
    kinds = file_formats(folder)
    if folder.exists() and "array_record" not in kinds:
        contents = f"{kinds[0]} files, which need TensorFlow" if kinds else "no complete data set"
        raise InputError(
            f"{folder} is in the way: it holds {contents}. Move it away (or set TFDS_DATA_DIR to "
            f"another folder), then run: python -m jaxtrain prepare {name}"
        )


def _find_result(name: str, root: Path) -> Path:
    folder = find_prepared(name, root)
    if folder is None:
        for other in version_folders(name, root):
            _check_unoccupied(name, other)
        raise InputError(f"data set {name}: no readable files were written to {root}")
    return folder


def _prepare_original(original: Original, root: Path, source: Path | None, report: Progress) -> None:
    members = fetch_members(original, report) if source is None else load_members(original, source)
    parsed = original.parse(members)
    _check_labels(original, parsed)
    splits = {
        split: functools.partial(_examples, split, data, original.ids)
        for split, data in parsed.splits.items()
    }
    totals = {split: len(data.images) for split, data in parsed.splits.items()}
    write_data_set(original, _features(original, parsed), splits, root, report, totals)


def _check_labels(original: Original, parsed: Parsed) -> None:
    for split, data in parsed.splits.items():
        for key, labels in data.labels.items():
            names = parsed.classes[key]
            count = names if isinstance(names, int) else len(names)
            if labels.size and int(labels.max()) >= count:
                raise InputError(
                    f"{original.name} {split}: {key} {labels.max()} of example "
                    f"{labels.argmax()} is out of range: there are {count} classes"
                )


def _features(original: Original, parsed: Parsed) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    features: dict[str, Any] = {"id": tfds.features.Text()} if original.ids else {}
    shape = next(iter(parsed.splits.values())).images.shape[1:]
    features["image"] = tfds.features.Image(shape=shape)
    for key in sorted(parsed.classes, reverse=True):
        names = parsed.classes[key]
        features[key] = (
            tfds.features.ClassLabel(num_classes=names)
            if isinstance(names, int)
            else tfds.features.ClassLabel(names=names)
        )
    return features


def _examples(split: str, data: Split, ids: bool) -> Examples:
    # The key is the position in the original files. TFDS orders examples by a hash of the key, so this
    # gives the order of the stock builders.
    for index, image in enumerate(data.images):
        example: dict[str, Any] = {key: int(value[index]) for key, value in data.labels.items()}
        example["image"] = _png(image)
        if ids:
            example["id"] = f"{split}_{index:05d}"
        yield index, example


def _png(image: np.ndarray) -> bytes:
    """Encode uint8 [height, width, channel] as PNG; TFDS itself would need TensorFlow."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.squeeze())).save(buffer, "png")
    return buffer.getvalue()


def _prepare_collection(collection: Collection, root: Path, source: Path | None, report: Progress) -> None:
    with contextlib.ExitStack() as stack:
        if source is None:
            urls = [part.url for part in collection.parts if part.url is not None]
            if len(urls) != len(collection.parts):
                raise InputError(
                    f"{collection.full} cannot be downloaded automatically: {collection.by_hand}, then run: "
                    f"python -m jaxtrain prepare {collection.full} --from DIR"
                )
            # Next to the result, because the system's temporary folder may be too small.
            parent = root / collection.name
            source = stack.enter_context(fetch(collection.full, urls, report, parent))
            for part in collection.parts:
                verify_checksum(source / part.names[0], part.size, part.sha256)
        splits = collection.examples(collection.find(source))
        write_data_set(collection, collection.features(), splits, root, report)


def _prepare_stock(name: str, root: Path, source: Path | None, report: Progress) -> Path:
    """Prepare any other name with its TFDS builder."""
    import tensorflow_datasets as tfds

    base = parse_name(name)[0]
    known = tfds.list_builders(with_community_datasets=False)
    own = [collection.full for collection in COLLECTIONS.values() if collection.name == base]
    if base not in known:
        hint = did_you_mean(base, {*known, *TABLES}, otherwise="TFDS has no data set of that name")
        hint = f"did you mean {own[0]}?" if own else hint
        raise InputError(f"unknown data set {name!r}: {hint}")
    if importlib.util.find_spec("tensorflow") is None:
        other = f"; {own[0]} does not" if own else ""
        raise InputError(
            f"preparing {name} needs TensorFlow (reading it will not): run: pip install 'jaxtrain[prepare]'"
            + other
        )
    if source is not None and not source.exists():
        raise InputError(f"{source}: no such file or folder")
    manual = source.parent if source is not None and source.is_file() else source
    report(name, 0, 0)
    with silence_tfds(report):
        try:
            builder = tfds.builder(name, data_dir=root, file_format="array_record")
            _check_unoccupied(name, Path(builder.data_dir))
            if source is None:
                _check_network(name, builder.url_infos, root)
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False, manual_dir=manual)
            )
        except InputError:
            raise
        except Exception as error:  # Each of the hundreds of builders raises its own types.
            if find_prepared(name, root) is None:
                line = " ".join(str(error).split())[:300]
                raise InputError(f"TFDS could not prepare {name}: {type(error).__name__}: {line}") from error
    return _find_result(name, root)


def _check_network(name: str, urls: Mapping[str, Any] | None, root: Path) -> None:
    """Raise if the first URL does not answer: without a network TFDS would retry for minutes."""
    url = next(iter(urls or ()), "")
    downloads = root / "downloads"  # Earlier downloads may be all that TFDS needs.
    cached = downloads.is_dir() and any(path.is_file() for path in downloads.iterdir())
    if cached or not url.startswith("http"):
        return
    try:
        open_url(url).close()
    except urllib.error.HTTPError:
        return  # The server answered.
    except OSError as error:
        raise InputError(
            f"cannot download {url} ({' '.join(str(error).split())}): download it on a machine with "
            f"a network, then run: python -m jaxtrain prepare {name} --from DIR"
        ) from error
