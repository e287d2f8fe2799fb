"""Errors as answers: every one has OpenAI's shape, and its message is one line."""

from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse

from serve.grammar import GrammarError
from serve.http.fields import HALF, SHAPES
from serve.http.schema import ChatCompletion, Completion, Detokenization, Embedding, Tokenization
from serve.worker import Busy, Failed

RETRY_SECONDS = 1  # after which an overloaded server is asked again
_TYPES = {401: "authentication_error", 403: "authentication_error", 429: "rate_limit_error"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": str(RETRY_SECONDS)}}
_OWN = ("extra_forbidden", "value_error")  # complaints that say more than the shape of the field
_DEEP = ("messages", "tools")  # whose parts are told apart
_ROLES = ("system", "developer", "user", "assistant", "tool")  # by which messages are told apart in a place
_BODIES = (Completion, ChatCompletion, Embedding, Tokenization, Detokenization)
_FIELDS = {name for body in _BODIES for name in (*body.model_fields, *body.neutral)}


class APIError(Exception):
    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def json(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

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


def broken(error: Exception) -> APIError:
    """Of what ended a single completion."""
    kind = GrammarError.__name__
    if isinstance(error, GrammarError) or str(error).startswith(kind):  # from another process it comes in words
        reason = str(error).removeprefix(f"{kind}: ")
        return APIError(400, f"response_format: {reason}", "response_format", "grammar_too_complex")
    message = f"a completion broke: {type(error).__name__}: {error}"
    failure = APIError(500, " ".join(message.split()), code="completion_failed")
    failure.__cause__ = error
    return failure


def invalid(errors: Sequence[dict[str, Any]]) -> APIError:
    """Pydantic's first complaint in one line, but half a character rather than that it is no text."""
    error = next((each for each in errors if each["type"] == "string_unicode"), errors[0])
    if error["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {error['ctx']['error']}")
    message = error["msg"].removeprefix("Value error, ")
    place = [part for part in error["loc"] if part != "body"]
    if not place:
        return translate(ValueError(message))
    top = str(place[0])
    path, field = top, top
    if error["type"] == "union_tag_invalid" or error["type"] == "union_tag_not_found":
        place, error = [*place, "role"], {**error, "type": "literal_error"}
    for part in [part for part in place[1:] if part not in _ROLES] if top in _DEEP else ():
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
        field = str(part)
        if field in SHAPES:  # what follows is which of its types was tried
            break
    if error["type"] == "value_error" and path != top:  # of a message as a whole; it begins with the field
        return APIError(400, f"{path}.{message}", top)
    if error["type"] == "string_unicode":
        return APIError(400, f"{path}: {HALF}", top)
    own = message[0].lower() + message[1:]
    shown = own if error["type"] in _OWN else SHAPES.get(field, own)
    return APIError(400, shown if shown.startswith(f"{path}: ") else f"{path}: {shown}", top)
