"""``python -m jaxtrain.run --experiment NAME``: train, resume, evaluate, save.

Only the command line is here, so that ``--help`` and ``--list`` do not import JAX. ``cli.train`` does the
work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxtrain.cli import SUMMARIES, command_line, flags, listing, sweep
from jaxtrain.core.errors import InputError


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain.run", SUMMARIES["run"])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--experiment", metavar="NAME", help="a name from --list, or a path to a .py file")
    action.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument(
        "--long",
        action="store_true",
        help="with --list: load each experiment, and show its data, model and parameter count",
    )
    flags.add_settings(parser)
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="train N runs, with seeds counted up from the experiment's, and show their mean and spread",
    )
    flags.add_strategy(parser)
    parser.add_argument("--workdir", metavar="DIR", help="the run's folder; default: runs/NAME/HASH-seedS")
    parser.add_argument("--new", action="store_true", help="start a new run next to the existing one")
    parser.add_argument(
        "--extend", action="store_true", help="resume with more epochs under a longer schedule"
    )
    parser.add_argument(
        "--resume",
        default="newest",
        choices=("newest", "last-good"),
        help="which checkpoint to resume from; last-good moves corrupt checkpoints aside and takes the "
        "newest intact one; default: %(default)s",
    )
    flags.add_start(parser)
    flags.add(parser, many_processes=True)
    flags.add_grace(parser)
    parser.add_argument(
        "--hang-after",
        type=float,
        metavar="SECONDS",
        help="if no step finishes for this long, compilation included, write the stacks of all threads to "
        "hang-N.txt in the run's folder and exit with 3",
    )
    parser.add_argument("--smoke", action="store_true", help="two steps, an evaluation, a save and a restore")
    parser.add_argument(
        "--overfit", type=int, metavar="N", help="train on N fixed examples for 200 steps, and test on them"
    )
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        help="trace updates START to STOP (from 1, both included) for TensorBoard and Perfetto, and print "
        "where their time went",
    )
    parser.add_argument(
        "--monitor-layers",
        action="store_true",
        help="at every checkpoint, write pictures for TensorBoard: what the layers return for the first test "
        "example, and the kernels of the first layer",
    )
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="TRACKER",
        help=f"send the records to a tracker: {flags.TRACKERS}; may be repeated",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(_run, make_parser(), argv, needs_jax=lambda args: not args.list)


def _run(args: argparse.Namespace) -> int:
    if args.list:
        return listing.show(args.long)
    if args.long:
        raise InputError("--long needs --list")
    if args.seeds is not None:
        return sweep.run_seeds(args)
    if args.strategy != "auto":
        raise InputError(f"--strategy {args.strategy} needs --seeds")
    from jaxtrain.cli import train  # imports JAX

    return train.run(args)
