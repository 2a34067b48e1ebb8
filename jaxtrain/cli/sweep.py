"""``python -m jaxtrain sweep``: train every combination of settings with several seeds, and compare them."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.cli import SUMMARIES, command_line, flags
from jaxtrain.core.errors import InputError

ALONE: dict[str, Any] = {
    **dict.fromkeys(("new", "extend", "smoke", "monitor_layers"), False),
    **dict.fromkeys(("overfit", "profile", "hang_after")),
    "resume": "newest",
    "track": [],
}
"""Flags of ``run`` that do not go with ``--seeds``, and their defaults."""


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain sweep", SUMMARIES["sweep"])
    flags.add_experiment(parser)
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="PATH=V1,V2,...",
        help="values of a setting, such as optimizer.lr=0.05,0.1; may be repeated, for every combination; "
        "the first one is the baseline",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="seeds of each combination, counted up from the experiment's; default: %(default)s",
    )
    flags.add_strategy(parser)
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="the sweep's folder, with its runs in it; default: runs/NAME/sweep-HASH, with the runs in "
        "runs/NAME/HASH-seedS, where run finds them",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    flags.add_start(parser)
    flags.add(parser, many_processes=True)
    flags.add_grace(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(_run, make_parser(), argv)


def run_seeds(args: argparse.Namespace) -> int:
    """Do ``run --seeds``: a sweep without a grid. Returns the exit code."""
    for name, default in ALONE.items():
        if getattr(args, name) != default:
            raise InputError(f"--{name.replace('_', '-')} is for one run: leave out --seeds")
    return _run(argparse.Namespace(**vars(args), grid=[], json=False))


def _run(args: argparse.Namespace) -> int:
    """Train the runs and show the table; returns the exit code."""
    from jaxtrain.cli import devices, experiments  # these import JAX
    from jaxtrain.core import redact
    from jaxtrain.experiment import code, config_hash, find
    from jaxtrain.monitor import make_console
    from jaxtrain.sharding import multihost
    from jaxtrain.sweep import members, training
    from jaxtrain.sweep import run as sweep_run
    from jaxtrain.train.run_folder import RunFolder
    from jaxtrain.train.session import Session

    if not 0 < args.grace < float("inf"):
        raise InputError(f"--grace {args.grace:g}: give seconds above 0")
    grid = members.parse_grid(args.grid)
    name, origin, experiment = experiments.load_experiment(args.experiment, args.set)
    cells = members.expand(experiment, grid, args.seeds)
    mesh = devices.make_mesh(args, command_line.warn)
    console = make_console(quiet=args.json or not multihost.is_process_0())
    experiments.ensure_prepared(experiment, console)
    if args.workdir:
        folder = command_line.workdir_path(args.workdir)
        runs = folder
    else:
        what = json.dumps([config_hash(experiment), experiment.seed, args.seeds, grid])
        folder = Path("runs", name, f"sweep-{hashlib.sha256(what.encode()).hexdigest()[:8]}")
        runs = folder.parent
    module = find(args.experiment).module()
    session = Session(
        name=name,
        folder=RunFolder(folder),
        mesh=mesh,
        console=console,
        record={"origin": origin, "overrides": [redact.redact_setting(pair) for pair in args.set]},
        deterministic=args.deterministic,
        file=experiments.module_file(module),
        code=code.digests(module, experiment),
        accept_changed_data=args.accept_changed_data,
        init_from=args.init_from,
        init_map=args.init_map,
        strict=args.strict,
        grace=args.grace,
        resume_command=_resume_command(args),
    )
    sweep = training.Sweep(
        experiment=experiment, cells=cells, session=session, runs=runs, strategy=args.strategy
    )
    table = sweep_run.run(sweep)
    if args.json:
        sys.stdout.write(json.dumps(table, indent=1) + "\n")
    sweep_run.check(table)
    return 0


def _resume_command(args: argparse.Namespace) -> str:
    """Return the command line that resumes the sweep, without secrets."""
    from jaxtrain.core import redact

    words = ["python", "-m", "jaxtrain", "sweep", "--experiment", args.experiment]
    for setting in args.set:
        words += ["--set", redact.redact_setting(setting)]
    for grid in args.grid:
        words += ["--grid", redact.redact_setting(grid)]
    words += [] if args.init_from is None else ["--init-from", args.init_from]
    for pair in args.init_map:
        words += ["--init-map", pair]
    words += ["--seeds", str(args.seeds)]
    words += [] if args.strategy == "auto" else ["--strategy", args.strategy]
    words += [] if args.workdir is None else ["--workdir", args.workdir]
    words += ["--strict"] if args.strict else []
    return shlex.join([*words, *flags.typed_flags(args)])
