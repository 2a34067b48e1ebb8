"""``python -m jaxtrain.run --experiment NAME``: train, resume, evaluate, save.

The command line alone, so that ``--help`` and ``--list`` need not wait for JAX; ``cli.train`` does the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxtrain.cli import SUMMARIES, command_line, flags, listing
from jaxtrain.core.signals import GRACE


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="jaxtrain.run", description=SUMMARIES["run"])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--experiment", metavar="NAME", help="a name from --list, or a path to a .py")
    what.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a setting")
    parser.add_argument("--workdir", metavar="DIR", help="default: runs/NAME/HASH-seedS")
    parser.add_argument("--new", action="store_true", help="a fresh run beside the one that is there")
    parser.add_argument(
        "--extend", action="store_true", help="go on with more epochs under a longer schedule"
    )
    parser.add_argument(
        "--resume",
        default="newest",
        choices=("newest", "last-good"),
        help="last-good: where checkpoints are damaged, set them aside and go on from one that is not",
    )
    parser.add_argument(
        "--init-from", metavar="RUN[:STEP]", help="begin with the parameters of another run's checkpoint"
    )
    parser.add_argument(
        "--init-map",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="names of its parameters that are others here; head= keeps the new values of head",
    )
    flags.add(parser, many_processes=True)
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE,
        metavar="SECONDS",
        help="from a signal to the end, at most, saving included; default: %(default)g",
    )
    parser.add_argument(
        "--hang-after",
        type=float,
        metavar="SECONDS",
        help="end with all stacks and exit code 3 when no step finishes for so long, compilation included",
    )
    parser.add_argument("--smoke", action="store_true", help="two steps, an evaluation, a save and a restore")
    parser.add_argument("--overfit", type=int, metavar="N", help="train on N fixed examples")
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        help="trace these updates for TensorBoard and Perfetto, and tell where their time went",
    )
    parser.add_argument("--strict", action="store_true", help="a second compile of the step is an error")
    return command_line.main(_run, parser, argv, compiles=lambda args: not args.list)


def _run(args: argparse.Namespace) -> int:
    if args.list:
        return listing.show()
    from jaxtrain.cli import train  # imports JAX

    return train.run(args)
