"""The paths under which a checkpoint holds the arrays of a state."""

from __future__ import annotations

from typing import Any

import jax

from jaxtrain.core.errors import InputError

LONGEST = 32_000  # bytes; Orbax takes twice as many, with a suffix of its own


def check_paths(tree: Any) -> None:
    """Raise InputError, naming the path, where a checkpoint cannot hold each array of ``tree``.

    A path such as ``params/head/kernel`` joins names with ``/``, so names may contain that only where no two
    arrays get the same path and none is inside another.

    >>> check_paths({"a": {"b": 1}, "a/b": 2})
    Traceback (most recent call last):
        ...
    jaxtrain.core.errors.InputError: two arrays of the state have the path a/b in a checkpoint: use names
    without '/', and no dict with both a number and its text as keys
    """
    seen = set()
    for keys, _ in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        parts = tuple(part for part in path.split("/") if part)  # Orbax drops empty names
        if parts in seen:
            raise InputError(
                f"two arrays of the state have the path {path} in a checkpoint: use names without '/', and "
                "no dict with both a number and its text as keys"
            )
        seen.add(parts)
        if len(path.encode(errors="replace")) > LONGEST or not _is_text(path):
            raise InputError(
                f"an array of the state has the path {path[:60]!a}...: names must be valid UTF-8, of at "
                f"most {LONGEST:,} bytes together"
            )
    for parts in seen:
        for length in range(1, len(parts)):
            if parts[:length] in seen:
                raise InputError(
                    f"the state has an array at {'/'.join(parts[:length])} and another at {'/'.join(parts)}: "
                    "use names without '/' that are not empty"
                )


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
