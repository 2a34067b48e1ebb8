"""Keep JAX's CUDA plugin quiet where it is installed without an NVIDIA driver, to compile for GPUs.

There the plugin logs that it finds no GPU: from C++ at the import of JAX, which no log level affects, and
with a traceback when JAX starts its backends. With a driver nothing is hidden: then the user must know.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Iterator

PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
NOISE = (b"All log messages before absl::InitializeLog()", b"Could not find cuda drivers on your machine")


@contextlib.contextmanager
def quiet_without_driver() -> Iterator[None]:
    """Drop what the plugin logs about a missing driver, in the block from C++ and later from Python.

    Other lines that C++ or Python write to stderr in the block appear at its end. Use it around an import of
    JAX or the start of a compiler only: a process that crashes inside loses them.
    """
    if not is_installed() or has_driver():
        yield
        return
    logger = logging.getLogger("jax._src.xla_bridge")
    if _is_other_news not in logger.filters:
        logger.addFilter(_is_other_news)
    with _without_noise():
        yield


@functools.cache
def is_installed() -> bool:
    """Return whether a CUDA plugin of JAX is installed; imports nothing of it."""
    for name in PLUGINS:
        with contextlib.suppress(ModuleNotFoundError):  # of the parent package
            if importlib.util.find_spec(name) is not None:
                return True
    return False


@functools.cache
def has_driver() -> bool:
    """Return whether the NVIDIA driver's library can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


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


def _is_other_news(record: logging.LogRecord) -> bool:
    """Return False for the record that the CUDA plugin could not be initialised."""
    text = record.getMessage()
    return not ("plugin configuration error" in text and any(name in text for name in PLUGINS))
