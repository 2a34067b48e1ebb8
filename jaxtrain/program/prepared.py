"""Examples on the host as the model gets them, for the checks of their values: after ``preprocess``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain.core.types import Batch
from jaxtrain.data import compose
from jaxtrain.program import check_fields
from jaxtrain.program.loader import EPOCH, EXAMPLE_ID

CHUNK = 2**22  # numbers that preprocess is applied to at a time, at most


class NotComputed(Exception):
    """A field that ``preprocess`` makes was asked for where it is not computed."""


class Preprocess:
    """Applies ``preprocess`` to host data, only to the fields that are asked for.

    Args:
      stages: of the experiment.
      batch: shapes of a raw batch, with the fields that a loader adds.
      augment: random stages that come first in training; the fields that they make are not computed.
    """

    def __init__(
        self,
        stages: Sequence[Callable[..., Batch]],
        batch: Batch,
        augment: Sequence[Callable[..., Batch]] = (),
    ) -> None:
        self._stages = stages
        self._compiled: dict[str, Callable[[Batch], jax.Array]] = {}
        unchanged: set[str] = set()
        self._augmented: set[str] = set()

        def trace(raw: Batch, key: jax.Array) -> Batch:
            augmented = compose(*augment)(raw, key)
            self._augmented.update(name for name in augmented if augmented[name] is not raw.get(name))
            final = compose(*stages)(augmented, None)
            unchanged.update(name for name in final if final[name] is raw.get(name))
            return final

        names = check_fields.trace(trace, batch, jax.random.key(0), what="the batch")
        self.names = [name for name in names if name not in (EXAMPLE_ID, EPOCH)]
        self.unchanged = frozenset(unchanged)

    def __call__(self, raw: Batch, compute: bool = True) -> Batch:
        """Return the fields after ``preprocess``; those that it does not change are the raw arrays.

        Args:
          raw: NumPy arrays with a common leading axis.
          compute: False raises NotComputed for the other fields.
        """
        return _Prepared(self, raw, compute)

    def field(self, name: str, raw: Batch) -> np.ndarray:
        """Compute one field in chunks of one size, so that it is compiled once; XLA leaves out the others.

        Raises:
          NotComputed: augmentation makes it, it has not one row for each example, or the stages cannot take
            such a chunk.
        """
        if name in self._augmented:
            raise NotComputed(name)
        total = len(next(iter(raw.values())))
        rows = max(1, min(total, CHUNK // max(1, *(array[:1].size for array in raw.values()))))
        fn = self._compiled.setdefault(name, jax.jit(lambda raw: compose(*self._stages)(raw, None)[name]))
        parts = []
        for start in range(0, total, rows):
            ids = np.minimum(np.arange(start, start + rows), total - 1)
            try:
                with jax.default_device(_cpu()):
                    part = np.asarray(fn({name: array[ids] for name, array in raw.items()}))
            except Exception as error:  # a user's stage, which has been traced for whole batches only
                raise NotComputed(name) from error
            if part.shape[:1] != (rows,):
                raise NotComputed(name)
            parts.append(part[: total - start])
        return np.concatenate(parts)


@functools.cache
def _cpu() -> jax.Device | None:
    """A CPU device, which does not wait for the steps on an accelerator; None where JAX has no CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


class _Prepared(Mapping[str, Any]):
    def __init__(self, preprocess: Preprocess, raw: Batch, compute: bool) -> None:
        self._preprocess, self._raw, self._compute = preprocess, raw, compute
        self._fields: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        if name in self._preprocess.unchanged:
            return self._raw[name]
        if not self._compute:
            raise NotComputed(name)
        if name not in self._fields:
            self._fields[name] = self._preprocess.field(name, self._raw)
        return self._fields[name]

    def __contains__(self, name: object) -> bool:
        return name in self._preprocess.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._preprocess.names)

    def __len__(self) -> int:
        return len(self._preprocess.names)
