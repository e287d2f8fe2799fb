"""What the fields of all request bodies share: how strict they are, their types, and what is said of wrong ones.

A field that OpenAI has and this server has not is accepted with its neutral values only, so that no client gets
something else than it asked for. Anything unknown is an error. null means the default.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

PROMPTS, STOPS, BIASES, TOOLS = 2048, 16, 1024, 128  # at most
SHAPES = {  # of fields with several types, whose own messages would name only one of them
    "prompt": f"must be a text, a list of texts, a list of token ids, or a list of such lists, at most {PROMPTS}",
    "input": f"must be a text, a list of texts, a list of token ids, or a list of such lists, at most {PROMPTS}",
    "stop": f"must be a text or a list of at most {STOPS} texts, none of them empty",
    "messages": "must be a list of at least one message, each with a role and a content",
    "role": "must be system, developer, user, assistant or tool",
    "content": 'must be a text, or a list of parts {"type": "text", "text": ...}',
    "response_format": 'must be {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": '
    '{"name": ..., "schema": {...}}}',
    "tool_choice": 'must be none, auto, required or {"type": "function", "function": {"name": ...}}',
    "structured_outputs": "must have exactly one of json, regex, choice, grammar and json_object",
}
HALF = "must be Unicode text, and there is half a character (a lone surrogate) in it"
FIRST = Field(fail_fast=True)  # of a list: one complaint is told, so the first is enough; a million take seconds
SOME = Field(fail_fast=True, min_length=1)
FEW = Field(fail_fast=True, min_length=1, max_length=PROMPTS)
Id = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Id], SOME]
Texts = str | Ids | Annotated[list[str], FEW] | Annotated[list[Ids], FEW]
Whole = Annotated[
    int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value % 1 == 0 else value)
]
Word = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """Nothing unknown, nothing converted; null is as if it were left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    neutral: ClassVar[dict[str, tuple]] = {}  # what of OpenAI's is not offered, and the values that ask for nothing

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        body = {key: value for key, value in body.items() if value is not None}
        known = {field.alias or name for name, field in cls.model_fields.items()} | cls.neutral.keys()
        unknown = next((key for key in body if key not in known), None)
        if unknown is not None:  # one is told; a hundred thousand would take seconds
            return {unknown: body[unknown], **{key: value for key, value in body.items() if key in known}}
        if isinstance(body.get("logit_bias"), dict) and len(body["logit_bias"]) > BIASES:
            raise ValueError(f"logit_bias: at most {BIASES} tokens are allowed")
        for key, values in cls.neutral.items():
            if key in body and body.pop(key) not in values:
                raise ValueError(f"{key}: not supported by this server; leave it out")
        return body

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        own = handler.resolve_ref_schema(schema)
        required = own.get("required", ())
        properties = own.setdefault("properties", {})
        for name, field in properties.items():
            if name not in required:
                field.pop("default", None)
                properties[name] = {"anyOf": [field, {"type": "null"}]}
        properties.update({name: {"enum": [*values, None]} for name, values in cls.neutral.items()})
        return schema


def split(name: str, texts: str | list) -> list[str | list[int]]:
    """One by one."""
    each = [texts] if isinstance(texts, str) or isinstance(texts[0], int) else list(texts)
    check_unicode(name, *(text for text in each if isinstance(text, str)))
    return each


def check_unicode(name: str, *texts: str) -> None:
    """ValueError for half a character: JSON can spell one (\\ud800), and no encoding of it exists."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: {HALF}") from None
