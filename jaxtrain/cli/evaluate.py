"""``python -m jaxtrain evaluate --workdir RUN``: exact metrics of a run's checkpoint."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtrain.cli import SUMMARIES, command_line, devices, experiments, flags
from jaxtrain.core.errors import InputError
from jaxtrain.core.files import not_finite, null_line, to_json
from jaxtrain.monitor import Console
from jaxtrain.sharding import multihost

SHOWN_CLASSES = 1000
"""Most classes of a table that is printed; JSON has the figures of any number."""

NO_REPORT = (
    "the loss names no task, so only its own metrics are shown; for more, add report=metrics.Classification()"
    ", Binary(), MultiLabel(), Segmentation(), Regression() or LanguageModel() to the experiment"
)


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain evaluate", SUMMARIES["evaluate"])
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the folder of a run")
    command_line.add_checkpoint(parser)
    parser.add_argument(
        "--split", default="test", choices=("test", "valid"), help="which data; default: %(default)s"
    )
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="evaluate data that have changed since the run started, and record that",
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail if the code has changed since the run started"
    )
    flags.add(parser, many_processes=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(_run, make_parser(), argv)


def _run(args: argparse.Namespace) -> int:
    from jaxtrain.metrics.figures import REPORT, GroupedReport
    from jaxtrain.monitor import make_console
    from jaxtrain.program import assemble
    from jaxtrain.program.check_fields import find_report
    from jaxtrain.train.first_evaluation import check_first_evaluation
    from jaxtrain.train.loop import evaluate

    run = experiments.open_run(args)
    name, experiment = run.name, run.experiment
    mesh = devices.make_mesh(args, command_line.warn)
    console = make_console(quiet=not multihost.is_process_0())
    experiments.ensure_prepared(experiment, console)
    run.check_code(args.strict)
    report = find_report(experiment)
    program = assemble(
        experiment,
        mesh,
        None if report is None else GroupedReport(report),
        lambda sources: run.check_data(sources, args.split, args.accept_changed_data),
    )
    if args.split not in program.evals:
        raise InputError(f"{name} has no {args.split} split: it has {', '.join(program.evals)}")
    selected, state = run.restore(args.checkpoint, program.abstract_state)
    try:
        if report is not None and not type(report).__module__.startswith("jaxtrain."):
            for note in check_first_evaluation(program):  # a report of the user's own may count padding
                command_line.warn(note)
        values = evaluate(program, state, args.split, console)
    finally:
        program.close()
    figures = _without_repeats(values.pop(REPORT, {}), values)
    about = {
        "step": selected.step,
        "split": args.split,
        "examples": program.evals[args.split].examples,
    }
    if args.json:
        body = {"name": name, **about}
        body |= {f"metric_{key}" if key in body else key: value for key, value in (values | figures).items()}
        names = not_finite(body)
        if names and multihost.is_process_0():
            command_line.warn(null_line("this JSON", names))
        console.note(to_json(body))
        return 0
    title = f"{name}, step {about['step']}, {about['split']}, {about['examples']:,} examples"
    _print_numbers(title, values, console)
    if report is None:
        console.note(NO_REPORT)
        return 0
    _print_numbers(getattr(report, "__name__", type(report).__name__), figures, console)
    _print_by_class(figures, getattr(report, "columns", ()), experiments.class_names(experiment), console)
    return 0


def _without_repeats(figures: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return a report's figures without those that the loss reports too.

    One that differs from the loss's metric of the same name is called ``report_NAME``.
    """
    kept = {}
    for name, figure in figures.items():
        if name not in values:
            kept[name] = figure
        elif not _same(figure, values[name]):
            kept[f"report_{name}"] = figure
    return kept


def _same(a: Any, b: Any) -> bool:
    """Return whether both are the same number, NaN included."""
    if not (isinstance(a, int | float) and isinstance(b, int | float)):
        return False
    return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))


def _print_numbers(title: str, values: dict[str, Any], console: Console) -> None:
    """Print the numbers among ``values``."""
    from jaxtrain.monitor import format_metrics, split_tables

    numbers, _ = split_tables(values)
    rows = {
        key: f"{value:,}"
        if isinstance(value, int)
        else format_metrics({key: value}, None).removeprefix(f"{key} ")
        for key, value in numbers.items()
    }
    if rows:
        console.summary(title, rows)
    else:
        console.note(f"{title}: no metric is a number")


def _print_by_class(
    figures: dict[str, Any], columns: Sequence[str], names: Sequence[str] | None, console: Console
) -> None:
    """Print a row for each class, with the figures that ``columns`` names."""
    table = {name: np.asarray(figures[name]) for name in columns if name in figures}
    if not table:
        return
    classes = len(next(iter(table.values())))
    if classes > SHOWN_CLASSES:
        console.note(f"figures by class of {classes:,} classes: --json prints them")
        return
    rows = {"class": "  ".join(f"{name:>9}" for name in table)}
    for number in range(classes):
        name = names[number] if names and number < len(names) else str(number)
        label = name if name not in rows else f"{number} {name}"
        rows[label] = "  ".join(_cell(column[number]) for column in table.values())
    console.summary("by class", rows)


def _cell(figure: Any) -> str:
    return f"{figure:9,}" if np.issubdtype(type(figure), np.integer) else f"{100 * figure:7.2f} %"
