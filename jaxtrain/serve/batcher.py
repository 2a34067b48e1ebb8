"""Join requests that wait at the same time to one batch. Plain asyncio: it knows neither HTTP nor JAX."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]
"""Arrays by name; all have the same number of rows."""
Key = tuple[tuple[str, Any, tuple[int, ...]], ...]


class QueueFull(Exception):
    """As many examples wait as may: try again later."""


class Closed(Exception):
    """The batcher takes no more requests."""


@dataclasses.dataclass(eq=False)
class _Request:
    inputs: Arrays
    rows: int
    key: Key
    arrived: float
    result: asyncio.Future[dict[str, np.ndarray]]


class Batcher:
    """Collects requests and runs them as batches, one batch at a time, in the order of arrival.

    A batch starts when ``max_batch`` examples wait, or when the oldest request has waited ``max_wait``
    seconds. While a batch runs, the next one collects. Requests join only requests with the same dtypes and
    shapes. When a batch of several requests fails, each is run again alone, so that only the one that cannot
    work fails.

    Args:
      run: ``inputs -> outputs``, both by name with one row for each example.
      max_batch: examples in a batch at most, at least 1.
      max_wait: seconds, at least 0.
      max_queue: examples that may wait at most, besides the batch that runs.
      observe: called with the number of examples and the seconds of each batch.

    >>> async def double(inputs):
    ...     return {"y": 2 * inputs["x"]}
    >>> async def example():
    ...     async with Batcher(double, max_batch=4, max_wait=0, max_queue=8) as batcher:
    ...         rows = [{"x": np.array([n])} for n in range(3)]
    ...         return [outputs["y"].tolist() for outputs in await asyncio.gather(*map(batcher.submit, rows))]
    >>> asyncio.run(example())
    [[0], [2], [4]]
    """

    def __init__(
        self,
        run: Callable[[dict[str, np.ndarray]], Awaitable[Arrays]],
        max_batch: int,
        max_wait: float,
        max_queue: int,
        observe: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self._run, self._observe = run, observe
        self._queues: dict[Key, deque[_Request]] = {}
        self._changed = asyncio.Event()
        self._closed = False
        self._worker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Batcher:
        self._worker = asyncio.create_task(self._work(), name="batcher")
        return self

    async def __aexit__(self, *error: object) -> None:
        """Run what is queued, and stop."""
        self._closed = True
        self._changed.set()
        if self._worker is not None:
            await self._worker

    @property
    def waiting(self) -> int:
        """How many examples wait for a batch."""
        return sum(request.rows for queue in self._queues.values() for request in queue)

    async def submit(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs of a request. When the caller is cancelled, a request that waits is removed.

        Args:
          inputs: from 1 to ``max_batch`` rows, checked: the batch fails with them.

        Raises:
          QueueFull: the examples that wait would be more than ``max_queue``.
          Closed: the batcher stops.
          Exception: what ``run`` raises for this request.
        """
        rows = len(next(iter(inputs.values())))
        if self._closed:
            raise Closed
        if self.waiting + rows > self.max_queue:
            raise QueueFull
        loop = asyncio.get_running_loop()
        key = tuple((name, array.dtype, array.shape[1:]) for name, array in sorted(inputs.items()))
        request = _Request(inputs, rows, key, loop.time(), loop.create_future())
        self._queues.setdefault(key, deque()).append(request)
        self._changed.set()
        try:
            return await request.result
        except asyncio.CancelledError:
            with contextlib.suppress(KeyError, ValueError):  # it may be in a batch already
                self._queues[key].remove(request)
                self._forget_empty(key)
            raise

    async def _work(self) -> None:
        while batch := await self._next():
            await self._execute(batch)

    async def _next(self) -> list[_Request]:
        """Wait for the next batch; an empty one means that the batcher is closed and nothing waits."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            oldest = min((queue[0] for queue in self._queues.values()), key=_arrival, default=None)
            if oldest is None:
                if self._closed:
                    return []
                await self._changed.wait()
                continue
            rows = sum(request.rows for request in self._queues[oldest.key])
            left = oldest.arrived + self.max_wait - loop.time()
            if rows >= self.max_batch or left <= 0 or self._closed:
                return self._take(oldest.key)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()

    def _take(self, key: Key) -> list[_Request]:
        queue, batch, rows = self._queues[key], [], 0
        while queue and rows + queue[0].rows <= self.max_batch:
            batch.append(queue.popleft())
            rows += batch[-1].rows
        self._forget_empty(key)
        return batch

    def _forget_empty(self, key: Key) -> None:
        if not self._queues[key]:
            del self._queues[key]

    async def _execute(self, batch: list[_Request]) -> None:
        batch = [request for request in batch if not request.result.done()]  # cancelled ones drop out
        if not batch:
            return
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            joined = {n: np.concatenate([request.inputs[n] for request in batch]) for n in batch[0].inputs}
            results = _split(await self._run(joined), [request.rows for request in batch])
        except Exception as error:
            if len(batch) > 1:
                for request in batch:
                    await self._execute([request])
            elif not batch[0].result.done():
                batch[0].result.set_exception(error)
            return
        self._observe(sum(request.rows for request in batch), loop.time() - start)
        for request, result in zip(batch, results, strict=True):
            if not request.result.done():
                request.result.set_result(result)


def _split(outputs: Arrays, rows: list[int]) -> list[dict[str, np.ndarray]]:
    ends = np.cumsum(rows)
    return [
        {n: a[end - size : end] for n, a in outputs.items()} for end, size in zip(ends, rows, strict=True)
    ]


def _arrival(request: _Request) -> float:
    return request.arrived
