"""``python -m jaxtrain VERB ...``: hands the rest of the line to one file in ``cli/``."""

from __future__ import annotations

import importlib
import sys

from jaxtrain.cli import SUMMARIES
from jaxtrain.core.text import did_you_mean


def main(argv: list[str] | None = None) -> int:
    """Dispatch; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        lines = (f"  {name:<9} {summary}" for name, summary in SUMMARIES.items())
        sys.stdout.write("usage: python -m jaxtrain VERB ...\n\n" + "\n".join(lines) + "\n")
        return 0
    if verb not in SUMMARIES:
        sys.stderr.write(f"jaxtrain: no verb is called {verb}: {did_you_mean(verb, SUMMARIES)}\n")
        return 2
    module = "jaxtrain.run" if verb == "run" else f"jaxtrain.cli.{verb}"
    code: int = importlib.import_module(module).main(argv[1:])
    return code


def script() -> None:
    """The command ``jaxtrain``."""
    from jaxtrain.cli import command_line  # here: --help needs none of it

    command_line.exit_process(main())


if __name__ == "__main__":
    script()
