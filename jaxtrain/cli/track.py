"""``python -m jaxtrain track --workdir RUN --to TRACKER``: send the records of a run to a tracker."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxtrain.cli import SUMMARIES, command_line, flags
from jaxtrain.core import redact
from jaxtrain.core.errors import InputError, RunError


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain track", SUMMARIES["track"])
    parser.add_argument("--workdir", metavar="RUN", required=True, help="the run's folder")
    parser.add_argument(
        "--to",
        metavar="TRACKER",
        action="append",
        required=True,
        help=f"{flags.TRACKERS}; may be repeated",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(_run, make_parser(), argv)


def _run(args: argparse.Namespace) -> int:
    """Send what a tracker has not got, and wait for it; returns the exit code."""
    from jaxtrain.monitor import make_console
    from jaxtrain.monitor.trackers import RunInfo, Trackers, make_tracker
    from jaxtrain.train.run_folder import RunFolder

    trackers = [make_tracker(spec, "--to") for spec in args.to]
    folder = RunFolder(command_line.workdir_path(args.workdir))
    record, steps = folder.record(), folder.recorded_steps()
    if record is None or not steps:
        raise InputError(f"--workdir {args.workdir} holds no run with records (metrics.jsonl)")
    done = "finished" if (folder.path / "result.json").exists() else "stopped"
    console = make_console()
    with folder.locked(console.note):  # a run that trains sends its records itself
        sending = Trackers(trackers, RunInfo.of(folder.path, record), console.note)
        sending.begin(steps)
        unsent = sending.end(done)
    if unsent:
        raise RunError(f"{len(unsent)} of {len(trackers)} trackers did not take all records: see above")
    console.note(
        f"sent to {redact.redact(', '.join(args.to))}: all records of {args.workdir}, to step {steps}"
    )
    return 0
