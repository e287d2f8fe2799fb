"""OpenAI's HTTP API over the models of a service: completions and chat completions (whole or as server-sent events),
embeddings, models, tokens, and beside it /health, /ready, /version and /metrics.

`create_app(service)` is a plain ASGI application; Ray Serve runs it in `serve.replicas.gateway`. Every error has
OpenAI's shape. Who may come in is told in `serve.http.keys`, how much one may send in `serve.http.limits`. What the API
is, is told at /openapi.json.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException

from serve.http import pages, predictions, tokens
from serve.http.answers import Answer, Reply
from serve.http.chats import ChatAnswer
from serve.http.clients import while_there
from serve.http.completions import CompletionAnswer
from serve.http.embeddings import embed
from serve.http.errors import APIError, invalid, translate
from serve.http.flow import Flow
from serve.http.keys import Guard, Keys
from serve.http.limits import Limit
from serve.http.metrics import exposition
from serve.http.openapi import describe
from serve.http.replies import (
    ChatReply,
    CompletionReply,
    EmbeddingReply,
    ModelCard,
    ModelList,
    PredictorCard,
    Status,
    Text,
    Tokens,
    Version,
    errors,
)
from serve.http.schema import ChatCompletion, Completion, Detokenization, Embedding, Tokenization
from serve.http.served import Served, Service
from serve.worker import Failed

__all__ = ["Served", "Service", "create_app"]

STREAM = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
WORK = errors(400, 401, 404, 408, 413, 429, 500, 503)  # of a route that computes
OPEN = ("/health", "/ready", "/ping")


def create_app(service: Service) -> FastAPI:
    """The application over the models of `service`."""
    app = FastAPI(title="Edifice", version=_version(), docs_url=None, redoc_url=None, responses=errors(401, 500))
    app.add_middleware(Limit, limits=service.limits)
    app.add_middleware(Guard, keys=Keys(service.keys), is_open=_is_open)  # the last one added comes first
    flow = Flow()

    @app.exception_handler(APIError)
    async def refused(_: HTTPRequest, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def unknown_route(request: HTTPRequest, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == 400:
            message = "the body is not JSON: it is not UTF-8, or nested too deeply"
        refusal = APIError(error.status_code, message, code="not_found" if error.status_code == 404 else None)
        response = refusal.response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def malformed(_: HTTPRequest, error: RequestValidationError) -> Response:
        return invalid(error.errors()).response()

    @app.exception_handler(Exception)
    async def unexpected(_: HTTPRequest, error: Exception) -> Response:
        """What went wrong is in the log: it is raised again behind this answer."""
        return APIError(500, "the server failed on this request; its log says why").response()

    async def respond(answer: Answer) -> Response:
        await answer.open()
        return Reply(answer, flow)

    @app.get("/health", responses=errors(503))
    @app.get("/ping", responses=errors(503))
    async def health() -> Status:
        """The process answers, and no engine of it is broken."""
        try:
            for served in list(service.models.values()):
                served.backend.check()
        except Failed as error:
            raise translate(error) from error
        return Status(status="ok")

    @app.get("/ready", responses=errors(503))
    async def ready() -> Status:
        """There is a model, and requests for any would be answered now."""
        if not service.models:
            raise APIError(503, "there is no model yet", code="not_ready")
        return await health()

    @app.get("/version")
    async def versions() -> Version:
        return Version(version=_version())

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def numbers() -> Response:
        models = [served.metrics for served in service.models.values()]
        return Response(exposition(models), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.get("/v1/models")
    async def models() -> ModelList:
        predicting = [PredictorCard(**predictions.card(name, each)) for name, each in service.predictors.items()]
        return ModelList(object="list", data=[*service.cards().values(), *predicting])

    @app.get("/v1/models/{name:path}", responses=errors(404))
    async def model(name: str) -> ModelCard | PredictorCard:
        if name in service.predictors:
            return PredictorCard(**predictions.card(name, service.predictors[name]))
        return service.cards().get(name) or _unknown(service, name)

    @app.post("/v1/completions", response_model=CompletionReply, responses={**WORK, **STREAM})
    async def completions(body: Completion) -> Response:
        return await respond(CompletionAnswer(await _find(service, body.model), body, service.limits))

    @app.post("/v1/chat/completions", response_model=ChatReply, responses={**WORK, **STREAM})
    async def chat_completions(body: ChatCompletion) -> Response:
        return await respond(ChatAnswer(await _find(service, body.model), body, service.limits))

    @app.post("/v1/embeddings", response_model=EmbeddingReply, responses=WORK)
    async def embeddings(request: HTTPRequest, body: Embedding) -> Response:
        return JSONResponse(
            await while_there(request.receive, embed(await _find(service, body.model), body, service.limits))
        )

    @app.post("/tokenize", responses=WORK)
    async def tokenize(body: Tokenization) -> Tokens:
        return await tokens.tokenize(await _find(service, body.model), body)

    @app.post("/detokenize", responses=WORK)
    async def detokenize(body: Detokenization) -> Text:
        return await tokens.detokenize(await _find(service, body.model), body)

    app.include_router(pages.routes(service))
    app.include_router(predictions.routes(service.predictors, WORK))
    describe(app, service)
    return app


async def _find(service: Service, name: str) -> Served:
    if name not in service.models and service.shelf is not None:
        await service.shelf.bring(name)
    return service.models.get(name) or _unknown(service, name)


def _unknown(service: Service, name: str) -> NoReturn:
    known = ", ".join(map(repr, service.cards())) or "none"
    raise APIError(404, f"the model {name!r} does not exist; this server has {known}", "model", "model_not_found")


def _is_open(path: str) -> bool:
    return path in OPEN or pages.is_open(path)


def _version() -> str:
    try:
        return version("edifice")
    except PackageNotFoundError:  # run from a checkout, as Ray does
        return "0"
