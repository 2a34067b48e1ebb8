"""``python -m jaxtrain evaluate --workdir RUN``: the report of a run's checkpoint, exact on any mesh."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtrain.cli import SUMMARIES, command_line, devices, experiments, flags
from jaxtrain.core.errors import InputError
from jaxtrain.core.files import not_finite, null_line, to_json, user_path
from jaxtrain.sharding import multihost

if TYPE_CHECKING:
    from jaxtrain.data import Source
    from jaxtrain.evaluation import Report
    from jaxtrain.experiment import Experiment
    from jaxtrain.monitor import Console

NO_REPORT = (
    "the loss names no task, so only its own metrics are shown; for more, add report=metrics.Classification()"
    ", Binary(), MultiLabel(), Segmentation(), Regression() or LanguageModel() to the experiment"
)
RESAMPLES = 1000


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain evaluate", SUMMARIES["evaluate"])
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the folder of a run")
    command_line.add_weights(parser)
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--split",
        default="test",
        choices=("test", "valid", "train"),
        help="which data, train without augmentation; default: %(default)s",
    )
    data.add_argument(
        "--source",
        metavar="EXPERIMENT[:NAME]",
        help="other data with the same fields: of another experiment, a name or a path, its train, valid or "
        "test set (the default), or a source that its file calls NAME",
    )
    parser.add_argument(
        "--ci",
        nargs="?",
        type=int,
        const=RESAMPLES,
        metavar="N",
        help="95 %% confidence intervals from N bootstrap resamples of the examples; "
        f"N is {RESAMPLES} if left out",
    )
    parser.add_argument(
        "--by",
        metavar="FIELD",
        help="every figure for each value of a field of the examples, with intervals, and the largest gaps",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--csv", action="store_true", help="write examples.csv: id, label, prediction and probability of each"
    )
    files.add_argument(
        "--png", action="store_true", help="draw the confusion matrix and the reliability curve (matplotlib)"
    )
    files.add_argument(
        "--mistakes",
        action="store_true",
        help="the most confident mistakes: a contact sheet of images (matplotlib), or an HTML page of texts",
    )
    files.add_argument(
        "--out", metavar="DIR", help="where files are written; default: RUN/evaluation/STEP-SPLIT"
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
    from jaxtrain.evaluation import make_report
    from jaxtrain.evaluation.files import Wanted
    from jaxtrain.monitor import make_console
    from jaxtrain.program.check_fields import find_report

    run = experiments.open_run(args)
    mesh = devices.make_mesh(args, command_line.warn)
    console = make_console(quiet=not multihost.is_process_0())
    wanted = Wanted(args.csv, args.png, args.mistakes)
    ci = _bootstrap(args)
    experiment, split = _data(args, run.experiment, console)
    source, report = _check(args, experiment, split, wanted)
    about, values = _evaluate(args, run, experiment, split, mesh, console)
    made, notes = make_report(report, values, args.by, ci, _needs_rows(args, wanted))
    names = experiments.class_names(run.experiment)
    title = f"{run.name}, step {about['step']}, {about['split']}, {about['examples']:,} examples"
    written = _write(args, wanted, made, source, run.folder, about, title, names) if wanted.flags() else []
    if args.json:
        _print_json({"name": run.name, **about}, made, written, console)
    else:
        _print_tables(title, made, find_report(experiment), names, console)
        for line in written:
            console.note(line)
    for note in notes:
        command_line.warn(note) if args.json else console.note(note)
    return 0


def _bootstrap(args: argparse.Namespace) -> Any:
    """Return how intervals are computed; None where they were not asked for."""
    from jaxtrain.evaluation import Bootstrap

    if args.ci is None:
        return None
    if not 1 <= args.ci <= 10**6:
        raise InputError(f"--ci {args.ci}: give a number of resamples in 1..1,000,000")
    return Bootstrap(args.ci)


def _data(args: argparse.Namespace, experiment: Experiment, console: Console) -> tuple[Experiment, str]:
    """Return an experiment with the data to evaluate, prepared, and the split of it that they are."""
    from jaxtrain.evaluation import splits

    note = command_line.warn if args.json else None  # stdout is for JSON alone
    if args.source is None:
        experiment, split = splits.evaluation_split(experiment, args.split)
        experiments.ensure_prepared(experiment, console, note)
        return experiment, split
    other = splits.other_source(args.source)
    experiment = dataclasses.replace(experiment, test=other)
    experiments.ensure_prepared(experiment, console, note)
    splits.check_source(args.source, other, experiment)
    return experiment, "test"


def _needs_rows(args: argparse.Namespace, wanted: Any) -> list[str]:
    """Return the flags that need what is collected of each example."""
    asked = {"--ci": args.ci is not None, "--by": args.by is not None}
    return [flag for flag, given in asked.items() if given] + wanted.flags()


def _check(args: argparse.Namespace, experiment: Experiment, split: str, wanted: Any) -> tuple[Source, Any]:
    """Return the source of the examples and the task report, checked against the flags."""
    from jaxtrain.evaluation import check_collects, files, splits
    from jaxtrain.program.check_fields import find_report

    source, report = splits.split_source(experiment, split), find_report(experiment)
    if args.out is not None and not wanted.flags():
        raise InputError("--out: no file is asked for: add --csv, --png or --mistakes")
    if args.out is not None and user_path(args.out).exists() and not user_path(args.out).is_dir():
        raise InputError(f"--out {args.out} is a file: give a folder")
    check_collects(report, _needs_rows(args, wanted))
    files.check_wanted(wanted, report, source)
    return source, report


def _evaluate(
    args: argparse.Namespace,
    run: experiments.RecordedRun,
    experiment: Experiment,
    split: str,
    mesh: Any,
    console: Console,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate; returns what was evaluated and the values of the metrics."""
    from jaxtrain.evaluation import Collect, splits
    from jaxtrain.program import assemble
    from jaxtrain.program.check_fields import find_report
    from jaxtrain.train.first_evaluation import check_first_evaluation
    from jaxtrain.train.loop import evaluate

    run.check_code(args.strict)
    report = find_report(experiment)

    def inspect(sources: Any) -> None:
        same = experiment.test is run.experiment.test
        known = {name: source for name, source in sources.items() if same or name != "test"}
        run.check_data(known, args.split if args.source is None else "none", args.accept_changed_data)

    collect = (
        None if report is None else Collect(report, len(splits.split_source(experiment, split)), args.by)
    )
    program = assemble(experiment, mesh, collect, inspect)
    selected, state = run.restore(args.weights, program.abstract_state)
    try:
        if report is not None and not type(report).__module__.startswith("jaxtrain."):
            for note in check_first_evaluation(program):  # a report of the user's own may count padding
                command_line.warn(note)
        values = evaluate(program, state, split, console)
    finally:
        program.close()
    about: dict[str, Any] = {"step": selected.step, "split": args.source or args.split}
    return {**about, "examples": program.evals[split].examples}, values


def _write(
    args: argparse.Namespace,
    wanted: Any,
    report: Report,
    source: Source,
    run: Path,
    about: dict[str, Any],
    title: str,
    names: Sequence[str] | None,
) -> list[str]:
    """Write the files on process 0; returns their paths in every process."""
    from jaxtrain.evaluation import files

    part = "".join(c if c.isalnum() or c in "._-" else "-" for c in about["split"])
    kind = command_line.parse_weights(args.weights)[1]  # of weights that were chosen: files of both are kept
    name = "-".join(filter(None, (f"{about['step']:06d}", part.strip(".-"), kind)))
    own = Path(run) / "evaluation" / name
    folder = own if args.out is None else user_path(args.out)
    return multihost.on_process_0(
        lambda: files.write_files(wanted, report, source, folder, title, names, about), "evaluation files"
    )


def _print_json(about: dict[str, Any], report: Report, written: list[str], console: Console) -> None:
    figures = report.as_json()
    body = about | {f"metric_{key}" if key in about else key: value for key, value in figures.items()}
    if written:
        body["files"] = written
    names = not_finite(body)
    if names and multihost.is_process_0():
        command_line.warn(null_line("this JSON", names))
    console.note(to_json(body))


def _print_tables(
    title: str, report: Report, task: Any, names: Sequence[str] | None, console: Console
) -> None:
    from jaxtrain.evaluation import text

    heading = getattr(task, "__name__", type(task).__name__)
    tables = text.tables_of(report, title, heading, getattr(task, "columns", ()), names)
    if title not in dict(tables):
        console.note(f"{title}: no metric is a number")
    for name, rows in tables:
        console.summary(name, rows)
    for line in [*text.notes_of(report), *([NO_REPORT] if task is None else [])]:
        console.note(line)
