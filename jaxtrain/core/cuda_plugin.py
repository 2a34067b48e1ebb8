"""Keep JAX's CUDA plugin quiet where it is installed without an NVIDIA driver, to compile for GPUs.

There the plugin prints that it finds no GPU: from C++ when JAX is imported and when its backends start, which
no log level affects, and with a traceback. With a driver nothing is hidden: then the user must know.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
NOISE = (b"All log messages before absl::InitializeLog()", b"Could not find cuda drivers on your machine")


@contextlib.contextmanager
def quiet_without_driver() -> Iterator[None]:
    """Drop what the plugin prints about a missing driver, in the block and when JAX starts its backends.

    Use it around an import of JAX: other lines that are written to stderr in the block appear at its end, and
    a process that crashes in it loses them.
    """
    if not installed_plugins() or has_driver():
        yield
        return
    with _without_noise():
        yield
        if "jax" in sys.modules:
            for name in installed_plugins():
                _quiet_start(name)


@functools.cache
def installed_plugins() -> tuple[str, ...]:
    """Return the modules of the CUDA plugins of JAX that are installed; imports none of them."""
    found = []
    for name in PLUGINS:
        with contextlib.suppress(ModuleNotFoundError):  # of the parent package
            if importlib.util.find_spec(name) is not None:
                found.append(name)
    return tuple(found)


@functools.cache
def has_driver() -> bool:
    """Return whether the NVIDIA driver's library can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _quiet_start(name: str) -> None:
    """Let the plugin's ``initialize()``, with which JAX starts it, print nothing and fail silently."""
    try:
        plugin = importlib.import_module(name)
    except ImportError:  # of another version: JAX itself says so
        return
    start: Callable[[], None] | None = getattr(plugin, "initialize", None)
    if start is None or hasattr(start, "quiet"):
        return

    def initialize() -> None:
        with _without_noise(), contextlib.suppress(RuntimeError):  # "Unable to load CUDA. Is it installed?"
            start()

    initialize.quiet = True  # type: ignore[attr-defined]
    setattr(plugin, "initialize", initialize)  # noqa: B010 - mypy


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Collect what is written to file descriptor 2, and write it again without the lines of ``NOISE``."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as collected:
        before = os.dup(2)
        os.dup2(collected.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            collected.seek(0)
            for line in collected:
                if not any(noise in line for noise in NOISE):
                    os.write(2, line)
