#!/usr/bin/env python3
"""Write docs/cli.md from the parsers of the commands: ``python scripts/render_cli.py``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxtrain.cli import SUMMARIES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

INTRODUCTION = """\
# Command line

Written by `python scripts/render_cli.py` from the parsers in `jaxtrain/cli/`. Do not edit it: change a help
text there, or the introduction in `scripts/render_cli.py`, and run the script again.

Every command is `python -m jaxtrain COMMAND` (or `jaxtrain COMMAND`, where the package is installed).
`python -m jaxtrain.run` is `python -m jaxtrain run`. `scripts/run` is the same, in an environment that it
installs on first use. Flags are written in full: abbreviations are errors. Every command has `--help`.

## Exit codes

An error is one line on stderr that says what is wrong, where, and what to do. `--debug` adds the traceback.

| code | means |
|---|---|
| 0 | done |
| 1 | a bug in jaxtrain or in the experiment's code; the traceback is printed |
| 2 | bad input: flags, settings, files or data that cannot work |
| 3 | the run failed: NaN, full disk, corrupt checkpoint, lost process; `verify` or `doctor` found a problem |
| 130 | stopped by SIGINT (Ctrl-C) after saving a checkpoint; a second one exits without saving |
| 143 | stopped by SIGTERM after saving a checkpoint |
| 141 | the output pipe was closed, as by `head` |

## Settings: `--set PATH=VALUE`

`PATH` is the path of a field in the experiment, such as `optimizer.lr`. Items of a tuple are numbered from 0:
`augment.1.pad`. `--set` may be repeated; the last value counts. `VALUE` is parsed by the type of the field:

| type | how it is written |
|---|---|
| int | digits, with a sign or underscores: `batch=1_000`; no `1e3` |
| float | as in Python: `epochs=0.5`, `optimizer.lr=1e-3`, `inf`; no `nan`, and nothing that overflows |
| boolean | `optimizer.nesterov=true` or `false`, in any case; no `yes` or `1` |
| None | `eval_every=none` or `null`, in any case |
| string | as it is: `train.file=a (1).csv`, `file=007`; in quotes, a Python string: `file='none'` |
| one of several values | like a string, a number, a boolean or None: `precision=bfloat16` |
| tuple | items between commas: `model.widths=8,16`, `model.widths=8` |

Items of a tuple are written as their type says, so `train.columns=T (degC),2019` are two names. Spaces
around an item do not count, a comma may follow the last one, and one pair of brackets may enclose them all:
`(8, 16)`, `[8, 16]`. `()` is the empty tuple. An item with a comma, with a bracket at both ends or without
a character needs quotes: `'Temp, °C'`, `'(T)'`, `''`. A tuple within a tuple needs brackets: `(1,2),(3,4)`.
Where a field has several types, text is what is neither None, boolean nor number, and a tuple beside text
or numbers needs brackets or a comma. `config.json` shows every setting in this form.

Anything else, such as a model or a data source, cannot be set from text: set its fields, or write a file. An
unknown path, or a value of another type, is an error that names the nearest path or the expected type. All
settings of a run are in the `config.json` of its folder.

## Environment variables

| variable | means |
|---|---|
| `JAXTRAIN_EXPERIMENTS` | more folders with experiment files, separated by `:`, after `./experiments` |
| `JAXTRAIN_CACHE` | `off`: keep no compiled programs and decoded data sets in `~/.cache/jaxtrain` |
| `JAX_COMPILATION_CACHE_DIR` | keep compiled programs in this folder instead |
| `TFDS_DATA_DIR` | folder of prepared data sets; default: `~/tensorflow_datasets` |
| `GLIBC_TUNABLES` | `glibc.malloc.hugetlb=1`: huge pages (faster on a Linux CPU); `scripts/run` sets it |

## Commands
"""


def page() -> str:
    """Return the text of docs/cli.md."""
    commands = [f"- [`{typed(name)}`](#{anchor(name)}): {text}" for name, text in SUMMARIES.items()]
    sections = [line for name in SUMMARIES for line in section(name)]
    return "\n".join([INTRODUCTION, *commands, "", *sections])


def typed(name: str) -> str:
    """Return the command as it is typed.

    >>> typed("run"), typed("plan")
    ('python -m jaxtrain.run', 'python -m jaxtrain plan')
    """
    return "python -m jaxtrain.run" if name == "run" else f"python -m jaxtrain {name}"


def anchor(name: str) -> str:
    """Return the anchor that GitHub makes of the heading of a command.

    >>> anchor("run")
    'python--m-jaxtrainrun'
    """
    return typed(name).replace(" ", "-").replace(".", "")


def section(name: str) -> Iterator[str]:
    """Generate the lines of one command: its summary, and a list of its flags in their groups."""
    parser: argparse.ArgumentParser = importlib.import_module(f"jaxtrain.cli.{name}").make_parser()
    yield f"## `{typed(name)}`\n"
    yield f"{sentence(escape(SUMMARIES[name]))}\n"
    for choice in parser._mutually_exclusive_groups:
        if choice.required:
            flags = ", ".join(f"`{action.option_strings[-1]}`" for action in choice._group_actions)
            yield f"One of these is required: {flags}.\n"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if visible(action)]
        if not actions:
            continue
        if group.title not in ("positional arguments", "options"):
            yield f"{sentence(group.title or '', ':')}\n"
        yield from (item(action, parser.prog) for action in actions)
        yield ""


def visible(action: argparse.Action) -> bool:
    """Return whether the page shows a flag: not ``--help``, and none that only jaxtrain itself passes."""
    return action.help != argparse.SUPPRESS and action.dest != "help"


def item(action: argparse.Action, prog: str) -> str:
    """Return the line of one flag or argument.

    >>> parser = argparse.ArgumentParser(prog="it")
    >>> item(parser.add_argument("--steps", default=20, help="how many; default: %(default)s"), "it")
    '- `--steps STEPS`: how many; default: 20'
    """
    names = action.option_strings or [action.dest.upper()]
    value = metavar(action) if action.option_strings else ""
    text = (action.help or "") % {**vars(action), "prog": prog}
    required = " (required)" if action.required and action.option_strings else ""
    return f"- `{', '.join(f'{name} {value}'.strip() for name in names)}`{required}: {escape(text)}"


def metavar(action: argparse.Action) -> str:
    """Return what stands for the value of a flag; empty for a flag without one."""
    if action.nargs == 0:
        return ""
    name = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else None)
    name = str(name or action.dest.upper())
    return f"[{name} ...]" if action.nargs == "*" else name


def sentence(text: str, end: str = ".") -> str:
    """Return the text with a capital at its start and a full stop at its end.

    >>> sentence("one line")
    'One line.'
    """
    return f"{text[:1].upper()}{text[1:]}{end}"


def escape(text: str) -> str:
    """Escape what Markdown would take for emphasis."""
    return text.replace("*", r"\*")


def main() -> int:
    """Write the page; returns the exit code."""
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
