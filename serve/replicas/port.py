"""A replica's door: gateways connect to it, and the requests of each go to the one engine behind it.

Once a second every gateway hears how the replica does. A gateway that hears nothing for some seconds counts the replica
as lost; so does one that is told of an engine that broke or is wedged, for then the door closes.
"""

import asyncio
import secrets
import time
from asyncio import Future
from contextlib import suppress
from functools import partial
from typing import Any

from serve.grammar import GrammarError
from serve.replicas.wire import Wire, nonce, pack_events, proof, proves, unpack_request
from serve.request import Event, Request
from serve.worker import Failed, Worker

Requests = list[tuple[int, Request]]  # each with its tag

PULSE_SECONDS = 1.0
HANDSHAKE_SECONDS = 10.0


class Port:
    """Serves `worker` on a TCP port. about: what gateways are told of it when they connect."""

    def __init__(self, worker: Worker, about: dict[str, Any]) -> None:
        self.worker, self.about = worker, about
        self.secret = secrets.token_bytes(32)
        self.lines: set[Line] = set()
        self.leaving, self.failure = False, None
        self._used = time.monotonic()

    @property
    def idle(self) -> float:
        """Seconds without a request."""
        if any(line.tags for line in self.lines):
            self.use()
        return time.monotonic() - self._used

    def use(self) -> None:
        self._used = time.monotonic()

    def check(self) -> None:
        """Raises Failed when nobody is served any more, and that stays so."""
        if self.failure is None:
            try:
                self.worker.check()
            except Failed as failed:
                self.failure = failed
                self.close()
        if self.failure is not None:
            raise self.failure

    async def listen(self, host: str) -> int:
        """Opens a port on `host` and returns its number."""
        self._server = await asyncio.get_running_loop().create_server(lambda: Line(self), host, 0)
        self._pulse = asyncio.create_task(self._beat())
        return self._server.sockets[0].getsockname()[1]

    async def drain(self, seconds: float) -> None:
        """Gateways take their requests elsewhere if there is anywhere else; waits until they have, but not forever."""
        self.leaving = True
        self._tell()
        end = asyncio.get_running_loop().time() + seconds
        while any(line.tags for line in self.lines) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """The door, and all connections."""
        self._server.close()
        self._pulse.cancel()
        for line in list(self.lines):
            line.abort()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            try:
                self.check()
            except Failed:
                return
            self._tell()

    def _tell(self) -> None:
        stats = self.worker.stats()
        total = sum(len(line.tags) for line in self.lines)
        for line in self.lines:
            line.send("pulse", stats, total - len(line.tags), self.leaving)


class Line(Wire):
    """A connection from one gateway; the listener of its requests."""

    def __init__(self, port: Port) -> None:
        super().__init__()
        self.tags: set[int] = set()  # of the requests that have not ended
        self._early: set[int] = set()  # of those whose grammar is being compiled
        self._port, self._challenge = port, nonce()
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.send("hello", self._challenge)
        self._late = self._loop.call_later(HANDSHAKE_SECONDS, self.abort)

    def received(self, kind: str, *message: Any) -> None:
        if self not in self._port.lines:
            self._greet(kind, *message)
        elif kind == "submit":
            requests = [(tag, unpack_request(packed)) for tag, packed in message[0]]
            self.tags.update(tag for tag, _ in requests)
            self._port.use()
            self._submit(requests)
        elif kind == "cancel":
            dropped = self._early.intersection(message[0])
            self.tags -= dropped
            self._early -= dropped
            self._port.worker.cancel(self, message[0])

    def _submit(self, requests: Requests) -> None:
        """What has a grammar comes a little later: the engine's steps must not wait until it is compiled."""
        ready = [(tag, request) for tag, request in requests if not request.sampling.grammar]
        if ready:
            self._port.worker.submit(self, ready)
        rules: dict[str, Requests] = {}
        for tag, request in requests:
            if request.sampling.grammar:
                rules.setdefault(request.sampling.grammar, []).append((tag, request))
        for rule, later in rules.items():
            self._early.update(tag for tag, _ in later)
            compiling = self._loop.run_in_executor(None, self._compile, rule)
            compiling.add_done_callback(partial(self._compiled, later))

    def _compile(self, rule: str) -> None:
        with suppress(GrammarError):  # the engine finds it again, and tells
            self._port.worker.engine.grammars.matcher(rule)

    def _compiled(self, requests: Requests, _: Future) -> None:
        wanted = [(tag, request) for tag, request in requests if tag in self._early]
        self._early.difference_update(tag for tag, _ in wanted)
        self._port.worker.submit(self, wanted)

    def _greet(self, kind: str, answer: Any = None, challenge: Any = None) -> None:
        secret = self._port.secret
        if kind != "proof" or not proves(answer, secret, self._challenge, "gateway"):
            return self.abort()
        self._late.cancel()
        self.trust()
        self.send("welcome", proof(secret, challenge, "replica"), self._port.about)
        self._port.lines.add(self)

    def lost(self) -> None:
        self._late.cancel()
        self._port.lines.discard(self)
        self._port.worker.cancel(self, self.tags)
        self.tags, self._early = set(), set()

    # -- from the engine's thread --------------------------------------------------------------------------------

    def deliver(self, item: list[tuple[int, Event]] | Failed) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._send, item)
        except RuntimeError:  # the event loop is closed
            return False
        return self.open

    def _send(self, item: list[tuple[int, Event]] | Failed) -> None:
        if isinstance(item, Failed):
            self._port.failure = item
            return self._port.close()
        self.tags.difference_update(tag for tag, event in item if event.reason is not None)
        self.send("events", pack_events(item))
