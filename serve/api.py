"""OpenAI's HTTP API over one engine: GET /v1/models, POST /v1/completions (whole or as server-sent events), /health.

`create_app(service)` is a plain ASGI application; Ray Serve runs it in `serve.app`. Every error has OpenAI's shape.
With keys, all but /health asks for one of them; without, only clients on this machine are served.
"""

import hmac
import ipaddress
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.engine import Request
from serve.sampler import Sampling
from serve.schema import NEUTRAL, SHAPES, Completion, Message
from serve.worker import Busy, Failed, Worker

_TYPES = {401: "authentication_error", 403: "authentication_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Service:
    """What the routes need. name: of the model. keys: API keys, none of them means this machine only."""

    worker: Worker
    name: str
    keys: Sequence[str] = ()
    created: int = field(default_factory=lambda: int(time.time()))


class APIError(Exception):
    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> JSONResponse:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = Message(message=self.message, type=kind, param=self.param, code=self.code)
        return JSONResponse({"error": error.model_dump()}, self.status)


def create_app(service: Service) -> FastAPI:
    """The application for one model."""
    app = FastAPI(title="Edifice", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, keys=service.keys)

    @app.exception_handler(APIError)
    async def refused(_: HTTPRequest, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def unknown_route(request: HTTPRequest, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return APIError(error.status_code, message, code="not_found" if error.status_code == 404 else None).response()

    @app.exception_handler(RequestValidationError)
    async def malformed(_: HTTPRequest, error: RequestValidationError) -> Response:
        return _invalid(error.errors()[0]).response()

    @app.get("/health")
    async def health() -> dict[str, str]:
        _check(service.worker)
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_name(service, name)
        return _card(service)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: Completion) -> Response:
        _check_name(service, body.model)
        job = _Job(service, body)
        if not body.stream:
            return JSONResponse(await job.whole())
        return StreamingResponse(job.chunks(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    return app


class _Job:
    """One call of the completions endpoint. Raises APIError at once when it can't be answered."""

    def __init__(self, service: Service, body: Completion) -> None:
        self.worker, self.body = service.worker, body
        engine = service.worker.engine
        try:
            prompts = [engine.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts()]
            self.requests = [Request(prompt, self._sampling(index)) for prompt in prompts for index in range(body.n)]
            service.worker.admit(self.requests)
        except (ValueError, Busy, Failed) as error:
            raise _translate(error) from error
        self.echoes = [""] * len(self.requests)
        if body.echo:
            texts = [p if isinstance(p, str) else _decode(engine.tokenizer, p) for p in body.prompts()]
            self.echoes = [text for text in texts for _ in range(body.n)]
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.completion_tokens = 0
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    def _sampling(self, index: int) -> Sampling:
        body = self.body
        return Sampling(
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            seed=None if body.seed is None else (body.seed + index) % 2**64,
            stop=tuple(body.stop),
            ignore_eos=body.ignore_eos,
        )

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    async def whole(self) -> dict[str, Any]:
        texts, reasons = list(self.echoes), [None] * len(self.requests)
        try:
            async with aclosing(self.worker.stream(self.requests)) as events:
                async for index, event in events:
                    self.completion_tokens += event.token is not None
                    texts[index] += event.text
                    reasons[index] = event.reason
        except (ValueError, Busy, Failed) as error:
            raise _translate(error) from error
        choices = [_choice(index, text, reason) for index, (text, reason) in enumerate(zip(texts, reasons))]
        return {**self.head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[str]:
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = {**self.head, "usage": None} if with_usage else self.head
        try:
            for index, text in enumerate(self.echoes):
                if text:
                    yield _sse({**head, "choices": [_choice(index, text, None)]})
            async with aclosing(self.worker.stream(self.requests)) as events:
                async for index, event in events:
                    self.completion_tokens += event.token is not None
                    if event.text or event.reason:
                        yield _sse({**head, "choices": [_choice(index, event.text, event.reason)]})
        except (ValueError, Busy, Failed) as error:  # too late for a status
            yield f"data: {_translate(error).response().body.decode()}\n\n"
            return
        if with_usage:
            yield _sse({**head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"


class Guard:
    """ASGI middleware: who may come in."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            return await self.app(scope, receive, send)
        refusal = self._refusal(scope)
        await (self.app if refusal is None else refusal.response())(scope, receive, send)

    def _refusal(self, scope: Scope) -> APIError | None:
        if not self.keys:
            if _is_loopback(scope.get("client")):
                return None
            return APIError(401, "this server has no API keys (EDIFICE_API_KEYS), so it serves its own machine only")
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        if kind.lower() == b"bearer" and any([hmac.compare_digest(key.strip(), known) for known in self.keys]):
            return None
        return APIError(
            401, "send one of this server's API keys as 'Authorization: Bearer KEY'", code="invalid_api_key"
        )


def _is_loopback(client: Sequence | None) -> bool:
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def _check(worker: Worker) -> None:
    try:
        worker.check()
    except Failed as error:
        raise _translate(error) from error


def _check_name(service: Service, name: str) -> None:
    if name != service.name:
        message = f"the model {name!r} does not exist; this server has {service.name!r}"
        raise APIError(404, message, "model", "model_not_found")


def _card(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "edifice"}


def _translate(error: Exception) -> APIError:
    if isinstance(error, Busy):
        return APIError(429, str(error), code="too_many_requests")
    if isinstance(error, Failed):
        return APIError(503, str(error), code="engine_failed")
    message = str(error)
    name = message.partition(":")[0].partition(" ")[0].partition("=")[0]
    return APIError(400, message, name if name in Completion.model_fields or name in NEUTRAL else None)


def _invalid(error: dict[str, Any]) -> APIError:
    """Pydantic's first complaint in one line."""
    message = error["msg"].removeprefix("Value error, ")
    place = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {error['ctx']['error']}")
    if place and place[0] in SHAPES:
        return APIError(400, f"{place[0]}: {SHAPES[place[0]]}", place[0])
    if place:
        return APIError(400, f"{place[0]}: {message[0].lower()}{message[1:]}", place[0])
    return _translate(ValueError(message))


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    if tokenizer is None:
        raise APIError(400, "echo: the model has no tokenizer, so there is no text to repeat", "echo")
    return tokenizer.decode(tokens)


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _sse(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
