"""The bridge between the engine, which lives in a thread of its own, and asyncio, which must never wait for it.

Commands go to the thread through a queue and are done between two steps. All events of a step for one HTTP call come
back in one wake-up of its event loop. A call closed early, because its client went away, cancels what is left of it.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import closing

from serve.engine import Engine, Event, Request


class Busy(Exception):
    """Too many requests wait already."""


class Failed(Exception):
    """The engine broke; nothing will be answered any more."""


class Call:
    """The requests of one HTTP call, and the way of their events back to its event loop.

    Iterate over it for (index of the request, event) until each has ended; Failed in between when the engine breaks.
    Whoever opened it closes it: what has not ended by then is cancelled, and its rows are free.
    """

    def __init__(self, worker: "Worker", requests: Sequence[Request]) -> None:
        self.requests = requests
        self.events: asyncio.Queue[list[tuple[int, Event]] | Failed] = asyncio.Queue()
        self.ids: list[int] = []  # known to the engine's thread
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._remaining = len(requests)
        self._closed = False

    def deliver(self, item: list[tuple[int, Event]] | Failed) -> bool:
        """From the engine's thread; False when nobody listens any more."""
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, item)
        except RuntimeError:  # the event loop is closed
            return False
        return True

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        self._worker.check()  # an engine that fails from here on finds the call in its inbox
        while self._remaining:
            item = await self.events.get()
            if isinstance(item, Failed):
                raise item
            for index, event in item:
                self._remaining -= event.reason is not None
                yield index, event

    def close(self) -> None:
        """Any number of times, also when nothing was read."""
        if not self._closed:
            self._closed = True
            self._worker.closed(self, self._remaining > 0)


class Worker:
    """Runs `engine` in a thread. waiting: requests that may wait for a row before more are refused."""

    def __init__(self, engine: Engine, waiting: int = 256) -> None:
        self.engine = engine
        self.limit = engine.memory.rows + waiting
        self.failure: BaseException | None = None
        self._open = 0  # requests of all open streams; belongs to the event loop
        self._inbox: queue.SimpleQueue[tuple[str, Call | None]] = queue.SimpleQueue()
        self._routes: dict[int, tuple[Call, int]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- the event loop's side -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises Failed once the engine's thread is gone."""
        if self.failure is not None:
            raise Failed(f"the engine stopped: {self.failure}")

    def check_room(self, count: int) -> None:
        """Raises ValueError for more requests than there is ever room for, Busy for more than now, Failed as `check`.

        Whoever has work to do before `open` asks first.
        """
        self.check()
        if count > self.limit:
            raise ValueError(f"prompt: {count} completions in one request, at most {self.limit} are allowed")
        if self._open + count > self.limit:
            raise Busy(f"{self._open} requests are running or waiting already, try again later")

    def open(self, requests: Sequence[Request]) -> Call:
        """Takes `requests` in at once. Raises as `check_room`, and ValueError for what can never be answered."""
        self.check_room(len(requests))
        for request in requests:
            self.engine.check(request)
        call = Call(self, requests)
        self._open += len(requests)
        self._inbox.put(("submit", call))
        return call

    def closed(self, call: Call, unfinished: bool) -> None:
        """A call tells that it was closed."""
        self._open -= len(call.requests)
        if unfinished:
            self._inbox.put(("cancel", call))

    async def stream(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Event]]:
        """`open`, its events, and `close`, however it is left."""
        with closing(self.open(requests)) as call:
            async for index, event in call:
                yield index, event

    def stop(self) -> None:
        """Ends the thread after its current step; what is running gets Failed."""
        self._inbox.put(("stop", None))
        self._thread.join()

    # -- the engine's side ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._commands():
                if self.engine.busy:
                    self._dispatch(self.engine.step())
            self.failure = Failed("it was shut down")
        except BaseException as error:  # whatever it was, nobody may be left waiting
            self.failure = error
        failed = Failed(f"the engine stopped: {self.failure}")
        for call in {id(call): call for call, _ in self._routes.values()}.values():
            call.deliver(failed)
        while not self._inbox.empty():
            name, call = self._inbox.get()
            if name == "submit":
                call.deliver(failed)

    def _commands(self) -> bool:
        """Does what is in the inbox, and waits for something when the engine has nothing to do. False: stop."""
        while True:
            try:
                name, call = self._inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if name == "stop":
                return False
            if name == "submit":
                for index, request in enumerate(call.requests):
                    call.ids.append(self.engine.submit(request))
                    self._routes[call.ids[-1]] = (call, index)
            else:
                for id in call.ids:
                    self.engine.cancel(id)

    def _dispatch(self, events: list[Event]) -> None:
        batches: dict[int, tuple[Call, list[tuple[int, Event]]]] = {}
        for event in events:
            call, index = self._routes[event.id]
            if event.reason is not None:
                del self._routes[event.id]
            batches.setdefault(id(call), (call, []))[1].append((index, event))
        for call, batch in batches.values():
            if not call.deliver(batch):
                for id_ in call.ids:
                    self.engine.cancel(id_)
