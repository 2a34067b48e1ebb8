"""What the operating system lets this process use."""

from __future__ import annotations

import os


def cores() -> int:
    """Return how many CPU cores this process may use; XLA:CPU divides its programs by this number."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
