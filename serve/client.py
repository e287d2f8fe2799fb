"""The HTTP API from the other side, with nothing but the standard library: JSON, and server-sent events."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would hold streams back


class ServerError(Exception):
    """What the server refused or why it can't be reached, in one line."""


class Client:
    """url: of a server, without /v1. key: sent with every request when there is one."""

    def __init__(self, url: str, key: str = "", timeout: float = 120.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key, self.timeout = key, timeout

    def get(self, path: str) -> Any:
        with self._open(path) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        with self._open(path, json.dumps(body).encode()) as response:
            return json.load(response)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of an answer. The connection is closed, so the server stops, when this is left early."""
        with self._open(path, json.dumps(body).encode()) as response:
            try:
                for line in response:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ServerError(chunk["error"]["message"])
                    yield chunk
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(f"the connection was lost: {error or type(error).__name__}") from None
        raise ServerError("the stream broke off")

    def models(self) -> list[str]:
        return [each["id"] for each in self.get("/v1/models")["data"]]

    def choose(self, name: str) -> str:
        """`name` when the server has it, its first model for an empty one. ServerError names what there is."""
        known = self.models()
        if name in known or (not name and known):
            return name or known[0]
        raise ServerError(f"the server has no model {name!r}; it has {', '.join(known) or 'none'}")

    def chats(self, model: str) -> bool:
        """Whether `model` has a chat template. Other servers do not tell, and then it is taken to have one."""
        try:
            return self.get("/stats")["models"][model]["chat"]
        except (ServerError, KeyError, TypeError, ValueError):
            return True

    def _open(self, path: str, body: bytes | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            request = urllib.request.Request(self.url + path, body, headers)
            return _OPENER.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise ServerError(_message(error)) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(f"no server answers at {self.url}: {reason}; --url names another") from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server says {error.code} {error.reason}"
