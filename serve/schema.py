"""What the endpoints take: OpenAI's fields, and `top_k` and `ignore_eos` besides.

A field that OpenAI has and this server has not is accepted with its neutral values only, so that no client gets
something else than it asked for. Anything unknown is an error. null means the default.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.sampler import MOST_LOGPROBS

STOPS = 16
SHAPES = {  # of fields with several types, whose own messages would name only one of them
    "prompt": "must be a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": f"must be a text or a list of at most {STOPS} texts",
    "messages": "must be a list of at least one message, each with a role and a content",
    "role": "must be system, developer, user or assistant; tools are not supported by this server",
    "content": 'must be a text, or a list of parts {"type": "text", "text": ...}',
}
FIRST = Field(fail_fast=True)  # of a list: one complaint is told, so the first is enough; a million take seconds


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Body(BaseModel):
    """The fields that both endpoints have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple]] = {"logit_bias": ({},), "store": (False,), "metadata": ({},)}

    model: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    stop: str | Annotated[list[str], FIRST] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, body: Any) -> Any:
        """Drops null, and neutral values of what is not offered."""
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        body = {key: value for key, value in body.items() if value is not None}
        for key, values in cls.neutral.items():
            if key in body and body.pop(key) not in values:
                raise ValueError(f"{key}: not supported by this server; leave it out")
        return body

    @model_validator(mode="after")
    def _together(self) -> "Body":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: allowed only with stream=true")
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if not all(self.stop) or len(self.stop) > STOPS:
            raise ValueError(f"stop: {SHAPES['stop']}, none of them empty")
        check_unicode("stop", *self.stop)
        check_unicode("user", self.user)
        return self


class Completion(Body):
    """A request body of POST /v1/completions."""

    neutral: ClassVar[dict[str, tuple]] = {**Body.neutral, "suffix": ("",)}

    prompt: (
        str
        | Annotated[list[int], FIRST]
        | Annotated[list[str], FIRST]
        | Annotated[list[Annotated[list[int], FIRST]], FIRST]
    )
    max_tokens: int = Field(16, ge=1)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = None

    @model_validator(mode="after")
    def _prompt(self) -> "Completion":
        if isinstance(self.prompt, list) and not all([self.prompt, *(p != [] for p in self.prompt)]):
            raise ValueError(f"prompt: {SHAPES['prompt']}, none of them empty")
        check_unicode("prompt", *(prompt for prompt in self.prompts() if isinstance(prompt, str)))
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: not supported by this server; leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs: not supported together with echo, as those of a prompt are not computed")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, texts or token ids."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else list(self.prompt)


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], FIRST]

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, turn: Any) -> Any:
        """Drops null, of which OpenAI's answers have many, and an answer may be sent back."""
        return {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else turn

    @model_validator(mode="after")
    def _content(self) -> "Turn":
        check_unicode("content", self.plain()["content"])
        return self

    def plain(self) -> dict[str, str]:
        """As templates know it: developer is a newer name of system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCompletion(Body):
    """A request body of POST /v1/chat/completions. Without max_tokens a turn is as long as there is room."""

    neutral: ClassVar[dict[str, tuple]] = {
        **Body.neutral,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
    }

    messages: Annotated[list[Turn], FIRST] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _chat(self) -> "ChatCompletion":
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens: an older name of max_completion_tokens; give one of them")
            self.max_tokens = self.max_completion_tokens
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: allowed only with logprobs=true")
        return self


def check_unicode(name: str, *texts: str) -> None:
    """ValueError for half a character: JSON can spell one (\\ud800), and no encoding of it exists."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name}: must be Unicode text, and there is half a character (a lone surrogate) in it"
        ) from None


class Message(BaseModel):
    """An error as OpenAI's clients expect it."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None = None
    code: str | None = None
