"""OpenAI's HTTP API over one engine: models, completions and chat completions (whole or as server-sent events), and
beside it /health and /metrics.

`create_app(service)` is a plain ASGI application; Ray Serve runs it in `serve.app`. Every error has OpenAI's shape.
With keys, all but /health asks for one of them; without, only clients on this machine are served. A body is taken in
up to MOST_BYTES, whoever sends it.
"""

import hmac
import ipaddress
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.answers import Answer, ChatAnswer, CompletionAnswer, Service, Stream
from serve.errors import APIError, invalid, translate
from serve.logprobs import Speller
from serve.metrics import Metrics
from serve.schema import ChatCompletion, Completion
from serve.worker import Failed

__all__ = ["Service", "create_app"]

MOST_BYTES = 8 * 2**20  # of a body: hundreds of prompts of thousands of tokens


def create_app(service: Service) -> FastAPI:
    """The application for one model."""
    app = FastAPI(title="Edifice", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Limit, most=MOST_BYTES)
    app.add_middleware(Guard, keys=service.keys)  # the last one added comes first
    metrics = Metrics(service.worker, service.name, service.replica)
    speller = Speller(service.worker.engine.tokenizer)

    @app.exception_handler(APIError)
    async def refused(_: HTTPRequest, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def unknown_route(request: HTTPRequest, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return APIError(error.status_code, message, code="not_found" if error.status_code == 404 else None).response()

    @app.exception_handler(RequestValidationError)
    async def malformed(_: HTTPRequest, error: RequestValidationError) -> Response:
        metrics.count("invalid")
        return invalid(error.errors()[0]).response()

    @app.exception_handler(Exception)
    async def unexpected(_: HTTPRequest, error: Exception) -> Response:
        """What went wrong is in the log: it is raised again behind this answer."""
        return APIError(500, "the server failed on this request; its log says why").response()

    @app.get("/health")
    async def health() -> dict[str, str]:
        try:
            service.worker.check()
        except Failed as error:
            raise translate(error) from error
        return {"status": "ok"}

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

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
        return await _respond(CompletionAnswer(service, metrics, speller, body))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletion) -> Response:
        _check_name(service, body.model)
        return await _respond(ChatAnswer(service, metrics, speller, body))

    return app


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


class Limit:
    """ASGI middleware: how much one may send. Counted as it comes, for a client need not tell beforehand."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                raise HTTPException(413, f"the body has more than the {self.most} bytes that are allowed")
            return message

        await self.app(scope, counted, send)


async def _respond(answer: Answer) -> Response:
    await answer.open()
    return Stream(answer) if answer.body.stream else JSONResponse(await answer.whole())


def _is_loopback(client: Sequence | None) -> bool:
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def _check_name(service: Service, name: str) -> None:
    if name != service.name:
        message = f"the model {name!r} does not exist; this server has {service.name!r}"
        raise APIError(404, message, "model", "model_not_found")


def _card(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "edifice"}
