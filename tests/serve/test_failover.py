"""Requests outlive the replicas that compute them: over real sockets, without Ray.

Tokens, texts, offsets and reasons are equal to the last byte. Log probabilities are as equal as fp32 sums of batches of
other sizes are.
"""

import asyncio
import threading
import time
from itertools import chain

import pytest

from serve import grammar
from serve.engine import Engine
from serve.replicas.port import Port
from serve.replicas.remote import DEATHS, Address, Remote
from serve.request import Request
from serve.sampler import Sampling
from serve.worker import Busy, Failed, Worker

SAMPLINGS = [
    Sampling(max_tokens=60, temperature=0.0, ignore_eos=True),
    Sampling(max_tokens=60, seed=3, logprobs=2, ignore_eos=True),
    Sampling(max_tokens=60, seed=4, top_p=0.9, frequency_penalty=0.5),
    Sampling(max_tokens=60, seed=5, stop=("ever there", "zz"), logprobs=0, prompt_logprobs=2, ignore_eos=True),
]
REQUESTS = [Request([1, 2, 3 + index], sampling) for index, sampling in enumerate(SAMPLINGS)]


class Replica:
    """One engine behind a port, as in a process of its own."""

    def __init__(self, decoder, tokenizer, rows: int = 4, waiting: int = 50) -> None:
        self.worker = Worker(Engine(decoder, tokenizer, max_rows=rows, max_len=2100), waiting)

    async def open(self, name: str) -> Address:
        self.port = Port(self.worker, {"longest": 2100, "limit": self.worker.limit})
        return Address(name, "127.0.0.1", await self.port.listen("127.0.0.1"), self.port.secret)


@pytest.fixture
def replicas(decoder, tokenizer):
    made = [Replica(decoder, tokenizer) for _ in range(3)]
    yield made
    for replica in made:
        if replica.worker.failure is None:
            replica.worker.stop()


@pytest.fixture
def run(replicas):
    """Runs main(remote, addresses) with an address for each replica, none of them connected."""

    def run(main, **options):
        async def all():
            addresses = [await replica.open(f"r{index}") for index, replica in enumerate(replicas)]
            remote = Remote(replicas[0].worker.engine.prompts, **options)
            try:
                await asyncio.wait_for(main(remote, addresses), 240)
            finally:
                remote.close()
                for replica in replicas:
                    replica.port.close()

        asyncio.run(all())

    return run


async def collect(backend, requests=REQUESTS, at=None, then=None) -> list[list[tuple]]:
    """What a client could tell apart; after `at` events `then` is called."""
    rows, seen = [[] for _ in requests], 0
    call = backend.open(requests)
    try:
        async for index, event in call:
            told = [event.logprobs, *(event.prompt_logprobs or ())]
            rows[index].append((event.token, event.text, event.reason, told, event.offset))
            seen += 1
            if seen == at:
                then()
    finally:
        call.close()
    return rows


def check(rows: list[list[tuple]], expected: list[list[tuple]]) -> None:
    assert [[one[:3] + one[4:] for one in row] for row in rows] == [
        [one[:3] + one[4:] for one in row] for row in expected
    ]
    pairs = [(a[3], b[3]) for row, other in zip(rows, expected) for a, b in zip(row, other)]
    for told, right in chain(*(zip(*pair, strict=True) for pair in pairs)):
        if told is None or right is None:
            assert told is right
            continue
        assert told.token == pytest.approx(right.token, abs=1e-4)
        assert dict(told.top) == pytest.approx(dict(right.top), abs=1e-4)


async def until(condition) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 120
        await asyncio.sleep(0.01)


def test_a_lost_connection_changes_nothing(run, replicas):
    """Each replica in turn goes at another place of the streams, and comes back."""

    async def main(remote, addresses):
        expected = await collect(replicas[0].worker)
        for address in addresses[:2]:
            await remote.connect(address)
        check(await collect(remote), expected)
        assert remote.moved == 0
        cuts = []
        for at in (1, 7, 50, 111, 180):
            await remote.connect(addresses[at % 2])

            def cut():
                busiest = max(remote.channels.values(), key=lambda channel: len(channel.flights))
                cuts.append(len(busiest.flights))  # late cuts may find all that is still read generated already
                busiest.abort()

            check(await collect(remote, at=at, then=cut), expected)
            await until(lambda: len(remote.channels) == 1)
            for address in addresses[:2]:
                await remote.connect(address)
        assert remote.moved == sum(cuts) and cuts[0] and cuts[1]
        await until(lambda: all(not replica.worker.engine.busy for replica in replicas))

    run(main)


def test_without_a_replica_requests_wait_for_one(run, replicas):
    async def main(remote, addresses):
        with pytest.raises(Failed, match="no replica"):
            remote.check()
        waiting = asyncio.create_task(collect(remote))
        await asyncio.sleep(0.05)
        await remote.connect(addresses[0])
        expected = await collect(replicas[1].worker)
        check(await waiting, expected)

        def gone():
            remote.channels["r0"].abort()
            asyncio.get_running_loop().call_later(0.1, lambda: asyncio.ensure_future(remote.connect(addresses[2])))

        check(await collect(remote, at=40, then=gone), expected)

    run(main)


def test_patience_has_an_end(run):
    async def main(remote, addresses):
        with pytest.raises(Failed, match="^no replica came back within 0.2 seconds$"):
            await collect(remote)
        call = remote.open(REQUESTS)
        call.close()
        assert remote.stats()["homeless"] == 0

    run(main, patience=0.2)


def test_a_replica_that_leaves_is_vacated(run, replicas):
    async def main(remote, addresses):
        expected = await collect(replicas[0].worker)
        await remote.connect(addresses[0])
        drains = []

        def leave():
            drains.append(asyncio.create_task(replicas[0].port.drain(20)))

        task = asyncio.create_task(collect(remote, at=30, then=leave))
        await until(lambda: "r0" in remote.channels and remote.channels["r0"].leaving)
        await remote.connect(addresses[1])
        check(await task, expected)
        await drains[0]
        assert not replicas[0].port.lines.pop().tags and remote.moved == 4
        check(await collect(remote), expected)
        assert not replicas[0].worker.engine.busy

    run(main)


def test_a_wedged_engine_is_left(run, replicas, monkeypatch):
    """A step that never ends: the thread lives, and computes nothing."""
    release = threading.Event()

    async def main(remote, addresses):
        expected = await collect(replicas[0].worker)
        await remote.connect(addresses[0])
        await remote.connect(addresses[1])
        replicas[0].worker.stall = 2.0
        step = replicas[0].worker.engine.step

        def wedged():
            release.wait()
            return step()

        def wedge():
            replicas[0].worker.engine.step = wedged

        remote.channels["r1"].others = 100  # so that all of it goes to the other
        task = asyncio.create_task(collect(remote, at=40, then=wedge))
        check(await task, expected)
        assert remote.moved == 4
        with pytest.raises(Failed, match="^the engine is wedged: a step has not finished for 2 seconds$"):
            replicas[0].port.check()
        release.set()
        await until(lambda: not replicas[0].worker.engine.busy)
        with pytest.raises(Failed, match="wedged"):
            replicas[0].port.check()

    try:
        run(main)
    finally:
        release.set()


def test_a_slow_grammar_holds_up_nobody(run, replicas, monkeypatch):
    """Nor does one whose client leaves meanwhile ever run."""
    compiled = threading.Event()
    slow = [Request([1, 2], Sampling(max_tokens=20, seed=1, grammar=grammar.of_regex("[ab]{5}")))]

    async def main(remote, addresses):
        expected, plain = await collect(replicas[1].worker, slow), await collect(replicas[1].worker)
        engine = replicas[0].worker.engine
        matcher = engine.grammars.matcher
        monkeypatch.setattr(engine.grammars, "matcher", lambda rule: compiled.wait() and matcher(rule))
        await remote.connect(addresses[0])
        leaving, waiting = remote.open(slow), asyncio.create_task(collect(remote, slow))
        try:
            check(await asyncio.wait_for(collect(remote), 30), plain)
            leaving.close()
            check(await asyncio.wait_for(collect(remote), 30), plain)
        finally:
            compiled.set()
        check(await waiting, expected)
        assert engine.stats()["generated"] == sum(map(len, (*plain, *plain, *expected)))

    run(main)


def test_a_request_that_kills_is_given_up(run, replicas):
    async def main(remote, addresses):
        await remote.connect(addresses[0])
        call = remote.open(REQUESTS[:1])
        for _ in range(DEATHS):
            remote.channels["r0"].data_received = lambda data: None  # nothing of it is ever heard
            remote.channels["r0"].abort()
            await until(lambda: not remote.channels)
            await remote.connect(addresses[0])
        with pytest.raises(Failed, match=f"^{DEATHS} replicas in a row stopped"):
            async for _ in call:
                pass
        call.close()

    run(main)


def test_who_does_not_know_the_secret_stays_outside(run, replicas):
    async def main(remote, addresses):
        wrong = Address("r0", addresses[0].host, addresses[0].port, b"guessed")
        with pytest.raises(ConnectionError):
            await remote.connect(wrong)
        assert not remote.channels and not replicas[0].port.lines
        reader, writer = await asyncio.open_connection(addresses[0].host, addresses[0].port)
        writer.write(b"\xdd\xff\xff\xff\xff" * 1000)
        await reader.read()
        assert not replicas[0].port.lines

    run(main)


def test_room_is_that_of_all_replicas(run, replicas):
    async def main(remote, addresses):
        for address in addresses[:2]:
            await remote.connect(address)
        many = [Request([1, 2], Sampling(max_tokens=500, ignore_eos=True))] * 100
        call = remote.open(many)
        with pytest.raises(Busy, match="^100 requests are running or waiting already"):
            remote.open(REQUESTS * 3)
        with pytest.raises(ValueError, match="at most 108 are allowed"):
            remote.open(many * 2)
        call.close()
        await until(lambda: not any(replica.port.lines and replica.worker.engine.busy for replica in replicas))
        assert len(await collect(remote)) == 4

    run(main)
