"""Writing examples to disk in the TensorFlow Datasets layout (``array_record``), without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxtrain.core.errors import InputError
from jaxtrain.data.data_dir import find_folder
from jaxtrain.data.prepare.download import Progress
from jaxtrain.data.prepare.originals import About, Examples

# Only a prepare that was killed leaves its half-written folder for this long.
_STALE_SECONDS = 3600.0
# TFDS sorts a large split in 1,000 files that are open at once; many systems allow 1,024 in all.
_OPEN_FILES = 4096


def write(
    about: About,
    features: Mapping[str, Any],
    splits: Mapping[str, Callable[[], Examples]],
    root: Path,
    report: Progress,
    totals: Mapping[str, int] | None = None,
) -> None:
    """Writes a whole data set to ``root``; its folder appears at the end, or not at all.

    Examples are taken one at a time. TFDS orders them by a hash of their keys: it holds a split in
    memory up to 1 GB and sorts a larger one on disk, which takes the split's size twice for a while.

    Args:
      about: name, version and description.
      features: TFDS features by name. Images are given encoded, because TFDS encodes with TensorFlow.
      splits: for each split, what makes an iterator of ``(key, example)``.
      root: the folder of all data sets.
      report: called as ``report("name/split", done, total)``.
      totals: the number of examples of each split, where it is known.

    Raises:
      InputError: two examples have one key, or ``root`` cannot be written to; and whatever the
        iterators raise.
    """
    import tensorflow_datasets as tfds

    _sweep(root / about.name)
    with quiet(report) as loud, _sorting():
        counted = {
            split: _counted(f"{about.name}/{split}", make, loud, (totals or {}).get(split, 0))
            for split, make in splits.items()
        }
        builder = _builder(about, features, counted, root)
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        try:
            # TFDS makes empty download folders even for builders that download nothing.
            with tempfile.TemporaryDirectory(prefix="jaxtrain-") as scratch:
                builder.download_and_prepare(download_dir=scratch, download_config=config)
        except OSError as error:
            # Another process was faster: its folder is as good. TFDS removed ours.
            if find_folder(f"{about.full}:{about.version}", root) is None:
                raise InputError(f"cannot write {about.full} to {root}: {error}") from error


def _sweep(parent: Path) -> None:
    """Removes what killed runs left: everything is written to ``incomplete.*`` and renamed at the end."""
    for path in (*parent.glob("incomplete.*"), *parent.glob("*/incomplete.*")):
        if path.is_symlink() or (path.parent != parent and path.parent.is_symlink()):
            continue  # what a link leads to was not left by us
        with contextlib.suppress(OSError):
            # A folder's own time is that of its last new file, and one file may take hours.
            newest = max(p.stat().st_mtime for p in (path, *path.rglob("*")))
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(path)


def _counted(label: str, make: Callable[[], Examples], report: Progress, total: int) -> Examples:
    seen: set[int | str] = set()
    for key, example in make():
        if key in seen:
            raise InputError(f"{label}: {key} is there twice: give the original files and nothing else")
        seen.add(key)
        yield key, example
        if len(seen) % 1000 == 0 and len(seen) != total:
            report(label, len(seen), total)
    report(label, len(seen), len(seen))


def _builder(about: About, features: Mapping[str, Any], splits: Mapping[str, Examples], root: Path) -> Any:
    import tensorflow_datasets as tfds

    version = tfds.core.Version(about.version)
    # The default one is recorded beside the configs, for whoever reads the data set by its bare name.
    configs = [name for name in dict.fromkeys((about.default_config, about.config)) if name]

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = about.name
        VERSION = version
        BUILDER_CONFIGS = [  # noqa: RUF012 - as TFDS declares it
            tfds.core.BuilderConfig(name=config, version=version, description=about.description)
            for config in configs
        ]

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=about.description,
                features=tfds.features.FeaturesDict(dict(features)),
                supervised_keys=about.supervised,
                homepage=about.homepage,
                citation=about.citation,
            )

        def _split_generators(self, dl_manager: Any) -> Mapping[str, Any]:
            return splits

        def _generate_examples(self) -> Any:
            raise NotImplementedError  # Abstract in TFDS; the iterators above are the examples.

    return Builder(data_dir=root, file_format="array_record", config=about.config)


@contextlib.contextmanager
def quiet(report: Progress) -> Iterator[Progress]:
    """Silences TFDS's bars and prints; yields a ``report`` that still reaches stdout."""
    import tensorflow_datasets as tfds

    stdout = sys.stdout

    def loud(label: str, done: int, total: int) -> None:
        with contextlib.redirect_stdout(stdout):
            report(label, done, total)

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        yield loud


@contextlib.contextmanager
def _sorting() -> Iterator[None]:
    """Lets TFDS sort a split of more than 1 GB: it opens files through TensorFlow there, for no more."""
    from tensorflow_datasets.core import shuffle

    gfile = SimpleNamespace(GFile=open, exists=os.path.exists, remove=os.remove)
    errors = SimpleNamespace(ResourceExhaustedError=())  # Caught by nobody: ours is an OSError.
    tensorflow, shuffle.tf = shuffle.tf, SimpleNamespace(io=SimpleNamespace(gfile=gfile), errors=errors)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        shuffle.tf = tensorflow
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
