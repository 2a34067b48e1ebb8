"""Writing a data set to disk in the TensorFlow Datasets layout: ``prepare(name)``.

The small image sets of ``formats.ORIGINALS`` and the ``collections.COLLECTIONS`` are written from their
original files without TensorFlow, as the stock TFDS builders would: same version, features, names and
example order. The ``plain.PLAIN`` tables are kept as they are. Every other name goes through its stock TFDS
builder, which needs TensorFlow.
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
from jaxtrain.core.text import did_you_mean
from jaxtrain.data.data_dir import (
    data_dir_option,
    default_data_dir,
    file_formats,
    find_folder,
    folders,
    parse_name,
)
from jaxtrain.data.prepare.archives import load_members
from jaxtrain.data.prepare.catalog import COLLECTIONS, Collection, find_collection
from jaxtrain.data.prepare.download import Progress, check, connect, fetch, fetch_members
from jaxtrain.data.prepare.originals import ORIGINALS, About, Examples, Original, Parsed, Split
from jaxtrain.data.prepare.tables import PLAIN, Plain, plain_file, write_plain
from jaxtrain.data.prepare.writer import quiet, write

# The command that an error tells the user to type, up to its data set.
_COMMAND = re.compile(r"python -m jaxtrain prepare [^\s:,]+")


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes data set ``name`` in the TFDS layout (``array_record``) and returns its folder.

    Does nothing when it is prepared already. The folder appears whole or not at all, whatever
    interrupts this call and however many processes make it at the same time.

    Original files of the small image sets, tiny_shakespeare and etth1 are checked against their known
    checksums (cifar100's two lists of class names have none: their lengths are checked). The archives of
    imdb_reviews, movielens/100k-ratings and oxford_iiit_pet are checked so only when they were fetched here:
    with ``source``, a part of one or one that was packed again will do, and what is checked is that the
    examples stand where the original has them.

    Args:
      name: a TFDS name: ``"cifar10"``, ``"imdb_reviews/plain_text"``.
      data_dir: the folder of all data sets; None: ``$TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``.
      source: original files already on this machine: a .tar.gz, .tar or .zip archive, or a folder
        that holds the files or such an archive. None: fetch them (imagenet2012 must be fetched by
        hand). For names that go through their stock TFDS builder, the folder that TFDS calls
        ``manual_dir``.
      progress: called as ``progress(label, done, total)``, in bytes while fetching and in examples
        while writing; total is 0 when it is not known.

    Raises:
      InputError: no such data set, no network, a file that is missing or not the original, or
        TensorFlow is needed and not installed.

    >>> prepare("cifer10", data_dir="/nowhere")
    Traceback (most recent call last):
        ...
    jaxtrain.core.errors.InputError: unknown data set 'cifer10': did you mean cifar10?
    """
    try:
        return _prepare(name, data_dir, source, progress)
    except InputError as error:
        # Whoever gives advice below does not know the folder, and must not send the user to another.
        option = data_dir_option(data_dir)
        raise InputError(_COMMAND.sub(lambda found: found[0] + option, str(error))) from error


def _prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    source: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Path:
    plain = plain_file(name, data_dir)
    folder = plain.parent if plain is not None else find_folder(name, data_dir)
    if folder is not None:
        return folder
    root = Path(data_dir).expanduser().absolute() if data_dir is not None else default_data_dir()
    report = progress or (lambda label, done, total: None)
    files = Path(source).expanduser() if source is not None else None
    base, config, version = parse_name(name)
    own = PLAIN.get(base) or ORIGINALS.get(base) or find_collection(base, config)
    if own is None:
        return _prepare_stock(name, root, files, report)
    full = own.full if isinstance(own, About) else base
    asked = f"{base}/{config}" if config else base
    if asked not in (base, full) or version not in (None, own.version):
        raise InputError(f"data set {name}: only {full}:{own.version} can be prepared")
    if isinstance(own, Plain):
        return write_plain(base, root, files, report)
    _refuse_occupied(name, root / full / own.version)
    if isinstance(own, Original):
        _prepare_original(own, root, files, report)
    else:
        _prepare_collection(own, root, files, report)
    return _result(name, root)


def _refuse_occupied(name: str, folder: Path) -> None:
    """TFDS takes any existing folder for the finished data set, so say no before it does."""
    kinds = file_formats(folder)
    if folder.exists() and "array_record" not in kinds:
        holds = f"{kinds[0]} files, which need TensorFlow" if kinds else "no complete data set"
        raise InputError(
            f"{folder} is in the way: it holds {holds}. Move it away (or set TFDS_DATA_DIR to "
            f"another folder), then run: python -m jaxtrain prepare {name}"
        )


def _result(name: str, root: Path) -> Path:
    folder = find_folder(name, root)
    if folder is None:
        for other in folders(name, root):
            _refuse_occupied(name, other)
        raise InputError(f"data set {name}: nothing that can be read was written to {root}")
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
    write(original, _features(original, parsed), splits, root, report, totals)


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
    # The key is the position in the original files: TFDS orders examples by a hash of it, so this
    # is what makes the order that of the stock builders.
    for index, image in enumerate(data.images):
        example: dict[str, Any] = {key: int(value[index]) for key, value in data.labels.items()}
        example["image"] = _png(image)
        if ids:
            example["id"] = f"{split}_{index:05d}"
        yield index, example


def _png(image: np.ndarray) -> bytes:
    """Encoded here, from uint8 [height, width, channel], because TFDS encodes with TensorFlow."""
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
                    f"{collection.full} cannot be fetched for you: {collection.by_hand}, then run: "
                    f"python -m jaxtrain prepare {collection.full} --from DIR"
                )
            # Beside the result, because what is fetched may be too big for the system's own place.
            place = root / collection.name
            source = stack.enter_context(fetch(collection.full, urls, report, place))
            for part in collection.parts:
                check(source / part.names[0], part.size, part.sha256)
        splits = collection.examples(collection.find(source))
        write(collection, collection.features(), splits, root, report)


def _prepare_stock(name: str, root: Path, source: Path | None, report: Progress) -> Path:
    """Any other name, through the builder that TFDS has for it."""
    import tensorflow_datasets as tfds

    base = parse_name(name)[0]
    known = tfds.list_builders(with_community_datasets=False)
    own = [collection.full for collection in COLLECTIONS.values() if collection.name == base]
    if base not in known:
        hint = did_you_mean(base, {*known, *PLAIN}, otherwise="TFDS has none of that name")
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
    with quiet(report):
        try:
            builder = tfds.builder(name, data_dir=root, file_format="array_record")
            _refuse_occupied(name, Path(builder.data_dir))
            if source is None:
                _refuse_offline(name, builder.url_infos, root)
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False, manual_dir=manual)
            )
        except InputError:
            raise
        except Exception as error:  # Some hundred builders: each fails in its own way.
            if find_folder(name, root) is None:
                line = " ".join(str(error).split())[:300]
                raise InputError(f"TFDS could not prepare {name}: {type(error).__name__}: {line}") from error
    return _result(name, root)


def _refuse_offline(name: str, urls: Mapping[str, Any] | None, root: Path) -> None:
    """Without a network TFDS would retry for minutes: ask the first address once, and fast."""
    url = next(iter(urls or ()), "")
    downloads = root / "downloads"  # What TFDS fetched before may be all it needs.
    cached = downloads.is_dir() and any(path.is_file() for path in downloads.iterdir())
    if cached or not url.startswith("http"):
        return
    try:
        connect(url).close()
    except urllib.error.HTTPError:
        return  # Somebody answered.
    except OSError as error:
        raise InputError(
            f"cannot fetch {url} ({' '.join(str(error).split())}): get it on a machine with a "
            f"network, then run: python -m jaxtrain prepare {name} --from DIR"
        ) from error
