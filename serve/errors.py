"""Errors as answers: every one has OpenAI's shape, and its message is one line."""

from typing import Any

from fastapi.responses import JSONResponse

from serve.schema import SHAPES, ChatCompletion, Completion, Message
from serve.worker import Busy, Failed

RETRY_SECONDS = 1  # after which an overloaded server is asked again
_TYPES = {401: "authentication_error", 403: "authentication_error", 429: "rate_limit_error"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": str(RETRY_SECONDS)}}
_OWN = ("extra_forbidden", "value_error")  # complaints that say more than the shape of the field
_FIELDS = {name for body in (Completion, ChatCompletion) for name in (*body.model_fields, *body.neutral)}


class APIError(Exception):
    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def json(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": Message(message=self.message, type=kind, param=self.param, code=self.code).model_dump()}

    def response(self) -> JSONResponse:
        return JSONResponse(self.json(), self.status, _HEADERS.get(self.status))


def translate(error: Exception) -> APIError:
    """Of ValueError, whose message begins with the name of a field, Busy and Failed."""
    if isinstance(error, Busy):
        return APIError(429, str(error), code="too_many_requests")
    if isinstance(error, Failed):
        return APIError(503, str(error), code="engine_failed")
    message = str(error)
    name = message.partition(":")[0].partition(" ")[0].partition("=")[0]
    return APIError(400, message, name if name in _FIELDS else None)


def invalid(error: dict[str, Any]) -> APIError:
    """Pydantic's first complaint in one line."""
    if error["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {error['ctx']['error']}")
    message = error["msg"].removeprefix("Value error, ")
    place = [part for part in error["loc"] if part != "body"]
    if not place:
        return translate(ValueError(message))
    name, field = str(place[0]), str(place[0])
    if name == "messages" and len(place) > 2:
        field = str(place[2])
        name = f"messages[{place[1]}].{field}"
    elif name == "messages" and error["type"] == "value_error":  # of a message as a whole; it begins with the field
        return APIError(400, f"messages[{place[1]}].{message}", name)
    own = message[0].lower() + message[1:]
    return APIError(400, f"{name}: {own if error['type'] in _OWN else SHAPES.get(field, own)}", str(place[0]))
