"""The shapes of answers, for the description of the API at /openapi.json."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Message(Shape):
    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(Shape):
    """An error as OpenAI's clients expect it."""

    error: Message


class Status(Shape):
    status: Literal["ok"]


class Version(Shape):
    version: str


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int

    @classmethod
    def of(cls, name: str, created: int, longest: int) -> "ModelCard":
        return cls(id=name, object="model", created=created, owned_by="edifice", max_model_len=longest)


class PredictorCard(Shape):
    """A model that takes whole inputs at /predict."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    predict: str
    inputs: dict[str, Any]


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard | PredictorCard]


class CachedTokens(Shape):
    cached_tokens: int


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float | None]  # nothing predicts the first token of a prompt
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "deadline"]


class CompletionReply(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenLogprob(Shape):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Shape):
    content: list[ChatLogprob]
    refusal: None


class CalledFunction(Shape):
    name: str
    arguments: str


class Call(Shape):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Shape):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call] = []


class ChatChoice(Shape):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "deadline"]


class ChatReply(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class EmbeddingUsage(Shape):
    prompt_tokens: int
    total_tokens: int


class EmbeddingVector(Shape):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingReply(Shape):
    object: Literal["list"]
    data: list[EmbeddingVector]
    model: str
    usage: EmbeddingUsage


class Tokens(Shape):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Shape):
    prompt: str


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documentation of error answers."""
    return {status: {"model": Error, "description": _DESCRIPTIONS[status]} for status in statuses}


_DESCRIPTIONS = {
    400: "The request is wrong; the message says what, and what is allowed",
    401: "No API key of this server was sent",
    403: "This key may not do that",
    404: "There is no such model or route",
    405: "The route has other methods",
    408: "The body did not come in time",
    413: "The body is too large",
    429: "Too many requests; try again after Retry-After seconds",
    500: "The server failed on this request",
    503: "The model is not there now",
}
