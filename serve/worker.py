"""The bridge between the engine, which lives in a thread of its own, and asyncio, which must never wait for it.

Commands go to the thread through a queue and are done between two steps. All events of a step for one listener come
back in one wake-up of its event loop: a call of one HTTP request, or the connection of a gateway
(`serve.replicas.port`), which has many requests. A call closed early, because its client went away, cancels what is
left of it.
"""

import asyncio
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Protocol

from serve.engine import Engine
from serve.request import Event, Request

STALL_SECONDS = 10.0  # a step takes a small part of a second


class Busy(Exception):
    """Too many requests wait already."""


class Failed(Exception):
    """The engine broke; nothing will be answered any more."""


class Answers(Protocol):
    """The events of some requests, for (index of the request, event) until each has ended; Failed when that can't be.

    Whoever opened it closes it: what has not ended by then is cancelled.
    """

    async def read(self) -> list[tuple[int, Event]]:
        """What has come since the last time, at least one event; nothing once all requests have ended."""

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]: ...

    def close(self) -> None: ...


class Backend(Protocol):
    """What answers the requests for a model: an engine in this process (`Worker`) or replicas elsewhere
    (`serve.replicas.remote`)."""

    def check(self) -> None:
        """Raises Failed while nothing can be answered."""

    def check_room(self, count: int) -> None:
        """Raises ValueError for more requests than there is ever room for, Busy for more than now, Failed as `check`.

        Whoever has work to do before `open` asks first.
        """

    def open(self, requests: Sequence[Request]) -> Answers:
        """Takes `requests` in at once. Raises as `check_room`, and ValueError for what can never be answered."""

    def stats(self) -> dict[str, float]:
        """Numbers for /metrics."""


class Listener(Protocol):
    """Who is told about requests."""

    def deliver(self, item: list[tuple[int, Event]] | Failed) -> bool:
        """From the engine's thread; False when nobody listens any more, and then its requests are cancelled."""


class Inbox:
    """Where the events of a call's requests arrive, in its event loop."""

    def __init__(self, requests: int) -> None:
        self.events: asyncio.Queue[list[tuple[int, Event]] | Failed] = asyncio.Queue()
        self._remaining = requests

    async def read(self) -> list[tuple[int, Event]]:
        """What has come since the last time, at least one event; nothing once all requests have ended."""
        if not self._remaining:
            return []
        batch: list[tuple[int, Event]] = []
        while not batch or not self.events.empty():
            item = await self.events.get()
            if isinstance(item, Failed):
                if not batch:
                    raise item
                self.events.put_nowait(item)  # what came before it comes first
                break
            batch += item
        self._remaining -= sum(event.reason is not None for _, event in batch)
        return batch

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while batch := await self.read():
            for index, event in batch:
                yield index, event


class Call(Inbox):
    """The requests of one HTTP call, and the way of their events back to its event loop."""

    def __init__(self, worker: "Worker", requests: Sequence[Request]) -> None:
        super().__init__(len(requests))
        self.requests = requests
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._closed = False

    def deliver(self, item: list[tuple[int, Event]] | Failed) -> bool:
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, item)
        except RuntimeError:  # the event loop is closed
            return False
        return True

    async def read(self) -> list[tuple[int, Event]]:
        if self._remaining and self.events.empty():
            self._worker.check()  # an engine that fails from here on finds the call in its inbox
        return await super().read()

    def close(self) -> None:
        """Any number of times, also when nothing was read."""
        if not self._closed:
            self._closed = True
            self._worker.closed(self, self._remaining > 0)


def aside(load: Callable[[], Engine]) -> Engine:
    """The engine that `load` makes, in a thread that ends.

    Each thread that computes keeps OpenMP's workers while it lives, and with more of those than cores every product
    waits for them asleep: a thread that goes on would halve the speed of the engine's own.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(load).result()


class Worker:
    """Runs `engine` in a thread. waiting: requests that may wait for a row before more are refused.

    stall: seconds after which a step that has not finished means that the engine is wedged.
    """

    def __init__(self, engine: Engine, waiting: int = 256, stall: float = STALL_SECONDS) -> None:
        self.engine, self.stall = engine, stall
        self.limit = int(engine.stats()["rows"]) + waiting
        self.failure: BaseException | None = None
        self._open = 0  # requests of all open calls; belongs to the event loop
        self._inbox: queue.SimpleQueue[tuple[str, Listener | None, Iterable]] = queue.SimpleQueue()
        self._routes: dict[int, tuple[Listener, int]] = {}
        self._ids: dict[tuple[int, int], int] = {}  # of (listener, tag)
        self._since: float | None = None  # when the step began that is not finished
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- the event loop's side -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises Failed once the engine's thread is gone or wedged."""
        if self.failure is not None:
            raise Failed(f"the engine stopped: {self.failure}")
        since = self._since
        if since is not None and time.monotonic() - since > self.stall:
            raise Failed(f"the engine is wedged: a step has not finished for {self.stall:g} seconds")

    def check_room(self, count: int) -> None:
        self.check()
        if count > self.limit:
            raise ValueError(f"prompt: {count} completions in one request, at most {self.limit} are allowed")
        if self._open + count > self.limit:
            raise Busy(f"{self._open} requests are running or waiting already, try again later")

    def open(self, requests: Sequence[Request]) -> Call:
        self.check_room(len(requests))
        for request in requests:
            self.engine.prompts.check(request)
        call = Call(self, requests)
        self._open += len(requests)
        self.submit(call, list(enumerate(requests)))
        return call

    def closed(self, call: Call, unfinished: bool) -> None:
        """A call tells that it was closed."""
        self._open -= len(call.requests)
        if unfinished:
            self.cancel(call, range(len(call.requests)))

    def submit(self, listener: Listener, requests: Sequence[tuple[int, Request]]) -> None:
        """Takes in requests, each with the tag that its events will have; no more is asked about them."""
        self._inbox.put(("submit", listener, requests))

    def cancel(self, listener: Listener, tags: Iterable[int]) -> None:
        """Ends those of `tags` that have not ended."""
        self._inbox.put(("cancel", listener, tags))

    def stats(self) -> dict[str, float]:
        return self.engine.stats()

    async def stream(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Event]]:
        """`open`, its events, and `close`, however it is left."""
        with closing(self.open(requests)) as call:
            async for index, event in call:
                yield index, event

    def stop(self) -> None:
        """Ends the thread after its current step; what is running gets Failed."""
        self._inbox.put(("stop", None, ()))
        self._thread.join()

    # -- the engine's side ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._commands():
                if self.engine.busy:
                    self._since = time.monotonic()
                    events = self.engine.step()
                    self._since = None
                    self._dispatch(events)
                    os.sched_yield()  # to whoever waits for a core: rather now than in the middle of a step
            self.failure = Failed("it was shut down")
        except BaseException as error:  # whatever it was, nobody may be left waiting
            self.failure = error
        failed = Failed(f"the engine stopped: {self.failure}")
        listeners = [listener for listener, _ in self._routes.values()]
        while not self._inbox.empty():
            name, listener, _ = self._inbox.get()
            listeners += [listener] if name == "submit" else []
        for listener in {id(listener): listener for listener in listeners}.values():
            listener.deliver(failed)

    def _commands(self) -> bool:
        """Does what is in the inbox, and waits for something when the engine has nothing to do. False: stop."""
        while True:
            try:
                name, listener, items = self._inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if name == "stop":
                return False
            if name == "submit":
                self._submit(listener, items)
            else:
                self._cancel(listener, items)

    def _submit(self, listener: Listener, requests: Iterable[tuple[int, Request]]) -> None:
        for tag, request in requests:
            try:
                number = self.engine.submit(request)
            except ValueError as error:  # checked by whoever has other limits than this engine
                listener.deliver([(tag, Event(tag, None, "", "error", error=error))])
                continue
            self._routes[number], self._ids[id(listener), tag] = (listener, tag), number

    def _cancel(self, listener: Listener, tags: Iterable[int]) -> None:
        for tag in tags:
            number = self._ids.get((id(listener), tag))
            if number is not None:
                self.engine.cancel(number)

    def _dispatch(self, events: list[Event]) -> None:
        batches: dict[int, tuple[Listener, list[tuple[int, Event]]]] = {}
        for event in events:
            listener, tag = self._routes[event.id]
            if event.reason is not None:
                del self._routes[event.id], self._ids[id(listener), tag]
            batches.setdefault(id(listener), (listener, []))[1].append((tag, event))
        for key, (listener, batch) in batches.items():
            if not listener.deliver(batch):
                self._cancel(listener, [tag for owner, tag in self._ids if owner == key])
