"""``python -m jaxtrain.run --experiment NAME``: the entry point of ``jaxtrain.cli.run``."""

from jaxtrain.cli.command_line import exit_process
from jaxtrain.cli.run import main
from jaxtrain.core import cuda_plugin

__all__ = ["main"]

if __name__ == "__mp_main__":  # in a worker process of Grain, which imports JAX
    with cuda_plugin.quiet_without_driver():
        import jax  # noqa: F401

if __name__ == "__main__":
    exit_process(main())
