"""What a gateway and a replica say to each other: msgpack over one TCP connection for all their requests.

Everything that a step of the engine did for this gateway is one message. A socket, because it tells at once when the
other side's process is gone, and costs a few microseconds where a call through Ray costs a few hundred. Each side
proves that it knows the replica's secret, which both got through Ray, before anything else is read.
"""

import asyncio
import hmac
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import msgpack

from serve.request import Event, Request
from serve.sampler import Logprobs, Sampling

MOST_BYTES = 64 * 2**20  # of one message, and of what may wait to be sent
STRANGER_BYTES = 4096  # what is read of somebody who has not yet proved anything
_DEFAULTS = {field.name: field.default for field in fields(Sampling)}
_REQUEST = [field.name for field in fields(Request) if field.name not in ("prompt", "sampling")]
_EVENT = [field.name for field in fields(Event) if field.name not in ("id", "logprobs", "prompt_logprobs", "error")]


class Broken(Exception):
    """What broke a request in another process."""


class Wire(asyncio.Protocol, ABC):
    """One end of a connection."""

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._unpacker = _unpacker(STRANGER_BYTES)

    @abstractmethod
    def received(self, kind: str, *message: Any) -> None:
        """A whole message."""

    @abstractmethod
    def lost(self) -> None:
        """The connection is closed, whoever did it. Called once."""

    def send(self, *message: Any) -> None:
        """When the connection is closed or nobody reads it, nothing happens but that it is closed."""
        if self.open:
            self._transport.write(msgpack.packb(message))
            if self._transport.get_write_buffer_size() > MOST_BYTES:
                self.abort()

    def trust(self) -> None:
        """The other side has proved that it knows the secret."""
        self._unpacker = _unpacker(MOST_BYTES)

    def abort(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.open, self._transport = True, transport

    def data_received(self, data: bytes) -> None:
        while data and self.open:
            unpacker = self._unpacker
            try:
                unpacker.feed(data)
                data = b""
                while self._unpacker is unpacker and self.open and (message := next(unpacker, None)) is not None:
                    self._take(message)
                if self._unpacker is not unpacker:  # what came right behind the handshake
                    data = unpacker.read_bytes(STRANGER_BYTES)
            except (msgpack.exceptions.UnpackException, msgpack.exceptions.BufferFull, ValueError):
                self.abort()

    def _take(self, message: Any) -> None:
        if isinstance(message, tuple) and message and isinstance(message[0], str):
            self.received(*message)
        else:  # not our language
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self.lost()


def nonce() -> bytes:
    return secrets.token_bytes(16)


def proof(secret: bytes, challenge: bytes, side: str) -> bytes:
    """That `side` knows the secret; the name keeps one side from answering with what it was sent."""
    return hmac.digest(secret, side.encode() + challenge, "sha256")


def proves(given: Any, secret: bytes, challenge: bytes, side: str) -> bool:
    return isinstance(given, bytes) and hmac.compare_digest(given, proof(secret, challenge, side))


# -- requests and events as plain values -----------------------------------------------------------------------------


def pack_request(request: Request) -> dict[str, Any]:
    sampling = {
        name: value for name, default in _DEFAULTS.items() if (value := getattr(request.sampling, name)) != default
    }
    rest = {name: getattr(request, name) for name in _REQUEST}
    return {"prompt": list(request.prompt), "sampling": sampling, **rest, "resumed": list(request.resumed)}


def unpack_request(packed: dict[str, Any]) -> Request:
    return Request(**{**packed, "sampling": Sampling(**packed["sampling"])})


def pack_events(events: Iterable[tuple[int, Event]]) -> list[tuple]:
    """(tag of the request, event) as one flat tuple each."""
    packed = []
    for tag, event in events:
        told, prompt, error = event.logprobs, event.prompt_logprobs, event.error
        packed.append(
            (
                tag,
                None if told is None else (told.token, told.top),
                None if prompt is None else [(one.token, one.top) for one in prompt],
                None if error is None else f"{type(error).__name__}: {error}",
                *[getattr(event, name) for name in _EVENT],
            )
        )
    return packed


def unpack_event(packed: tuple) -> Event:
    """Its id is the tag."""
    tag, told, prompt, error, *rest = packed
    return Event(
        id=tag,
        logprobs=None if told is None else Logprobs(*told),
        prompt_logprobs=None if prompt is None else [Logprobs(*one) for one in prompt],
        error=None if error is None else Broken(error),
        **dict(zip(_EVENT, rest)),
    )


def _unpacker(most: int) -> msgpack.Unpacker:
    return msgpack.Unpacker(use_list=False, strict_map_key=False, max_buffer_size=most)
