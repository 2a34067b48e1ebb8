"""Huge pages for the memory that XLA takes on a CPU.

XLA:CPU takes the buffers of a program from malloc each time it runs, and gives them back: every step touches
thousands of pages for the first time, and the system maps and clears them one by one. Where Linux gives
pages of 2 MB to those who ask, glibc (2.35 and newer) asks if the tunable ``glibc.malloc.hugetlb`` is 1 when
a process starts, and not later. docs/decisions.md has what it brings.

https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html
"""

from __future__ import annotations

import contextlib
import getopt
import os
import sys
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
AGAIN = "JAXTRAIN_STARTED_AGAIN"  # the id of a process that was, so that none is twice
LEAST = (2, 35)  # the first glibc that has the tunable
PYTHON = "bBc:dEhiIm:OPqRsSuvVW:xX:?"  # the options of the interpreter
NOT_YET = "not asked for"
GIVEN = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NVIDIA = Path("/dev/nvidiactl")


def ask(package: str = "jaxtrain") -> None:
    """Start this command once more in its process, with the tunable; returns where that is no use.

    Only ``python -m package...`` and the command ``jaxtrain`` are, with their arguments and before they have
    done anything, so that whoever waits for the process notices nothing. Call it before memory is taken.

    Args:
      package: whose modules are such commands.
    """
    again = os.environ.pop(AGAIN, "") == str(os.getpid())
    if again or not _is_command(package) or told() != NOT_YET:
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by whoever started this
            stream.flush()
    asked = ":".join(filter(None, (os.environ.get(VARIABLE), f"{TUNABLE}=1")))
    environment = {**os.environ, VARIABLE: asked, AGAIN: str(os.getpid())}
    with contextlib.suppress(OSError):  # slower, then
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def told() -> str:
    """How it stands in this process: ``"asked for"``, ``"not asked for"``, or why asking is no use."""
    for tunable in os.environ.get(VARIABLE, "").split(":"):
        name, _, value = tunable.partition("=")
        if name == TUNABLE:
            return "asked for" if value == "1" else f"as {VARIABLE} says"
    if NVIDIA.exists() and not os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return "left to the system, because of the GPU"
    try:
        mode, libc = GIVEN.read_text(), os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        return "none on this system"
    if "[madvise]" not in mode:
        return "given without asking" if "[always]" in mode else "switched off by the system"
    name, _, version = libc.partition(" ")
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < LEAST:
        return f"{libc or 'the C library'} does not ask for them"
    return NOT_YET


def _is_command(package: str) -> bool:
    """Is this process one of the commands, and not a program, a debugger say, that calls one?"""
    words = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv[1:])]  # without the command's own
    try:
        options, rest = getopt.getopt(words, PYTHON)
    except getopt.GetoptError:
        return False
    for option, value in options:
        if option in ("-c", "-m"):
            return option == "-m" and value.partition(".")[0] == package
    beside = Path(sys.executable).parent / package  # as pip installs it
    return len(rest) == 1 and Path(rest[0]).resolve() == beside.resolve()
