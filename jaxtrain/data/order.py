"""Which examples make up batch k: a pure function of the seed and the step."""

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

    Every epoch is a fresh permutation of the ``n`` examples, and batch k is positions
    ``[k * batch, (k + 1) * batch)`` of the permutations laid end to end. Nothing is consumed: any batch can
    be asked for at any time, on any host, so resuming at step k needs no saved iterator.

    Attributes:
      seed: any integer.
      n: number of examples, at least 1.
      batch: global batch size, at least 1.
      drop_remainder: cut every permutation to whole batches, so that the examples at its end are left out of
        that epoch; else a batch runs over into the next epoch.

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
        """Example ids of batch ``step`` (from 0): int64 ``[batch]``."""
        return self.places(step)[0]

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Example ids of batch ``step`` and the epoch of each: int64 ``[batch]`` both."""
        usable = self.n // self.batch * self.batch if self.drop_remainder else self.n
        ids, epochs, start, end = [], [], step * self.batch, (step + 1) * self.batch
        while start < end:
            epoch, offset = divmod(start, usable)
            part = permutation(self.seed, epoch, self.n)[offset : min(usable, offset + end - start)]
            ids.append(part)
            epochs.append(np.full(len(part), epoch))
            start += len(part)
        return _joined(ids), _joined(epochs)

    def steps(self, epochs: float) -> int:
        """Number of batches in ``epochs``, which may be fractional; a begun batch counts whole."""
        exact = Fraction(str(epochs))  # 0.1 means a tenth, not the double nearest to it
        whole = self.n // self.batch if self.drop_remainder else Fraction(self.n, self.batch)
        steps = math.ceil(exact * whole)
        if steps >= 2**31:
            raise InputError(f"epochs={epochs} are more than 2^31 steps: lower it")
        return steps


@dataclasses.dataclass(frozen=True)
class Sequential:
    """Each of ``n`` examples once, in order, the last batch padded.

    >>> Sequential(n=3, batch=2).rows(1)
    (array([2, 0]), array([ True, False]))
    """

    n: int
    batch: int

    def __len__(self) -> int:
        return math.ceil(self.n / self.batch)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Example ids int64 ``[batch]`` and a mask bool ``[batch]``, false on padding."""
        ids = np.arange(step * self.batch, (step + 1) * self.batch)
        return np.where(ids < self.n, ids, 0), ids < self.n


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """A batch within one epoch is a read-only view: most of them are, and nothing is copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of ``range(n)`` for an epoch: int64 ``[n]``, read-only.

    Sorting raw Philox words, because NumPy promises their values across versions and does not promise
    those of ``Generator.permutation``.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.int64).view(np.uint64)).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def holdout(n: int, part: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split ``range(n)`` at random into (kept, held out), both sorted.

    Args:
      n: number of examples.
      part: a fraction in (0, 1), or a whole number of examples below ``n``.
      seed: of the split; not the run's seed, so that several runs share one validation set.

    >>> kept, held = holdout(10, 0.2)
    >>> len(kept), len(held)
    (8, 2)
    """
    count = round(part * n) if part < 1 else int(part)
    if not 0 < count < n or (part >= 1 and part != count):
        raise InputError(
            f"holdout={part} of {n} examples: give a fraction in (0, 1) or a whole number below {n}"
        )
    order = permutation(seed, -1, n)
    return np.sort(order[count:]), np.sort(order[:count])
