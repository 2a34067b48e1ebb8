"""Writing a data set to disk in the TensorFlow Datasets layout: ``prepare(name)``.

cifar10, cifar100, mnist and fashion_mnist are written from their original files without
TensorFlow, as the stock TFDS builders would: same version, features, names and example order. Every
other name goes through its stock TFDS builder, which needs TensorFlow.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.data.archives import load_members
from jaxtrain.data.fetch import Progress, connect, fetch_members
from jaxtrain.data.formats import ORIGINALS, Original, Parsed, Split
from jaxtrain.data.tfds import default_data_dir, file_formats, find_folder, folders, parse_name
from jaxtrain.errors import InputError

# Only a prepare that was killed leaves its half-written folder for this long.
_STALE_SECONDS = 3600.0


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes data set ``name`` in the TFDS layout (``array_record``) and returns its folder.

    Does nothing when it is prepared already. The folder appears whole or not at all, whatever
    interrupts this call and however many processes make it at the same time. Original files are
    checked against their known checksums (cifar100's two lists of class names have none: their
    lengths are checked).

    Args:
      name: a TFDS name: ``"cifar10"``, ``"imdb_reviews/plain_text"``.
      data_dir: the folder of all data sets; None: ``$TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``.
      source: original files already on this machine: a .tar.gz, .tar or .zip archive, or a folder
        that holds the files or such an archive. None: fetch them. For names that go through their
        stock TFDS builder, the folder that TFDS calls ``manual_dir``.
      progress: called as ``progress(label, done, total)``, in bytes while fetching and in examples
        while writing; total is 0 when it is not known.

    Raises:
      InputError: no such data set, no network, a file that is missing or not the original, or
        TensorFlow is needed and not installed.

    >>> prepare("cifer10", data_dir="/nowhere")
    Traceback (most recent call last):
        ...
    jaxtrain.errors.InputError: unknown data set 'cifer10': did you mean cifar10?
    """
    folder = find_folder(name, data_dir)
    if folder is not None:
        return folder
    root = Path(data_dir).expanduser().absolute() if data_dir is not None else default_data_dir()
    report = progress or (lambda label, done, total: None)
    files = Path(source).expanduser() if source is not None else None
    base, config, version = parse_name(name)
    original = ORIGINALS.get(base)
    if original is None:
        return _prepare_stock(name, root, files, report)
    if config is not None or version not in (None, original.version):
        raise InputError(f"data set {name}: only {base}:{original.version} can be prepared")
    _refuse_occupied(name, root / base / original.version)
    members = fetch_members(original, report) if files is None else load_members(original, files)
    _write(original, original.parse(members), root, report)
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


def _write(original: Original, parsed: Parsed, root: Path, report: Progress) -> None:
    import tensorflow_datasets as tfds

    _check_labels(original, parsed)
    _sweep(root / original.name)
    with _quiet(report) as loud:
        builder = _builder(original, parsed, root, loud)
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        try:
            # TFDS makes empty download folders even for builders that download nothing.
            with tempfile.TemporaryDirectory(prefix="jaxtrain-") as scratch:
                builder.download_and_prepare(download_dir=scratch, download_config=config)
        except OSError as error:
            # Another process was faster: its folder is as good. TFDS removed ours.
            if find_folder(original.name, root) is None:
                raise InputError(f"cannot write {original.name} to {root}: {error}") from error


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


def _sweep(parent: Path) -> None:
    """Removes what killed runs left: TFDS writes to ``incomplete.*`` and renames at the end."""
    for path in parent.glob("incomplete.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path)


def _builder(original: Original, parsed: Parsed, root: Path, report: Progress) -> Any:
    """A TFDS builder that yields what is already in memory, so that it needs no TensorFlow."""
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

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = original.name
        VERSION = tfds.core.Version(original.version)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=original.description,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                homepage=original.homepage,
                citation=original.citation,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {
                split: _examples(f"{self.name}/{split}", data, original.ids, report)
                for split, data in parsed.splits.items()
            }

        def _generate_examples(self) -> Any:
            raise NotImplementedError  # Abstract in TFDS; the generators above are the examples.

    return Builder(data_dir=root, file_format="array_record")


def _examples(
    label: str, data: Split, ids: bool, report: Progress
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # The key is the position in the original files: TFDS orders examples by a hash of it, so this
    # is what makes the order that of the stock builders.
    total = len(data.images)
    for index in range(total):
        example: dict[str, Any] = {key: int(value[index]) for key, value in data.labels.items()}
        example["image"] = _png(data.images[index])
        if ids:
            example["id"] = f"{label.rsplit('/', 1)[1]}_{index:05d}"
        yield index, example
        if (index + 1) % 1000 == 0 or index + 1 == total:
            report(label, index + 1, total)


def _png(image: np.ndarray) -> bytes:
    """Encoded here, from uint8 [height, width, channel], because TFDS encodes with TensorFlow."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.squeeze())).save(buffer, "png")
    return buffer.getvalue()


@contextlib.contextmanager
def _quiet(report: Progress) -> Iterator[Progress]:
    """Silences TFDS's bars and prints; yields a ``report`` that still reaches stdout."""
    import tensorflow_datasets as tfds

    stdout = sys.stdout

    def loud(label: str, done: int, total: int) -> None:
        with contextlib.redirect_stdout(stdout):
            report(label, done, total)

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        yield loud


def _prepare_stock(name: str, root: Path, source: Path | None, report: Progress) -> Path:
    """Any other name, through the builder that TFDS has for it."""
    import tensorflow_datasets as tfds

    base = parse_name(name)[0]
    known = tfds.list_builders(with_community_datasets=False)
    if base not in known:
        close = difflib.get_close_matches(base, {*known, *ORIGINALS}, n=1)
        hint = f"did you mean {close[0]}?" if close else "TFDS has none of that name"
        raise InputError(f"unknown data set {name!r}: {hint}")
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(
            f"preparing {name} needs TensorFlow (reading it will not): run: pip install 'jaxtrain[prepare]'"
        )
    if source is not None and not source.exists():
        raise InputError(f"{source}: no such file or folder")
    manual = source.parent if source is not None and source.is_file() else source
    report(name, 0, 0)
    with _quiet(report):
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
