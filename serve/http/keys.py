"""Who may come in, and how much each may ask for.

With keys, all but a few open paths ask for one of them; without, only clients on this machine are served. A key may
have limits, counted in each gateway by itself: with two gateways a key gets up to twice as much. Requests and tokens a
minute are buckets that fill up steadily, so what was not used within the last minute may be used at once.

A file of keys is TOML; `key` may be given instead of its `sha256`, and what is left out is not limited:

    [[key]]
    name = "alice"
    sha256 = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
    requests_per_minute = 60
    tokens_per_minute = 20000
    concurrent = 4
    priority = 0      # lower comes first
    admin = false     # may load and unload models
"""

import hashlib
import hmac
import ipaddress
import math
import time
import tomllib
from collections.abc import Callable, Sequence
from contextvars import ContextVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.errors import APIError

FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")  # a proxy tells for whom it asks: not for this machine


class Key(BaseModel):
    """One key. sha256: of it, in hex; a table in a file may have `key` instead."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    concurrent: int | None = Field(None, ge=1)
    priority: int = 0
    admin: bool = False

    @model_validator(mode="before")
    @classmethod
    def _hashed(cls, table: dict) -> dict:
        table = dict(table)
        if isinstance(table.get("key"), str) and "sha256" not in table:
            table["sha256"] = digest(table.pop("key").encode())
        return table


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def plain(keys: str) -> list[Key]:
    """Keys without limits, from a list with commas. Their names are the beginnings of their hashes."""
    hashes = [digest(key.strip().encode()) for key in keys.split(",") if key.strip()]
    return [Key(name=f"key-{one[:8]}", sha256=one) for one in hashes]


def read(path: str) -> list[Key]:
    """The keys in a file. ValueError in one line when it is not one."""
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
        keys = [Key.model_validate(table) for table in tables.pop("key")]
        if tables or len({key.name for key in keys}) < len(keys):
            raise ValueError(f"only [[key]] tables are allowed, each with its own name; there is {[*tables] or keys}")
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc'])) or 'key'}: {first['msg']}") from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of [[key]] tables: {' '.join(str(error).split())}") from None
    return keys


class Bucket:
    """So many a minute. Fills up steadily to one minute's worth; debts are possible, and are waited for."""

    def __init__(self, limit: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self._clock = limit, clock
        self._level, self._at = float(limit or 0), clock()

    def level(self) -> float:
        now = self._clock()
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / 60)
        self._at = now
        return self._level

    def take(self, count: float) -> None:
        if self.limit is not None:
            self._level = self.level() - count

    def wait(self, count: float = 1.0) -> float:
        """Seconds until there are `count`."""
        return 0.0 if self.limit is None else max(0.0, (count - self.level()) * 60 / self.limit)


class Caller:
    """Who asks, and what was used of the key's limits."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self.key, self.running = key, 0
        self.requests, self.tokens = Bucket(key.requests_per_minute, clock), Bucket(key.tokens_per_minute, clock)

    def charge(self, tokens: int) -> None:
        """Tokens of prompts and completions that were computed."""
        self.tokens.take(tokens)

    def refusal(self) -> APIError | None:
        key = self.key
        if key.concurrent is not None and self.running >= key.concurrent:
            return _limited(f"{self.running} requests run with this key already, {key.concurrent} are allowed", 1.0)
        if wait := self.requests.wait():
            return _limited(f"{key.requests_per_minute} requests a minute are allowed with this key", wait)
        if wait := self.tokens.wait():
            return _limited(f"{key.tokens_per_minute} tokens a minute are allowed with this key", wait)
        return None

    def headers(self) -> dict[str, str]:
        """As OpenAI tells limits."""
        told = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket.limit is not None:
                told[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                told[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level())))
                told[f"x-ratelimit-reset-{name}"] = f"{bucket.wait(bucket.limit):.3f}s"
        return told


class Keys:
    """All callers there are. A key given as text has no limits."""

    def __init__(self, keys: Sequence[str | Key], clock: Callable[[], float] = time.monotonic) -> None:
        known = [one for key in keys for one in (plain(key) if isinstance(key, str) else [key])]
        self._callers = [Caller(key, clock) for key in known]

    def __bool__(self) -> bool:
        return bool(self._callers)

    def find(self, authorization: str) -> Caller | None:
        """By the Authorization header. Takes as long whatever is given."""
        kind, _, given = authorization.partition(" ")
        known = digest(given.strip().encode()) if kind.lower() == "bearer" else ""
        found = [caller for caller in self._callers if hmac.compare_digest(caller.key.sha256, known)]
        return found[0] if found else None


_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def caller() -> Caller | None:
    """Whose request this is; None on a server without keys."""
    return _caller.get()


class Guard:
    """ASGI middleware: who may come in. is_open: paths that all may ask for."""

    def __init__(self, app: ASGIApp, keys: Keys, is_open: Callable[[str], bool]) -> None:
        self.app, self.keys, self.is_open = app, keys, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.is_open(scope["path"]):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        administers = scope["path"].startswith("/admin")
        if not self.keys and not administers:
            if _is_local(scope, headers):
                return await self.app(scope, receive, send)
            message = "this server has no API keys (EDIFICE_API_KEYS), so it serves its own machine only"
            return await APIError(401, message).response()(scope, receive, send)
        found = self.keys.find(headers.get("authorization", ""))
        if found is None:
            message = "send one of this server's API keys as 'Authorization: Bearer KEY'"
            return await APIError(401, message, code="invalid_api_key").response()(scope, receive, send)
        _caller.set(found)
        if administers and not found.key.admin:
            return await APIError(403, "this key may not administer the server").response()(scope, receive, send)
        if scope["method"] != "POST":  # looking costs nothing
            return await self.app(scope, receive, send)
        await self._limited(found, scope, receive, send)

    async def _limited(self, found: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(found.headers())
            await send(message)

        refusal = found.refusal()
        if refusal is not None:
            response = refusal.response()
            response.headers["Retry-After"] = str(max(1, math.ceil(refusal.wait)))
            return await response(scope, receive, told)
        found.requests.take(1)
        found.running += 1
        try:
            await self.app(scope, receive, told)
        finally:
            found.running -= 1


class _Limited(APIError):
    wait = 1.0


def _limited(message: str, wait: float) -> _Limited:
    error = _Limited(429, f"{message}; try again in {max(1, math.ceil(wait))} s", code="rate_limit_exceeded")
    error.wait = wait
    return error


def _is_local(scope: Scope, headers: Headers) -> bool:
    client = scope.get("client")
    try:
        local = client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
    return local and not any(name in headers for name in FORWARDED)
