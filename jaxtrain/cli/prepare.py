"""``python -m jaxtrain prepare NAME``: download or import a data set into the TFDS folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxtrain.cli import SUMMARIES, command_line, experiments


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain prepare", SUMMARIES["prepare"])
    parser.add_argument(
        "name",
        help="the data set: cifar10, cifar100, mnist, fashion_mnist, tiny_shakespeare, imdb_reviews, "
        "movielens/100k-ratings, oxford_iiit_pet, imagenet2012 (with --from), etth1; "
        "or any other TFDS name, if TensorFlow is installed",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR_OR_TAR",
        help="import the original files from here: a file, an archive or a folder of them",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder of prepared data sets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(_run, make_parser(), argv)


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
