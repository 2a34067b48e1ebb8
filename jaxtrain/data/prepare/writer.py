"""Write examples in the TensorFlow Datasets layout (``array_record``), without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxtrain.core.errors import InputError
from jaxtrain.core.files import temporary_folder
from jaxtrain.data.data_dir import find_prepared
from jaxtrain.data.prepare.download import Progress
from jaxtrain.data.prepare.originals import DataSetInfo, Examples

# An unfinished folder that is older was left by a killed prepare.
_STALE_SECONDS = 3600.0
# TFDS sorts a large split in 1,000 open files; many systems allow 1,024 in all.
_OPEN_FILES = 4096


def write_data_set(
    about: DataSetInfo,
    features: Mapping[str, Any],
    splits: Mapping[str, Callable[[], Examples]],
    root: Path,
    report: Progress,
    totals: Mapping[str, int] | None = None,
) -> None:
    """Write a data set to ``root`` atomically: its folder is renamed into place at the end.

    Examples are read one at a time. TFDS orders them by a hash of their keys: in memory up to 1 GB per
    split, and on disk above, which temporarily takes twice the size of the split.

    Args:
      about: name, version and description.
      features: TFDS features by name. Images must be encoded, because TFDS encodes with TensorFlow.
      splits: per split, a function that returns an iterator of ``(key, example)``.
      root: the folder of all data sets.
      report: called as ``report("name/split", done, total)``.
      totals: the number of examples of each split, if known.

    Raises:
      InputError: two examples have the same key, or ``root`` cannot be written to. Errors of the
        iterators propagate.
    """
    import tensorflow_datasets as tfds

    _remove_stale(root / about.name)
    with silence_tfds(report) as visible_report, _sort_without_tensorflow():
        examples = {
            split: _count_examples(
                f"{about.name}/{split}", make, visible_report, (totals or {}).get(split, 0)
            )
            for split, make in splits.items()
        }
        builder = _make_builder(about, features, examples, root)
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        try:
            # TFDS makes empty download folders even for builders that download nothing.
            with temporary_folder("jaxtrain-") as scratch:
                builder.download_and_prepare(download_dir=scratch, download_config=config)
        except OSError as error:
            # Another process may have finished first: its folder is the same. TFDS removed ours.
            if find_prepared(f"{about.full}:{about.version}", root) is None:
                raise InputError(f"cannot write {about.full} to {root}: {error}") from error


def _remove_stale(parent: Path) -> None:
    """Remove the ``incomplete.*`` folders of killed processes; a finished write renames its folder."""
    for path in (*parent.glob("incomplete.*"), *parent.glob("*/incomplete.*")):
        if path.is_symlink() or (path.parent != parent and path.parent.is_symlink()):
            continue  # the target of a link is not ours
        with contextlib.suppress(OSError):
            # A folder's time is that of its last new file, and writing one file may take hours.
            newest = max(p.stat().st_mtime for p in (path, *path.rglob("*")))
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(path)


def _count_examples(label: str, make: Callable[[], Examples], report: Progress, total: int) -> Examples:
    seen: set[int | str] = set()
    for key, example in make():
        if key in seen:
            raise InputError(f"{label}: {key} appears twice: give only the original files")
        seen.add(key)
        yield key, example
        if len(seen) % 1000 == 0 and len(seen) != total:
            report(label, len(seen), total)
    report(label, len(seen), len(seen))


def _make_builder(
    about: DataSetInfo, features: Mapping[str, Any], splits: Mapping[str, Examples], root: Path
) -> Any:
    import tensorflow_datasets as tfds

    version = tfds.core.Version(about.version)
    # TFDS records the first config as the default, which the name without a config means.
    configs = [name for name in dict.fromkeys((about.default_config, about.config)) if name]

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = about.name
        VERSION = version
        BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS declares it so
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
            raise NotImplementedError  # Abstract in TFDS; _split_generators returns the examples.

    return Builder(data_dir=root, file_format="array_record", config=about.config)


@contextlib.contextmanager
def silence_tfds(report: Progress) -> Iterator[Progress]:
    """Silence TFDS's progress bars and prints; yield a ``report`` that still reaches stdout."""
    import tensorflow_datasets as tfds

    stdout = sys.stdout

    def visible_report(label: str, done: int, total: int) -> None:
        with contextlib.redirect_stdout(stdout):
            report(label, done, total)

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        yield visible_report


@contextlib.contextmanager
def _sort_without_tensorflow() -> Iterator[None]:
    """Let TFDS sort a split of more than 1 GB, for which it would only need TensorFlow to open files."""
    from tensorflow_datasets.core import shuffle

    gfile = SimpleNamespace(GFile=open, exists=os.path.exists, remove=os.remove)
    errors = SimpleNamespace(ResourceExhaustedError=())  # Catches nothing: open raises OSError.
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
