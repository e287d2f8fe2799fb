"""Chats as tokens: the model folder's chat template, or the one of our own special tokens.

A template is a Jinja program that comes with the weights, so it runs in a sandbox. What people write is never read as
a special token: where a message spells one, a mark stands for it while the template runs, the rendered text is cut at
the special tokens that the template itself wrote, and only then do the marks become their spelling again, as text.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tokenizers import Tokenizer

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"  # files beside tokenizer.json in a model folder
MARKERS = {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"}  # that DEFAULT writes
DEFAULT = """{{ bos_token }}
{%- if tools %}<|system|>
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- 'You may call these functions:\n<tools>\n' }}
{%- for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}
{{- '</tools>\nA call is written as\n<tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call>' }}<|end|>
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|user|>{{ '<tool_response>\n' + message.content + '\n</tool_response>' }}<|end|>
{%- elif not (tools and loop.first and message.role == 'system') %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or () %}
{{- '\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
{{- '\n</tool_call>' }}
{%- endfor %}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


class Template:
    """Turns messages into the tokens of a prompt.

    tokenizer: left as it is. template: Jinja, None for DEFAULT. tokens: spellings that a template asks for by name,
    such as bos_token. ValueError when the template is broken or the tokenizer lacks DEFAULT's special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, tokens: Mapping[str, str] | None = None):
        from jinja2 import TemplateSyntaxError, meta

        specials = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        if template is None:
            missing = MARKERS.difference(specials)
            if missing:
                raise ValueError(
                    f"the model has no chat template, and its tokenizer has no {', '.join(sorted(missing))}"
                )
            template = DEFAULT
        self._tokenizer = tokenizer
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True  # reads their spellings as text
        self._ids = {special: tokenizer.token_to_id(special) for special in specials}
        longest_first = sorted(specials, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._tokens = {"bos_token": "<|bos|>" if "<|bos|>" in specials else "", **(tokens or {})}
        environment = _environment()
        try:
            self._template = environment.from_string(template)
            self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(template))
        except TemplateSyntaxError as error:
            raise ValueError(f"the model's chat template is broken at line {error.lineno}: {error.message}") from None

    @classmethod
    def load(cls, path: str, tokenizer: Tokenizer | None) -> "Template | None":
        """Of the model folder or run at `path`; None when it is not made for chats. ValueError: a broken template."""
        from serve.stored import stored

        files = stored(path)
        config = files.json(CONFIG) if CONFIG in files else {}
        template = files.text(TEMPLATE) if TEMPLATE in files else _default(config.get("chat_template"))
        if tokenizer is None or (template is None and not MARKERS <= tokenizer.get_vocab().keys()):
            return None
        tokens = {name: spelling(value) for name, value in config.items() if name.endswith("_token")}
        return cls(tokenizer, template, {name: token for name, token in tokens.items() if token})

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of the prompt for the next turn of the assistant. messages: role, content and so on of each.

        tools: the functions it may call, as OpenAI describes them. ValueError when the template refuses them.
        """
        from jinja2 import TemplateError

        mark, found = secrets.token_hex(8), []

        def hide(match: re.Match) -> str:
            found.append(match[0])
            return f"\ufdd0{mark}{len(found) - 1}\ufdd1"

        def hidden(value: Any) -> Any:
            if isinstance(value, str):
                return self._specials.sub(hide, value)
            if isinstance(value, Mapping):
                return {hidden(key): hidden(each) for key, each in value.items()}
            return [hidden(each) for each in value] if isinstance(value, Sequence) else value

        try:
            parts = {"messages": hidden(messages), "tools": hidden(tools) or None}
            text = self._template.render(**parts, add_generation_prompt=True, **self._tokens)
            text.encode()  # a half of a character has no tokens
        except (TemplateError, TypeError, ValueError, LookupError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"messages: the model's chat template refuses them: {reason}") from None
        if not found:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        shown = re.compile(f"\ufdd0{mark}(\\d+)\ufdd1")
        ids, start = [], 0
        for match in (*self._specials.finditer(text), None):
            part = text[start : match.start() if match else len(text)]
            part = shown.sub(lambda hidden: found[int(hidden[1])], part)
            ids += self._plain.encode(part, add_special_tokens=False).ids
            if match:
                ids.append(self._ids[match[0]])
                start = match.end()
        return ids


def spelling(token: Any) -> str:
    """Of a special token in a tokenizer_config.json, a text or a table with its content; empty when there is none."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _default(template: Any) -> str | None:
    """A config has one template, or a list of named ones."""
    if isinstance(template, list):
        return next((each["template"] for each in template if each["name"] == "default"), None)
    return template


def _environment() -> Any:
    """What templates written for Hugging Face's `apply_chat_template` find there."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what to train on; here it is nothing but its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return environment
