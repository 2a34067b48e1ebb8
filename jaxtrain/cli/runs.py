"""``python -m jaxtrain runs``: list, filter and compare the runs in a folder, tag them, free disk."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.cli import SUMMARIES, command_line
from jaxtrain.core.errors import InputError
from jaxtrain.core.files import to_json
from jaxtrain.core.text import printable, size_text
from jaxtrain.runs import clean, compare, filters, notes, scan

COLUMNS = ("experiment", "folder", "state", "step", "metric", "when", "tags")
SHOWN = 20  # lines of one part of a comparison


class _Parser(command_line.Parser):
    """Takes words and flags in any order."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = _Parser("jaxtrain runs", SUMMARIES["runs"])
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="[list] FILTER ... (the default) | diff RUN RUN | tag RUN TAG ... | note RUN TEXT | "
        "clean FILTER ...; a RUN is a folder, also below --root; a FILTER is FIELD=VALUE, with != > >= < <= "
        "too and * in text: experiment=cifar_* 'best.accuracy>0.9'",
    )
    parser.add_argument(
        "--root", default="runs", metavar="DIR", help="the folder with the runs; default: %(default)s"
    )
    parser.add_argument(
        "--sort",
        metavar="FIELD",
        help="of list: the largest last; default: the newest last. Fields: "
        + ", ".join(filters.FIELDS)
        + ", "
        "settings by their path, best.NAME, test.NAME, valid.NAME, train.NAME, numbers of result.json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, of list one object a line")
    parser.add_argument("--remove", action="store_true", help="of tag: remove the tags")
    parser.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help="of clean: how many of the latest checkpoints stay, beside the best; default: 1",
    )
    parser.add_argument("--yes", action="store_true", help="of clean: remove, where it otherwise only shows")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return command_line.main(_run, make_parser(), argv, needs_jax=lambda args: False)


def _run(args: argparse.Namespace) -> int:
    action, words = "list", list(args.words)
    if words and words[0] in ACTIONS:
        action = words.pop(0)
    run, flags = ACTIONS[action]
    for flag in ("sort", "json", "remove", "keep", "yes"):
        if getattr(args, flag) not in (None, False) and flag not in flags:
            raise InputError(f"--{flag} is not a flag of runs {action}: see --help")
    return run(args, words)


def _list(args: argparse.Namespace, words: list[str]) -> int:
    chosen = _select(args, words)
    if args.json:
        _print(*(json.dumps(_as_json(run)) for run in chosen))
        return 0
    if not chosen:
        _print(f"no run in {printable(args.root)}{' matches' if words else ''}")
        return 0
    rows = [COLUMNS, *(_row(run) for run in chosen)]
    _print(*_columns(rows))
    return 0


def _select(args: argparse.Namespace, words: list[str]) -> list[scan.Run]:
    parsed = [filters.parse(word) for word in words]
    return filters.select(scan.find(Path(args.root)), parsed, args.sort)


def _row(run: scan.Run) -> tuple[str, ...]:
    step = "" if run.step is None else str(run.step)
    step += "" if run.steps is None or run.steps == run.step else f"/{run.steps}"
    main = run.metric
    metric = "" if main is None else f"{main[0]} {main[1]:.4f}"
    return run.experiment, run.folder, run.state, step, metric, run.when, " ".join(run.notes.tags)


def _as_json(run: scan.Run) -> dict[str, Any]:
    main = run.metric
    metric = None if main is None else {"name": main[0], "value": main[1]}
    return {
        "experiment": run.experiment,
        "folder": run.folder,
        "state": run.state,
        "step": run.step,
        "steps": run.steps,
        "metric": metric,
        "when": run.when,
        "tags": run.notes.tags,
        "note": run.notes.note,
    }


def _diff(args: argparse.Namespace, words: list[str]) -> int:
    if len(words) != 2:
        raise InputError("runs diff compares two runs: give two folders")
    a, b = (scan.open_run(word, Path(args.root)) for word in words)
    try:
        found = compare.compare(a, b)
        as_json = to_json({"a": a.folder, "b": b.folder, **dataclasses.asdict(found)})
    except RecursionError as error:
        raise InputError(f"{words[0]} and {words[1]}: a record is nested too deeply to compare") from error
    if args.json:
        _print(as_json)
        return 0
    lines = [f"A {a.folder}", f"B {b.folder}"]
    for part in ("config", "code", "data", "conditions"):
        lines += _part(part, getattr(found, part))
    lines += _first(found)
    lines += _part("test", found.tests)
    _print(*map(printable, lines))
    return 0


def _part(name: str, pairs: Any) -> list[str]:
    if not pairs:
        return [f"{name}: the same"] if name != "test" else []
    rows = [(f"  {path}", _value(a), _value(b)) for path, (a, b) in pairs.items()]
    more = [] if len(rows) <= SHOWN else [f"  and {len(rows) - SHOWN} more (--json has all)"]
    return [f"{name}:", *_columns(rows[:SHOWN]), *more]


def _first(found: compare.Difference) -> list[str]:
    if found.step is None:
        until = f" up to step {found.same_until}" if found.same_until else ", of which no step is in both"
        return [f"metrics: the same{until}"]
    name, (a, b) = next(iter(found.metrics.items()))
    more = f", and {len(found.metrics) - 1} more there" if len(found.metrics) > 1 else ""
    before = f"; equal up to step {found.same_until}" if found.same_until else ""
    return [f"metrics: the first that differs is {name} at step {found.step}: {a} and {b}{more}{before}"]


def _value(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _tag(args: argparse.Namespace, words: list[str]) -> int:
    if len(words) < 2:
        raise InputError("runs tag needs a run and tags: runs tag RUN TAG ...")
    run = scan.open_run(words[0], Path(args.root))
    now = notes.tag(run.path, words[1:], args.remove)
    _print(printable(f"{run.folder}: {' '.join(now.tags) or 'no tags'}"))
    return 0


def _note(args: argparse.Namespace, words: list[str]) -> int:
    if len(words) not in (1, 2):
        raise InputError("runs note needs a run, and a text in quotes to write it: runs note RUN TEXT")
    run = scan.open_run(words[0], Path(args.root))
    now = notes.write_note(run.path, words[1]) if len(words) == 2 else notes.read(run.path)
    _print(printable(f"{run.folder}: {now.note or 'no note'}"))
    return 0


def _clean(args: argparse.Namespace, words: list[str]) -> int:
    keep = 1 if args.keep is None else args.keep
    if keep < 1:
        raise InputError(f"--keep is {keep}: at least the latest checkpoint stays")
    plans = [(clean.clean if args.yes else clean.plan)(run, keep) for run in _select(args, words)]
    for one in plans:
        if one.skipped is not None:
            command_line.warn(printable(f"{one.run.folder}: skipped, {one.skipped}"))
        elif one.remove:
            names = ", ".join(path.name for path in one.remove)
            _print(
                printable(f"{one.run.folder}: {names} ({size_text(one.bytes)}); stays: {', '.join(one.keep)}")
            )
    freed = size_text(sum(one.bytes for one in plans))
    count = sum(bool(one.remove) for one in plans)
    text = (
        f"removed {freed} of {count} runs" if args.yes else f"would remove {freed} of {count} runs: add --yes"
    )
    _print(text if count else f"nothing to remove in {len(plans)} runs")
    return 0


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines with aligned columns."""
    clear = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clear, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in clear]


def _print(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


ACTIONS = {
    "list": (_list, ("sort", "json")),
    "diff": (_diff, ("json",)),
    "tag": (_tag, ("remove",)),
    "note": (_note, ()),
    "clean": (_clean, ("keep", "yes")),
}
