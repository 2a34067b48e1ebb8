"""``python -m jaxtrain evaluate --workdir RUN``: exact metrics of a run's checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtrain.cli import SUMMARIES, command_line, devices, experiments, flags
from jaxtrain.core.errors import InputError
from jaxtrain.sharding import multihost


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
    from jaxtrain.monitor import make_console
    from jaxtrain.program import assemble
    from jaxtrain.train.loop import evaluate

    run = experiments.open_run(args)
    name, experiment = run.name, run.experiment
    mesh = devices.make_mesh(args, command_line.warn)
    console = make_console(quiet=not multihost.is_process_0())
    experiments.ensure_prepared(experiment, console)
    run.check_code(args.strict)
    program = assemble(
        experiment,
        mesh,
        _confusion,
        lambda sources: run.check_data(sources, args.split, args.accept_changed_data),
    )
    if args.split not in program.evals:
        raise InputError(f"{name} has no {args.split} split: it has {', '.join(program.evals)}")
    selected, state = run.restore(args.checkpoint, program.abstract_state)
    try:
        values = evaluate(program, state, args.split, console)
    finally:
        program.close()
    confusion = values.pop("confusion", None)
    about = {
        "step": selected.step,
        "split": args.split,
        "examples": program.evals[args.split].examples,
    }
    if args.json:
        tables = {k: np.asarray(v).tolist() for k, v in (confusion or {}).items() if k != "accuracy"}
        console.note(json.dumps({"name": name, **about, **values, **tables}))
    else:
        _print_tables(name, about, values, confusion, experiments.class_names(experiment), console)
    return 0


def _confusion(outputs: Any, batch: Any) -> dict[str, Any]:
    """Return a confusion matrix if the outputs are class scores for a label, or for a map of labels."""
    from jaxtrain.metrics import ConfusionMatrix

    if "label" not in batch or batch["label"].ndim not in (1, 3) or outputs.ndim != batch["label"].ndim + 1:
        return {}
    return {"confusion": ConfusionMatrix.of(outputs, batch["label"], batch.get("mask"))}


def _print_tables(
    name: str, about: dict[str, Any], values: Any, confusion: Any, names: Any, console: Any
) -> None:
    from jaxtrain.monitor import format_metrics

    title = f"{name}, step {about['step']}, {about['split']}, {about['examples']:,} examples"
    rows = {key: format_metrics({key: value}, None).removeprefix(f"{key} ") for key, value in values.items()}
    console.summary(title, rows)
    if confusion is None:
        return
    rows = {"class": "precision  recall      F1"}
    for number, figures in enumerate(
        zip(confusion["precision"], confusion["recall"], confusion["f1"], strict=True)
    ):
        label = names[number] if names else str(number)
        rows[label] = "  ".join(f"{100 * x:7.2f} %" for x in figures)
    console.summary("by class", rows)
