"""What the completions endpoint takes: OpenAI's fields, and `top_k` and `ignore_eos` besides.

A field that OpenAI has and this server has not is accepted with its neutral value only, so that no client gets
something else than it asked for. Anything unknown is an error.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "logprobs": None, "suffix": ""}
SHAPES = {  # of fields with several types, whose own messages would name only one of them
    "prompt": "must be a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "must be a text or a list of at most 16 texts",
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Completion(BaseModel):
    """A request body of POST /v1/completions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    ignore_eos: bool = False
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, body: Any) -> Any:
        """Drops null, which means the default, and neutral values of what is not offered."""
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        body = {key: value for key, value in body.items() if value is not None}
        for key, neutral in NEUTRAL.items():
            if key in body:
                if body[key] != neutral:
                    raise ValueError(f"{key}: not supported by this server; leave it out")
                del body[key]
        if "best_of" in body and body.pop("best_of") != body.get("n", 1):
            raise ValueError("best_of: not supported by this server; leave it out")
        return body

    @model_validator(mode="after")
    def _together(self) -> "Completion":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: allowed only with stream=true")
        if isinstance(self.prompt, list) and not all([self.prompt, *(p != [] for p in self.prompt)]):
            raise ValueError(f"prompt: {SHAPES['prompt']}, none of them empty")
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if not all(self.stop) or len(self.stop) > 16:
            raise ValueError(f"stop: {SHAPES['stop']}, none of them empty")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, texts or token ids."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else list(self.prompt)


class Message(BaseModel):
    """An error as OpenAI's clients expect it."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None = None
    code: str | None = None
