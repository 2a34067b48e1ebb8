"""``python -m jaxtrain.run --experiment NAME``: a door to ``jaxtrain.cli.run``."""

from jaxtrain.cli.command_line import leave
from jaxtrain.cli.run import main

__all__ = ["main"]

if __name__ == "__main__":
    leave(main())
