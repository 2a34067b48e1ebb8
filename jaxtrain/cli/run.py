"""``python -m jaxtrain.run --experiment NAME``: train, resume, evaluate, save.

Only the command line is here, so that ``--help`` and ``--list`` do not import JAX. ``cli.train`` does the
work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxtrain.cli import SUMMARIES, command_line, flags, listing
from jaxtrain.core.errors import InputError
from jaxtrain.core.signals import GRACE


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
    parser.add_argument("--workdir", metavar="DIR", help="the run's folder; default: runs/NAME/HASH-seedS")
    parser.add_argument("--new", action="store_true", help="start a new run next to the existing one")
    parser.add_argument(
        "--extend", action="store_true", help="resume with more epochs under a longer schedule"
    )
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="continue although the data have changed since the run started, and record that",
    )
    parser.add_argument(
        "--resume",
        default="newest",
        choices=("newest", "last-good"),
        help="which checkpoint to resume from; last-good moves corrupt checkpoints aside and takes the "
        "newest intact one; default: %(default)s",
    )
    parser.add_argument(
        "--init-from", metavar="RUN[:STEP]", help="start from the parameters of another run's checkpoint"
    )
    parser.add_argument(
        "--init-map",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="rename parameters of --init-from; head= leaves head as initialised; may be repeated",
    )
    flags.add(parser, many_processes=True)
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE,
        metavar="SECONDS",
        help="time limit from a signal to the end of the process, saving included; default: %(default)g",
    )
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
        "--strict",
        action="store_true",
        help="fail if the step is compiled a second time, or the code has changed since the run started",
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
    from jaxtrain.cli import train  # imports JAX

    return train.run(args)
