"""Tells of a train step that is compiled a second time: which argument changed, and from what to what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxtrain.core.errors import RunError
from jaxtrain.core.types import leaf_paths


class OneCompile:
    """A jitted ``(state, batch, key)`` function that is expected to compile once.

    The compiled programs are counted after every call, and only when there is a new one are the arguments
    looked at. The first such change is told of, the later ones are not.

    Args:
      step: made by ``jax.jit``.
      start: the step before the first call.
      note: shows a line.
      strict: raise instead.

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
        self._size, self._told = 0, False

    def __call__(self, state: Any, batch: Any, key: Any, *rest: Any, at: int | None = None) -> Any:
        """``step(state, batch, key, *rest)``, which is step ``at``; None is the one after the last call's.

        Raises:
          RunError: it was compiled again, and ``strict``.
        """
        self._number = self._number + 1 if at is None else at
        if self._before is None:  # here, while the arguments are alive: the step gives away their memory
            self._before = abstract_signature(state, batch, key)
            result = self._step(state, batch, key, *rest)
            self._size = self._count()
            return result
        result = self._step(state, batch, key, *rest)
        size = self._count()
        if size > self._size:
            self._size = size
            self._tell(self._before, abstract_signature(state, batch, key))
        return result

    def _tell(self, before: dict[str, str], now: dict[str, str]) -> None:
        if self._told:
            return
        self._told = True
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
    """Shape, type, weak type and place of every leaf, by its path. Arrays may have been given away.

    >>> import numpy as np
    >>> abstract_signature(np.zeros((2, 3), np.int8), {"x": 1.0}, None)
    {'batch/x': 'float32[] weak on the host', 'state': 'int8[2,3] on the host'}
    """
    given = {"state": state, "batch": batch, "key": key}
    shapes = leaf_paths(jax.eval_shape(lambda tree: tree, given))
    return {path: _text(shapes[path], leaf) for path, leaf in leaf_paths(given).items()}


def _text(shape: Any, leaf: Any) -> str:
    weak = " weak" if getattr(shape, "weak_type", False) else ""
    return f"{shape.dtype}[{','.join(map(str, shape.shape))}]{weak} {_place(leaf)}"


def _place(leaf: Any) -> str:
    if not isinstance(leaf, jax.Array):
        return "on the host"
    where = leaf.sharding
    if isinstance(where, NamedSharding):
        spec = ",".join("None" if axis is None else str(axis) for axis in where.spec)
        return f"split ({spec}) over {where.mesh.size} devices"
    committed = "" if leaf.committed else " by default"
    return f"on {', '.join(str(device) for device in sorted(where.device_set, key=str))}{committed}"
