"""The gateway's side of a model's replicas: a backend that outlives each of them.

A gateway keeps of every request its prompt, its sampling with the seed, and the tokens that came so far. When a replica
is lost, leaves or falls silent, its requests go to another one with those tokens as `resumed` and go on there. The
random number of a token belongs to (seed, position) and the text stream is rebuilt from the tokens, so nobody who reads
can tell; that is exact where computing is: on equal machines in fp32, or with kernels that do not depend on the batch.
Without any replica requests wait for one.
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from serve.prompts import Prompts
from serve.replicas.router import Router
from serve.replicas.wire import Wire, nonce, pack_request, proof, proves, unpack_event
from serve.request import Event, Request
from serve.worker import Busy, Failed, Inbox

SILENT_SECONDS = 8.0  # a replica speaks every second
PATIENCE_SECONDS = 120.0  # for a replica to be there again
LEVELS = ("running", "waiting", "rows", "pages_used", "pages_total")  # numbers that are now; all others only grow
DEATHS = 10  # of replicas in a row without a token in between, after which a request itself is suspected


@dataclass(frozen=True)
class Address:
    """Where a replica is, and how it knows that a gateway may come in."""

    replica: str
    host: str
    port: int
    secret: bytes


@dataclass(eq=False)
class Flight:
    """One request on its way."""

    call: "RemoteCall"
    index: int
    request: Request
    channel: "Channel | None" = None
    tag: int = -1
    tokens: list[int] = field(default_factory=list)
    deaths: int = 0
    begun: float = field(default_factory=time.monotonic)

    def rest(self) -> Request:
        """What is still to do."""
        request = self.request
        if request.deadline is not None:
            request = replace(request, deadline=max(0.0, request.deadline - (time.monotonic() - self.begun)))
        return replace(request, resumed=(*request.resumed, *self.tokens)) if self.tokens else request


class RemoteCall(Inbox):
    """As `worker.Call`: (index, event) of each request until it has ended, wherever it is computed."""

    def __init__(self, remote: "Remote", requests: Sequence[Request]) -> None:
        super().__init__(len(requests))
        self.flights = [Flight(self, index, request) for index, request in enumerate(requests)]
        self._remote, self._closed = remote, False

    def close(self) -> None:
        """Any number of times, also when nothing was read."""
        if not self._closed:
            self._closed = True
            self._remote.closed(self)


class Remote:
    """The replicas of one model. Belongs to one event loop.

    prompts: checks requests. patience: seconds that requests wait while there is no replica.
    """

    def __init__(self, prompts: Prompts, patience: float = PATIENCE_SECONDS) -> None:
        self.prompts, self.patience = prompts, patience
        self.router = Router()
        self.channels: dict[str, Channel] = {}  # by replica; those that are connected
        self.moved = 0  # requests that went on elsewhere
        self._connecting: set[str] = set()
        self._open, self._limit, self._retired = 0, 256, False
        self._homeless: dict[Flight, asyncio.TimerHandle] = {}
        self._past: dict[str, float] = {}  # what replicas that are gone have done
        self._tags = count()

    # -- as a backend --------------------------------------------------------------------------------------------

    def check(self) -> None:
        if not self.channels:
            raise Failed("no replica of this model is there now")

    def check_room(self, count: int) -> None:
        if count > self._limit:
            raise ValueError(f"prompt: {count} completions in one request, at most {self._limit} are allowed")
        elsewhere = sum(channel.others for channel in self.channels.values())
        if self._open + elsewhere + count > self._limit:
            raise Busy(f"{self._open + elsewhere} requests are running or waiting already, try again later")

    def open(self, requests: Sequence[Request]) -> RemoteCall:
        self.check_room(len(requests))
        for request in requests:
            self.prompts.check(request)
        call = RemoteCall(self, [_seeded(request) for request in requests])
        self._open += len(requests)
        self._place(call.flights)
        return call

    @property
    def busy(self) -> bool:
        """Whether there are requests."""
        return self._open > 0

    def stats(self) -> dict[str, float]:
        """Of all replicas together, and what this gateway did."""
        total = dict(self._past)
        for channel in self.channels.values():
            _add(total, channel.stats)
        own = {"replicas": len(self.channels), "moved": self.moved, "homeless": len(self._homeless)}
        return total | own | {"routed": self.router.routed, "routed_to_prefix": self.router.matched}

    def closed(self, call: RemoteCall) -> None:
        """A call tells that it was closed."""
        self._open -= len(call.flights)
        cancelled: dict[Channel, list[int]] = {}
        for flight in call.flights:
            if flight in self._homeless:
                self._homeless.pop(flight).cancel()
            elif flight.channel is not None:
                flight.channel.flights.pop(flight.tag)
                cancelled.setdefault(flight.channel, []).append(flight.tag)
                flight.channel = None
        for channel, tags in cancelled.items():
            channel.send("cancel", tags)
        if self._retired and not self._open:
            self.close()

    # -- replicas come and go ------------------------------------------------------------------------------------

    async def connect(self, address: Address) -> None:
        """To a replica, unless it is or is becoming connected. OSError when it is not there."""
        if address.replica in self.channels or address.replica in self._connecting:
            return
        self._connecting.add(address.replica)
        try:
            loop = asyncio.get_running_loop()
            create = loop.create_connection(lambda: Channel(self, address), address.host, address.port)
            _, channel = await asyncio.wait_for(create, SILENT_SECONDS)
            await asyncio.wait_for(channel.welcomed, SILENT_SECONDS)
        finally:
            self._connecting.discard(address.replica)

    def retire(self) -> None:
        """Closes when the last request has ended."""
        self._retired = True
        if not self._open:
            self.close()

    def close(self) -> None:
        """All connections; what is in flight fails."""
        for channel in list(self.channels.values()):
            self._fail(self._leave(channel), "the model was unloaded")
            channel.abort()
        self._fail(list(self._homeless), "the model was unloaded")

    def joined(self, channel: "Channel") -> None:
        """A replica said welcome."""
        self.channels[channel.address.replica] = channel
        self.prompts.longest = min(self.prompts.max_len, channel.about["longest"])
        self._limit = sum(one.about["limit"] for one in self.channels.values())
        self._place(list(self._homeless))
        for other in list(self.channels.values()):
            if other.leaving:
                self.vacate(other)

    def lost(self, channel: "Channel") -> None:
        """A replica is gone."""
        flights = self._leave(channel)
        suspects = []
        for flight in flights:
            flight.deaths += 1
            if flight.deaths >= DEATHS:
                suspects.append(flight)
        self._fail(suspects, f"{DEATHS} replicas in a row stopped while they computed this request")
        self.moved += len(flights) - len(suspects)
        self._place([flight for flight in flights if flight.deaths < DEATHS])

    def vacate(self, channel: "Channel") -> None:
        """A replica is about to go: what it has moves, if there is anywhere to."""
        if any(not other.leaving for other in self.channels.values()):
            flights = list(channel.flights.values())
            channel.send("cancel", list(channel.flights))
            channel.flights.clear()
            self.moved += len(flights)
            self._place(flights)

    def _leave(self, channel: "Channel") -> list[Flight]:
        flights = list(channel.flights.values())
        channel.flights.clear()
        if self.channels.get(channel.address.replica) is channel:
            del self.channels[channel.address.replica]
            _add(self._past, {name: value for name, value in channel.stats.items() if name not in LEVELS})
            self.router.forget(channel.address.replica)
            if self.channels:  # while there is none, as many may wait as before
                self._limit = sum(one.about["limit"] for one in self.channels.values())
        return flights

    # -- requests find a replica ---------------------------------------------------------------------------------

    def _place(self, flights: Sequence[Flight]) -> None:
        """Sends each to a replica, or lets it wait for one."""
        staying = {name: channel for name, channel in self.channels.items() if not channel.leaving} or self.channels
        sent: dict[Channel, list[tuple[int, Any]]] = {}
        for flight in flights:
            if not staying:
                self._wait(flight)
                continue
            if flight in self._homeless:
                self._homeless.pop(flight).cancel()
            loads = {name: channel.others + len(channel.flights) for name, channel in staying.items()}
            channel = staying[self.router.choose(flight.request.prompt, loads, flight.request.key)]
            flight.channel, flight.tag = channel, next(self._tags)
            channel.flights[flight.tag] = flight
            sent.setdefault(channel, []).append((flight.tag, pack_request(flight.rest())))
        for channel, requests in sent.items():
            channel.send("submit", requests)

    def _wait(self, flight: Flight) -> None:
        flight.channel = None
        if flight not in self._homeless:
            message = f"no replica came back within {self.patience:g} seconds"
            later = asyncio.get_running_loop().call_later(self.patience, self._fail, [flight], message)
            self._homeless[flight] = later

    def _fail(self, flights: Sequence[Flight], message: str) -> None:
        for flight in flights:
            flight.channel = None
            if flight in self._homeless:
                self._homeless.pop(flight).cancel()
            flight.call.events.put_nowait(Failed(message))


class Channel(Wire):
    """A connection to one replica, with all requests that this gateway has there."""

    def __init__(self, remote: Remote, address: Address) -> None:
        super().__init__()
        self.remote, self.address = remote, address
        self.flights: dict[int, Flight] = {}
        self.about: dict[str, Any] = {}
        self.stats: dict[str, float] = {}
        self.others = 0  # requests that other gateways have there
        self.leaving = False
        self.welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._challenge = nonce()
        self._heard = time.monotonic()

    def received(self, kind: str, *message: Any) -> None:
        self._heard = time.monotonic()
        if not self.welcomed.done():
            self._greet(kind, *message)
        elif kind == "events":
            self._events(message[0])
        elif kind == "pulse":
            self.stats, self.others, leaving = message
            if leaving and not self.leaving:
                self.leaving = True
                self.remote.vacate(self)

    def _greet(self, kind: str, answer: bytes, about: Any = None) -> None:
        secret = self.address.secret
        if kind == "hello":
            self.send("proof", proof(secret, answer, "gateway"), self._challenge)
        elif kind == "welcome" and proves(answer, secret, self._challenge, "replica"):
            self.trust()
            self.about = about
            self.welcomed.set_result(None)
            self._listen()
            self.remote.joined(self)
        else:
            self.abort()

    def _listen(self) -> None:
        """Watches for silence: a process may be stopped, or a machine cut off, and its connection stays."""
        if time.monotonic() - self._heard > SILENT_SECONDS:
            self.abort()
        elif self.open:
            asyncio.get_running_loop().call_later(1.0, self._listen)

    def _events(self, packed: Sequence[tuple]) -> None:
        batches: dict[RemoteCall, list[tuple[int, Event]]] = {}
        for one in packed:
            flight = self.flights.get(one[0])
            if flight is None:  # it was cancelled or has moved
                continue
            event = unpack_event(one)
            if event.token is not None:
                if flight.tokens and event.cached:  # told with the first event of all, not of each replica
                    event = replace(event, cached=0)
                flight.tokens.append(event.token)
                flight.deaths = 0
            if event.reason is not None:
                del self.flights[one[0]]
                flight.channel = None
            batches.setdefault(flight.call, []).append((flight.index, event))
        for call, batch in batches.items():
            call.events.put_nowait(batch)

    def lost(self) -> None:
        if not self.welcomed.done():
            self.welcomed.set_exception(ConnectionError(f"{self.address.host}:{self.address.port} refused the gateway"))
        self.remote.lost(self)


def _add(total: dict[str, float], numbers: dict[str, float]) -> None:
    for name, value in numbers.items():
        total[name] = total.get(name, 0) + value


def _seeded(request: Request) -> Request:
    """With a seed of its own, so that it can go on elsewhere."""
    if request.sampling.seed is not None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))
