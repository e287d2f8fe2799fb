"""The thread behind asyncio: nobody waits for nothing, whoever leaves frees the row, a broken engine says so."""

import asyncio
import time

import pytest

from serve.engine import Engine
from serve.request import Request
from serve.sampler import Sampling
from serve.worker import Busy, Failed, Worker

LONG = Request([1, 2], Sampling(max_tokens=2000, temperature=0.0, ignore_eos=True))
SHORT = Request([1, 2], Sampling(max_tokens=5, temperature=0.0, ignore_eos=True))


@pytest.fixture
def worker(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=2, max_len=2100), waiting=3)
    yield worker
    worker.stop()


async def collect(worker, *requests) -> list[list[int]]:
    tokens = [[] for _ in requests]
    async for index, event in worker.stream(requests):
        tokens[index].append(event.token)
    return tokens


async def until(condition) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 5
        await asyncio.sleep(0.005)


def test_many_streams_at_once(worker):
    async def main():
        alone = await collect(worker, SHORT)
        many = await asyncio.gather(*(collect(worker, SHORT) for _ in range(5)))
        assert all(one == alone for one in many)
        assert await collect(worker, SHORT, SHORT, SHORT) == alone * 3

    asyncio.run(main())


def test_leaving_early_frees_the_row(worker):
    async def main():
        stream = worker.stream([LONG, LONG, LONG])
        await anext(stream)
        assert worker.engine.memory.free_rows == 0
        await stream.aclose()
        await until(lambda: worker.engine.memory.free_rows == 2)
        task = asyncio.create_task(collect(worker, LONG))
        await until(lambda: worker.engine.memory.free_rows == 1)
        task.cancel()
        await until(lambda: worker.engine.memory.free_rows == 2)
        assert len((await collect(worker, SHORT))[0]) == 5

    asyncio.run(main())


def test_a_call_that_nobody_reads_frees_its_rows(worker):
    """As when a client goes away before its stream begins."""

    async def main():
        call = worker.open([LONG, LONG, LONG])
        with pytest.raises(Busy):
            worker.open([SHORT] * 3)
        await until(lambda: worker.engine.memory.free_rows == 0)
        call.close()
        call.close()
        await until(lambda: worker.engine.memory.free_rows == 2)
        assert len(await collect(worker, *[SHORT] * 5)) == 5

    asyncio.run(main())


def test_the_event_loop_is_not_held_up(worker):
    async def main():
        task = asyncio.create_task(collect(worker, LONG, LONG))
        gaps, last = [], time.monotonic()
        for _ in range(100):
            await asyncio.sleep(0.001)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
        task.cancel()
        assert sorted(gaps)[80] < 0.1

    asyncio.run(main())


def test_too_many_and_impossible_requests(worker):
    async def main():
        with pytest.raises(ValueError, match="^prompt: 6 completions in one request, at most 5 are allowed$"):
            await collect(worker, *[SHORT] * 6)
        with pytest.raises(ValueError, match="^prompt: must have at least one token$"):
            await collect(worker, Request([]))
        task = asyncio.create_task(collect(worker, *[LONG] * 4))
        await until(lambda: worker.engine.busy)
        with pytest.raises(Busy, match="^4 requests are running or waiting already, try again later$"):
            await collect(worker, SHORT, SHORT)
        task.cancel()
        await until(lambda: worker.engine.memory.free_rows == 2)
        assert len((await collect(worker, SHORT))[0]) == 5

    asyncio.run(main())


def test_a_broken_engine_tells_everybody(decoder, tokenizer):
    engine = Engine(decoder, tokenizer, max_rows=2, max_len=2100)
    worker = Worker(engine)

    async def main():
        waiting = asyncio.create_task(collect(worker, LONG, LONG, LONG))
        await until(lambda: engine.memory.free_rows == 0)
        engine.memory.put = None  # the next step fails
        with pytest.raises(Failed, match="^the engine stopped: 'NoneType' object is not callable$"):
            await waiting
        with pytest.raises(Failed, match="^the engine stopped"):
            await collect(worker, SHORT)
        with pytest.raises(Failed):
            worker.check()

    asyncio.run(main())


def test_stopping_leaves_nobody_waiting(decoder, tokenizer):
    worker = Worker(Engine(decoder, tokenizer, max_rows=2, max_len=2100))

    async def main():
        waiting = asyncio.create_task(collect(worker, LONG))
        await until(lambda: worker.engine.busy)
        await asyncio.to_thread(worker.stop)
        with pytest.raises(Failed, match="^the engine stopped: it was shut down$"):
            await waiting

    asyncio.run(main())
