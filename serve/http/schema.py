"""What the endpoints take: OpenAI's fields, and beside them those that vLLM's clients know, such as `top_k`, `min_p`,
`repetition_penalty`, `min_tokens`, `stop_token_ids`, `ignore_eos`, `structured_outputs` and `priority`.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from serve.http.fields import (
    BIASES,
    FIRST,
    SHAPES,
    STOPS,
    TOOLS,
    Id,
    Strict,
    Texts,
    Whole,
    Word,
    check_unicode,
    split,
)
from serve.http.messages import Choice, Tool, Turn
from serve.sampler import MOST_LOGPROBS


class StreamOptions(Strict):
    neutral: ClassVar[dict[str, tuple]] = {"include_obfuscation": (False,)}
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JSONSchema(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str = ""
    schema_: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    strict: bool = True  # answers follow the schema in any case


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _together(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(f"response_format: {SHAPES['response_format']}")
        return self


class StructuredOutputs(Strict):
    """vLLM's way to ask for more kinds of grammars. grammar: in llguidance's dialect of Lark."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], FIRST] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        if len(self.model_fields_set) != 1 or self.json_object is False:
            raise ValueError(f"structured_outputs: {SHAPES['structured_outputs']}")
        check_unicode("structured_outputs", self.regex or "", self.grammar or "", *(self.choice or ()))
        return self


class Body(Strict):
    """The fields that both endpoints have."""

    neutral: ClassVar[dict[str, tuple]] = {"store": (False,), "metadata": ({},)}

    model: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Whole = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    n: Whole = Field(1, ge=1, le=128)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**64)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=BIASES
    )
    min_tokens: Whole = Field(0, ge=0)
    stop: Word | Annotated[list[Word], Field(fail_fast=True, max_length=STOPS)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[Id], FIRST] = Field(default_factory=list, max_length=STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    ignore_eos: bool = False
    priority: Whole = Field(0, ge=-(2**31), lt=2**31)
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def _object(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        return body

    @model_validator(mode="after")
    def _together(self) -> "Body":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: allowed only with stream=true")
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        check_unicode("stop", *self.stop)
        check_unicode("user", self.user)
        if self.structured_outputs is not None and self.json_asked:
            raise ValueError("structured_outputs: response_format says the same; give one of them")
        return self

    @property
    def json_asked(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"


class Completion(Body):
    """A request body of POST /v1/completions."""

    neutral: ClassVar[dict[str, tuple]] = {**Body.neutral, "suffix": ("",)}

    prompt: Texts
    max_tokens: Whole = Field(16, ge=0)
    echo: bool = False
    logprobs: Whole | None = Field(None, ge=0, le=5)
    best_of: Whole | None = None

    @model_validator(mode="after")
    def _prompt(self) -> "Completion":
        split("prompt", self.prompt)
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: not supported by this server; leave it out")
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens: must be at least 1, or 0 with echo=true")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: must be at most max_tokens={self.max_tokens}")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, texts or token ids."""
        return split("prompt", self.prompt)


class ChatCompletion(Body):
    """A request body of POST /v1/chat/completions. Without max_tokens a turn is as long as there is room."""

    neutral: ClassVar[dict[str, tuple]] = {
        **Body.neutral,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
    }

    messages: Annotated[list[Turn], FIRST] = Field(min_length=1)
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Whole | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: Annotated[list[Tool], FIRST] = Field(default_factory=list, max_length=TOOLS)
    tool_choice: Literal["none", "auto", "required"] | Choice = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _chat(self) -> "ChatCompletion":
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens: an older name of max_completion_tokens; give one of them")
            self.max_tokens = self.max_completion_tokens
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: must be at most max_tokens={self.max_tokens}")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: allowed only with logprobs=true")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        if isinstance(self.tool_choice, Choice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: there is no tool {self.tool_choice.function.name!r}")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice: required, and there are no tools")
        if self.enforced and (self.json_asked or self.structured_outputs):
            raise ValueError("tool_choice: a call is required, so the answer cannot have another form besides")
        return self

    @property
    def enforced(self) -> list[Tool]:
        """Tools of which one must be called; none when there is no must."""
        if isinstance(self.tool_choice, Choice):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []


class Embedding(Strict):
    """A request body of POST /v1/embeddings."""

    neutral: ClassVar[dict[str, tuple]] = {"dimensions": ()}

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    user: str = ""

    @model_validator(mode="after")
    def _input(self) -> "Embedding":
        split("input", self.input)
        return self

    def prompts(self) -> list[str | list[int]]:
        return split("input", self.input)


class Tokenization(Strict):
    """A request body of POST /tokenize, of a prompt or of a chat, as vLLM has it."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[Turn], FIRST] | None = Field(None, min_length=1)
    tools: Annotated[list[Tool], FIRST] = Field(default_factory=list, max_length=TOOLS)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> "Tokenization":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give it or messages")
        check_unicode("prompt", self.prompt or "")
        return self


class Detokenization(Strict):
    """A request body of POST /detokenize."""

    model: str
    tokens: Annotated[list[Id], FIRST]
