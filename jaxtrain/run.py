"""``python -m jaxtrain.run --experiment NAME``: the entry point of ``jaxtrain.cli.run``."""

from jaxtrain.cli.command_line import exit_process
from jaxtrain.cli.run import main

__all__ = ["main"]

if __name__ == "__main__":
    exit_process(main())
