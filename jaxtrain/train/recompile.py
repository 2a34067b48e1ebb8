"""Warn when the train step is compiled a second time: which argument changed, from what to what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxtrain.core.errors import RunError
from jaxtrain.core.types import leaf_paths


class OneCompile:
    """A jitted ``(state, batch, key)`` function that is expected to compile once.

    Counts the compiled programs after every call, and compares the arguments only when there is a new one.
    Warns about the first change only.

    Args:
      step: made by ``jax.jit``.
      start: the step before the first call.
      note: shows the warning.
      strict: raise an error instead.

    >>> import numpy as np
    >>> add = OneCompile(jax.jit(lambda state, batch, key: state + batch), 0, print)
    >>> _ = add(np.float32(0), np.zeros(2, np.float32), None)
    >>> _ = add(np.float32(0), np.zeros(3, np.float32), None)
    the train step was compiled again at step 2: batch was float32[2] on the host and is float32[3] on the
    host; give every step the same shapes, types and shardings (--strict makes this an error)
    """

    def __init__(
        self, step: Callable[..., Any], start: int, note: Callable[[str], None], strict: bool = False
    ) -> None:
        self._step, self._number, self._note, self._strict = step, start, note, strict
        self._count: Callable[[], int] = getattr(step, "_cache_size", lambda: 0)
        self._before: dict[str, str] | None = None
        self._size, self._warned = 0, False

    def __call__(self, state: Any, batch: Any, key: Any, *rest: Any, at: int | None = None) -> Any:
        """Call ``step(state, batch, key, *rest)`` as step ``at``; None is the step after the last call.

        Raises:
          RunError: it was compiled again and ``strict`` is set.
        """
        self._number = self._number + 1 if at is None else at
        if self._before is None:  # before the call, which donates the state
            self._before = abstract_signature(state, batch, key)
            result = self._step(state, batch, key, *rest)
            self._size = self._count()
            return result
        result = self._step(state, batch, key, *rest)
        size = self._count()
        if size > self._size:
            self._size = size
            self._warn(self._before, abstract_signature(state, batch, key))
        return result

    def _warn(self, before: dict[str, str], now: dict[str, str]) -> None:
        if self._warned:
            return
        self._warned = True
        paths = [path for path in {**before, **now} if before.get(path) != now.get(path)]
        what = "no argument changed, so a setting of JAX did"
        if paths:
            path = paths[0]
            more = f" (and {len(paths) - 1} more changed)" if len(paths) > 1 else ""
            what = f"{path} was {before.get(path, 'absent')} and is {now.get(path, 'absent')}{more}"
        line = f"the train step was compiled again at step {self._number}: {what}"
        fix = "give every step the same shapes, types and shardings"
        if self._strict:
            raise RunError(f"{line}; {fix} (--strict allows one compile)")
        self._note(f"{line}; {fix} (--strict makes this an error)")


def abstract_signature(state: Any, batch: Any, key: Any) -> dict[str, str]:
    """Shape, dtype, weak type and sharding of every leaf, by path. Donated arrays are fine.

    >>> import numpy as np
    >>> abstract_signature(np.zeros((2, 3), np.int8), {"x": 1.0}, None)
    {'batch/x': 'float32[] weak on the host', 'state': 'int8[2,3] on the host'}
    """
    arguments = {"state": state, "batch": batch, "key": key}
    shapes = leaf_paths(jax.eval_shape(lambda tree: tree, arguments))
    return {path: _leaf_text(shapes[path], leaf) for path, leaf in leaf_paths(arguments).items()}


def _leaf_text(shape: Any, leaf: Any) -> str:
    weak = " weak" if getattr(shape, "weak_type", False) else ""
    return f"{shape.dtype}[{','.join(map(str, shape.shape))}]{weak} {_placement_text(leaf)}"


def _placement_text(leaf: Any) -> str:
    if not isinstance(leaf, jax.Array):
        return "on the host"
    where = leaf.sharding
    if isinstance(where, NamedSharding):
        spec = ",".join("None" if axis is None else str(axis) for axis in where.spec)
        return f"split ({spec}) over {where.mesh.size} devices"
    committed = "" if leaf.committed else " by default"
    return f"on {', '.join(str(device) for device in sorted(where.device_set, key=str))}{committed}"
