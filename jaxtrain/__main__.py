"""``python -m jaxtrain COMMAND ...``: pass the arguments to the command's module in ``cli/``."""

from __future__ import annotations

import importlib
import sys

from jaxtrain.cli import SUMMARIES
from jaxtrain.core import cuda_plugin
from jaxtrain.core.signals import interrupts_blocked
from jaxtrain.core.text import did_you_mean


def main(argv: list[str] | None = None) -> int:
    """Run the command that ``argv`` names; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        lines = (f"  {name:<9} {summary}" for name, summary in SUMMARIES.items())
        sys.stdout.write("usage: python -m jaxtrain COMMAND ...\n\n" + "\n".join(lines) + "\n")
        return 0
    if command not in SUMMARIES:
        sys.stderr.write(f"jaxtrain: unknown command {command}: {did_you_mean(command, SUMMARIES)}\n")
        return 2
    module = "jaxtrain.run" if command == "run" else f"jaxtrain.cli.{command}"
    try:
        with interrupts_blocked(), cuda_plugin.quiet_without_driver():
            imported = importlib.import_module(module)  # most import JAX
    except KeyboardInterrupt:
        sys.stderr.write(f"jaxtrain {command}: interrupted\n")
        return 130
    code: int = imported.main(argv[1:])
    return code


def script() -> None:
    """Run the console script ``jaxtrain``."""
    from jaxtrain.cli import command_line  # here: --help needs none of it

    command_line.exit_process(main())


if __name__ == "__main__":
    script()
