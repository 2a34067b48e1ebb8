"""``python -m jaxtrain prepare NAME``: fetch or import a data set into the TFDS folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxtrain.cli import SUMMARIES, command_line, experiments


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="jaxtrain prepare", description=SUMMARIES["prepare"])
    parser.add_argument(
        "name",
        help="cifar10, cifar100, mnist, fashion_mnist, tiny_shakespeare, imdb_reviews, "
        "movielens/100k-ratings, oxford_iiit_pet, imagenet2012 (with --from), etth1; "
        "or, with TensorFlow, any TFDS name",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR_OR_TAR",
        help="the original files, already here: a file, an archive or a folder of them",
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets"
    )
    return command_line.main(_run, parser, argv)


def _run(args: argparse.Namespace) -> int:
    from jaxtrain.data.prepare import prepare
    from jaxtrain.monitor import make_console

    console = make_console()
    folder = experiments.with_progress(
        console,
        lambda progress: prepare(args.name, data_dir=args.data_dir, source=args.source, progress=progress),
    )
    console.note(f"{args.name} is prepared in {folder}")
    return 0
