"""The examples of batch k, a pure function of the seed and the step."""

from __future__ import annotations

import dataclasses
import functools
import math
from fractions import Fraction

import numpy as np

from jaxtrain.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Order:
    """Shuffled batches over endless epochs.

    Every epoch is a new permutation of the ``n`` examples, and batch k is positions
    ``[k * batch, (k + 1) * batch)`` of the concatenated permutations. There is no iterator state: any batch
    can be computed at any time, on any host, so resuming at step k needs no saved iterator.

    Attributes:
      seed: any integer.
      n: number of examples, at least 1.
      batch: global batch size, at least 1.
      drop_remainder: truncate every permutation to full batches, so the examples at its end are left out of
        that epoch; else a batch may continue into the next epoch.

    >>> order = Order(seed=0, n=5, batch=2)
    >>> sorted(np.concatenate([order.indices(k) for k in range(5)])[:5].tolist())
    [0, 1, 2, 3, 4]
    """

    seed: int
    n: int
    batch: int
    drop_remainder: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch < 1:
            raise InputError(f"batches of {self.batch} from {self.n} examples: both must be at least 1")
        if self.drop_remainder and self.batch > self.n:
            raise InputError(
                f"drop_remainder=True leaves no batch of {self.batch} in {self.n} examples: "
                "use a smaller batch"
            )

    def indices(self, step: int) -> np.ndarray:
        """Return the example ids of batch ``step`` (from 0): int64 ``[batch]``."""
        return self.ids_and_epochs(step)[0]

    def ids_and_epochs(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the example ids of batch ``step`` and the epoch of each: int64 ``[batch]`` both."""
        usable = self.n // self.batch * self.batch if self.drop_remainder else self.n
        ids, epochs, start, end = [], [], step * self.batch, (step + 1) * self.batch
        while start < end:
            epoch, offset = divmod(start, usable)
            part = permutation(self.seed, epoch, self.n)[offset : min(usable, offset + end - start)]
            ids.append(part)
            epochs.append(np.full(len(part), epoch))
            start += len(part)
        return _concatenate(ids), _concatenate(epochs)

    def steps(self, epochs: float) -> int:
        """Return the number of batches in ``epochs``, which may be fractional; rounded up."""
        exact = Fraction(str(epochs))  # 0.1 means a tenth, not the double nearest to it
        per_epoch = self.n // self.batch if self.drop_remainder else Fraction(self.n, self.batch)
        steps = math.ceil(exact * per_epoch)
        if steps >= 2**31:
            raise InputError(f"epochs={epochs} is 2^31 steps or more: lower it")
        return steps


@dataclasses.dataclass(frozen=True)
class Sequential:
    """Batches of each of ``n`` examples once, in order, the last batch padded.

    >>> Sequential(n=3, batch=2).rows(1)
    (array([2, 0]), array([ True, False]))
    """

    n: int
    batch: int

    def __len__(self) -> int:
        return math.ceil(self.n / self.batch)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return example ids, int64 ``[batch]``, and a mask, bool ``[batch]``, false on padding."""
        ids = np.arange(step * self.batch, (step + 1) * self.batch)
        return np.where(ids < self.n, ids, 0), ids < self.n


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate without a copy where there is one part: most batches are a read-only view of one epoch."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the permutation of ``range(n)`` for an epoch: int64 ``[n]``, read-only.

    It sorts raw Philox words, because NumPy guarantees their values across versions but not those of
    ``Generator.permutation``.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.int64).view(np.uint64)).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def holdout(n: int, part: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split ``range(n)`` at random into (train, held-out) ids, both sorted.

    Args:
      n: number of examples.
      part: a fraction in (0, 1), or a number of examples below ``n``.
      seed: of the split; not the run's seed, so several runs share one validation set.

    >>> train, valid = holdout(10, 0.2)
    >>> len(train), len(valid)
    (8, 2)
    """
    count = round(part * n) if part < 1 else int(part)
    if not 0 < count < n or (part >= 1 and part != count):
        raise InputError(f"holdout={part} of {n} examples: give a fraction in (0, 1) or an integer below {n}")
    order = permutation(seed, -1, n)
    return np.sort(order[count:]), np.sort(order[:count])
