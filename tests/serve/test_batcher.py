"""The batcher: who shares a batch, who waits, who is refused, and who fails."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from jaxtrain.serve.batcher import Batcher, Closed, QueueFull

FOREVER = 3600.0


def rows(*numbers: float) -> dict[str, np.ndarray]:
    return {"x": np.array(numbers)}


class Model:
    """Doubles; fails on negative numbers; each batch waits until it is let go."""

    def __init__(self, held: bool = False) -> None:
        self.batches: list[list[float]] = []
        self.started, self.go = asyncio.Event(), asyncio.Event()
        if not held:
            self.go.set()

    async def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.batches.append(inputs["x"].ravel().tolist())
        self.started.set()
        await self.go.wait()
        if (inputs["x"] < 0).any():
            raise ValueError("negative")
        return {"y": 2 * inputs["x"]}


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


async def settle() -> None:
    """Let every task go as far as it can without waiting for time."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_requests_share_a_batch_and_each_gets_its_rows():
    async def scenario() -> None:
        model = Model()
        async with Batcher(model, max_batch=6, max_wait=FOREVER, max_queue=99) as batcher:
            sizes = ([1.0], [2.0, 3.0], [4.0, 5.0, 6.0])
            results = await asyncio.gather(*(batcher.submit(rows(*size)) for size in sizes))
        assert [result["y"].tolist() for result in results] == [[2], [4, 6], [8, 10, 12]]
        assert model.batches == [[1, 2, 3, 4, 5, 6]]

    run(scenario())


def test_a_request_that_does_not_fit_begins_the_next_batch():
    async def scenario() -> None:
        model = Model()
        async with Batcher(model, max_batch=4, max_wait=0, max_queue=99) as batcher:
            work = [asyncio.create_task(batcher.submit(rows(*[float(n)] * 3))) for n in range(3)]
            await asyncio.gather(*work)
        assert model.batches == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]

    run(scenario())


def test_the_next_batch_collects_while_one_runs():
    async def scenario() -> None:
        model = Model(held=True)
        async with Batcher(model, max_batch=8, max_wait=0, max_queue=99) as batcher:
            work = [asyncio.create_task(batcher.submit(rows(0.0)))]
            await model.started.wait()
            work += [asyncio.create_task(batcher.submit(rows(float(n)))) for n in (1, 2, 3)]
            await settle()
            assert model.batches == [[0]] and batcher.waiting == 3
            model.go.set()
            await asyncio.gather(*work)
        assert model.batches == [[0], [1, 2, 3]]

    run(scenario())


def test_a_batch_that_is_not_full_waits_for_others_and_no_longer_than_asked():
    """An hour: only a full batch starts. With 1 ms it starts alone."""

    async def scenario() -> None:
        model = Model()
        async with Batcher(model, max_batch=2, max_wait=FOREVER, max_queue=99) as batcher:
            first = asyncio.create_task(batcher.submit(rows(1.0)))
            await settle()
            assert model.batches == []
            await batcher.submit(rows(2.0))
            await first
        async with Batcher(model, max_batch=2, max_wait=0.001, max_queue=99) as batcher:
            await batcher.submit(rows(3.0))
        assert model.batches == [[1, 2], [3]]

    run(scenario())


def test_other_shapes_and_dtypes_have_batches_of_their_own():
    async def scenario() -> None:
        model = Model()
        inputs = [{"x": np.ones(shape)} for shape in ((1, 2), (1, 3), (1, 2))] + [{"x": np.ones((1, 2), int)}]
        async with Batcher(model, max_batch=2, max_wait=0.001, max_queue=99) as batcher:
            results = await asyncio.gather(*map(batcher.submit, inputs))
        assert [result["y"].shape for result in results] == [(1, 2), (1, 3), (1, 2), (1, 2)]
        assert sorted(map(len, model.batches)) == [2, 3, 4]

    run(scenario())


def test_only_the_request_that_cannot_work_fails():
    async def scenario() -> None:
        model = Model()
        async with Batcher(model, max_batch=3, max_wait=FOREVER, max_queue=99) as batcher:
            work = (batcher.submit(rows(n)) for n in (1.0, -1.0, 3.0))
            good, bad, other = await asyncio.gather(*work, return_exceptions=True)
            assert isinstance(bad, ValueError)
            assert isinstance(good, dict) and isinstance(other, dict)
            assert good["y"].tolist() == [2] and other["y"].tolist() == [6]
            assert (await asyncio.gather(*(batcher.submit(rows(5.0)) for _ in range(3))))[0]["y"] == [10]

    run(scenario())


def test_the_queue_is_bounded_and_what_is_refused_leaves_no_trace():
    async def scenario() -> None:
        model = Model(held=True)
        async with Batcher(model, max_batch=2, max_wait=0, max_queue=3) as batcher:
            work = [asyncio.create_task(batcher.submit(rows(0.0)))]
            await model.started.wait()
            work += [asyncio.create_task(batcher.submit(rows(float(n)))) for n in (1, 2)]
            await settle()
            with pytest.raises(QueueFull):
                await batcher.submit(rows(3.0, 4.0))
            work.append(asyncio.create_task(batcher.submit(rows(5.0))))
            await settle()
            model.go.set()
            await asyncio.gather(*work)
        assert model.batches == [[0], [1, 2], [5]]

    run(scenario())


def test_who_is_cancelled_drops_out_of_the_queue_and_out_of_a_batch():
    async def scenario() -> None:
        model = Model(held=True)
        async with Batcher(model, max_batch=4, max_wait=0, max_queue=4) as batcher:
            running = asyncio.create_task(batcher.submit(rows(0.0)))
            await model.started.wait()
            work = [asyncio.create_task(batcher.submit(rows(float(n)))) for n in (1, 2, 3)]
            await settle()
            work[1].cancel()
            running.cancel()  # its batch runs already: the result is thrown away
            await settle()
            assert batcher.waiting == 2 and running.cancelled()
            model.go.set()
            done = await asyncio.gather(*work, return_exceptions=True)
        assert model.batches == [[0], [1, 3]] and isinstance(done[1], asyncio.CancelledError)

    run(scenario())


def test_closing_finishes_what_is_queued_and_takes_no_more():
    async def scenario() -> None:
        model = Model()
        async with Batcher(model, max_batch=2, max_wait=FOREVER, max_queue=9) as batcher:
            work = [asyncio.create_task(batcher.submit(rows(float(n)))) for n in range(3)]
            await settle()
        assert [(await one)["y"].tolist() for one in work] == [[0], [2], [4]]
        assert model.batches == [[0, 1], [2]]
        with pytest.raises(Closed):
            await batcher.submit(rows(1.0))

    run(scenario())


def test_batches_are_reported():
    async def scenario() -> None:
        seen: list[int] = []
        async with Batcher(Model(), 4, 0, 9, lambda n, seconds: seen.append(n)) as batcher:
            await batcher.submit(rows(1.0, 2.0, 3.0))
        assert seen == [3]

    run(scenario())
