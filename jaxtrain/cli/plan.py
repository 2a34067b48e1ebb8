"""``python -m jaxtrain plan --experiment NAME``: compile a run and print what it needs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from jaxtrain import sharding
from jaxtrain.cli import SUMMARIES, command_line, experiments, flags, plan_target
from jaxtrain.core.files import not_finite, null_line, to_json
from jaxtrain.experiment import Experiment
from jaxtrain.monitor import Console


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain plan", SUMMARIES["plan"])
    flags.add_experiment(parser)
    flags.add(parser)
    parser.add_argument(
        "--for",
        dest="card",
        metavar="CARD",
        help="compile for this GPU, which need not be here: a100, h100, h200, b200, l40s, rtx4090, or a TOML "
        "file with the figures of another; needs the extra gpu-compile",
    )
    parser.add_argument(
        "--hosts", type=int, metavar="N", help="with --for: the devices are on N hosts; default: 1"
    )
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="memory of one device, such as 80GB or 24GiB; default: what the device reports",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="compile every mesh, also with other batches and rematerialization",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, which is 0 also if the run does not fit."""
    return command_line.main(_run, make_parser(), argv)


def _run(args: argparse.Namespace) -> int:
    out = sys.stdout  # with --json, what a model prints while it is traced goes to stderr
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        return _plan(args, out)


def _plan(args: argparse.Namespace, out: TextIO) -> int:
    from jaxtrain import plan
    from jaxtrain.monitor import make_console
    from jaxtrain.plan import measure, report
    from jaxtrain.program import assemble, device_limits

    card = plan_target.chosen_card(args)
    name, _, experiment = experiments.load_experiment(args.experiment, args.set)
    if args.device_memory is not None:
        device_limits.parse_size(args.device_memory, "--device-memory")
    target = plan_target.make_target(args, card)
    mesh = target.mesh
    limit, console = device_limits.limit_of(mesh, args.device_memory), make_console(quiet=args.json)
    experiment, absent = _with_data(experiment, target, console)
    counted = plan.length_known(experiment.train)
    experiment, resident = plan.for_device_memory(experiment, limit)
    experiment = plan.with_open_data(experiment, mesh)
    program = assemble(experiment, mesh)
    try:
        found, steps = measure(program, resident), program.steps if counted else None
    finally:
        program.close()
        del program  # frees its data on the devices
    notes = [*target.notes(experiment.placement, limit), *absent, *found.notes]
    length = "" if steps is None else f", {steps:,} steps"
    title = f"{name} on {sharding.describe_mesh(mesh)}, batch {found.batch:,}{length}"
    console.note("\n".join([title, *(f"  {note}" for note in notes)]))
    console.note(f"\n{report.as_text(found)}\n\n{report.verdict_text(found, limit)}")

    variant, more = plan.variant_of(experiment, mesh), dict[str, Any]()
    trial = plan.make_trial(experiment, list(mesh.devices.flat), resident, _progress(variant))
    if args.search:
        with console.task("compile", plan.attempts(variant)) as advance:
            searched = plan.search_all(variant, limit.bytes if limit else None, trial, advance)
        more = report.search_json(searched, variant, limit)
        console.note(f"\n{report.search_text(searched, limit)}")
    elif limit is not None and found.total > limit.bytes:
        with console.task("search for what fits", 0):
            nearest = plan.find_nearest(variant, found, limit.bytes, trial)
        more = report.nearest_json(nearest, variant)
        console.note(f"\n{report.nearest_text(nearest, variant)}")
    if args.json:
        about = {"experiment": name, **target.as_json(), "steps": steps}
        body = about | report.as_json(found, limit) | {"notes": notes} | more
        if names := not_finite(body):
            command_line.warn(null_line("this JSON", names))
        print(to_json(body), file=out)
    return 0


def _with_data(
    experiment: Experiment, target: plan_target.Target, console: Console
) -> tuple[Experiment, tuple[str, ...]]:
    """Prepare missing data; to compile for a card, describe them instead. Returns notes, too."""
    from jaxtrain import plan

    if target.card is not None:
        return plan.describe_absent(experiment)
    experiments.ensure_prepared(experiment, console)
    return experiment, ()


def _progress(base: Any) -> Callable[[Any], None]:
    """Make a callback that prints each result where no progress bar is shown."""
    from jaxtrain.core.text import size_text

    def report(trial: Any) -> None:
        if not sys.stdout.isatty():
            words = " ".join(trial.variant.flags(base)) or "the run as typed"
            command_line.warn(f"tried {words}: {size_text(trial.plan.total) if trial.plan else trial.reason}")

    return report
