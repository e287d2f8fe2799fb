"""What chats are made of: messages of each role, and tools that may be called."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from serve.http.fields import FIRST, SHAPES, TOOLS, Strict, check_unicode


class Part(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: str
    arguments: str  # JSON


class ToolCall(Strict):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


Content = str | Annotated[list[Part], FIRST]


class Said(Strict):
    """A message of the one who asks."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = None

    @model_validator(mode="after")
    def _unicode(self) -> "Said":
        check_unicode("content", plain(self.content), self.name or "")
        return self


class Answered(Strict):
    """A message of the assistant, as an answer has it."""

    neutral: ClassVar[dict[str, tuple]] = {"refusal": (), "annotations": ([],), "audio": (), "function_call": ()}

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FIRST] | None = Field(None, max_length=TOOLS)

    @model_validator(mode="after")
    def _something(self) -> "Answered":
        if self.content is None and not self.tool_calls:
            raise ValueError(f"content: {SHAPES['content']}")
        calls = [
            text for call in self.tool_calls or () for text in (call.id, call.function.name, call.function.arguments)
        ]
        check_unicode("content", plain(self.content), self.name or "", *calls)
        return self


class Result(Strict):
    """What a tool gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str

    @model_validator(mode="after")
    def _unicode(self) -> "Result":
        check_unicode("content", plain(self.content), self.tool_call_id)
        return self


Turn = Annotated[Said | Answered | Result, Field(discriminator="role")]


def plain(content: str | list[Part] | None) -> str:
    """The text of a message."""
    return "".join(part.text for part in content) if isinstance(content, list) else content or ""


class Function(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False  # calls that are enforced follow the parameters in any case


class Tool(Strict):
    type: Literal["function"]
    function: Function


class Named(Strict):
    name: str


class Choice(Strict):
    """A tool that must be called."""

    type: Literal["function"]
    function: Named
