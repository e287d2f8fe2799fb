"""Configs as text: part strings, pattern strings and JSON, all strict.

A part is named with its options, `gqa(heads=8,window=64)`; a pattern is parts in order, tiled over depth, with an
optional count: `3*gated_deltanet gqa`. Strings keep a config hashable, a command line short and a run's JSON readable;
they are parsed against the part's own `Config`, so an unknown option is an error that lists the known ones.
"""

import ast
import dataclasses
import math
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from models import registry

_TERM = re.compile(r"[\s,]*(?:(\d+)\s*\*\s*)?([a-z_][a-z0-9_]*)\s*")


def parse_part(text: str, kind: str) -> tuple[type, Any]:
    """`gqa(heads=8)` -> (class, its Config). ValueError for an unknown part, option or value."""
    parts = parse_pattern(text, kind)
    if len(parts) != 1:
        raise ValueError(f"{kind} {text!r}: expected one part, found {len(parts)}")
    return parts[0]


def parse_decoder(text: str) -> tuple[type, dict[str, Any]]:
    """`hybrid(layers=3)` -> (class, its options) of a decoder architecture: `decoder`, or a pattern's name."""
    name, bracket, inside = text.partition("(")
    cls = registry.lookup(name.strip())
    if name.strip() != "decoder" and registry.kind_of(name.strip()) != "pattern" or inside[-1:] != ")"[: len(bracket)]:
        raise ValueError(f"model {text!r}: write decoder or a pattern, as 'hybrid' or 'decoder(pattern=2*gqa)'")
    return cls, _options(name, inside[:-1])


def parse_pattern(text: str, kind: str) -> list[tuple[type, Any]]:
    """`3*gated_deltanet gqa` -> [(class, Config)] * 4, in order. ValueError names what is wrong."""
    parts, position = [], 0
    while text[position:].strip(" ,"):
        match = _TERM.match(text, position)
        if not match:
            raise ValueError(f"{kind} {text!r}: cannot read {text[position:]!r}; write '3*name other(option=1)'")
        count, name = match.groups()
        position, options = match.end(), {}
        if text[position : position + 1] == "(":
            inside = _inside(text, position)
            position, options = position + len(inside) + 2, _options(name, inside)
        apart = position == len(text) or text[position - 1].isspace() or text[position] in ", "
        if count == "0" or not apart:
            raise ValueError(f"{kind} {text!r}: cannot read it at {match.group()!r}; write '3*name other(option=1)'")
        cls = registry.part(name, kind)
        parts += [(cls, make_config(cls, options))] * int(count or 1)
    if not parts:
        raise ValueError(f"{kind} {text!r}: names no {kind}; known: {', '.join(registry.names(kind=kind))}")
    return parts


def to_text(config: Any) -> str:
    """The inverse of `parse_part`: the part's name and the options that are not its defaults."""
    changed = [
        f"{field.name}={str(getattr(config, field.name)).replace(' ', '')}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    ]
    name = type(config).__module__.rsplit(".", 1)[1]
    return f"{name}({','.join(changed)})" if changed else name


def make_config(cls: type, options: dict[str, Any]) -> Any:
    """`cls.Config(**options)` with every name and type checked, one clear line on a mistake."""
    name = registry.name_of(cls)
    hints = get_type_hints(cls.Config)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls.Config)}
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}; its options: {', '.join(known) or 'none'}")
        options = {**options, key: _checked(f"{name}.{key}", value, known[key])}
    return cls.Config(**options)


def to_json(config: Any) -> dict:
    """A Model's config as {"model": name, "config": {...}}, plain JSON values."""
    return {"model": registry.name_of(registry.owner(config)), "config": dataclasses.asdict(config)}


def from_json(record: dict) -> Any:
    """The inverse of `to_json`; unknown fields are errors."""
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict) or "model" not in record:
        raise ValueError('a model config is {"model": name, "config": {option: value}}')
    return make_config(registry.model(record["model"]), record["config"])


def _inside(text: str, start: int) -> str:
    """What stands between the bracket at `start` and the one that closes it."""
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] in "([") - (text[end] in ")]")
        if depth == 0:
            return text[start + 1 : end]
    raise ValueError(f"{text!r}: a bracket is not closed")


def _options(name: str, text: str) -> dict[str, Any]:
    """`heads=8,positions=rope(theta=1e6)` -> {"heads": 8, "positions": "rope(theta=1e6)"}; bare words are strings."""
    options, items, depth = {}, [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    for item in map(str.strip, items if text.strip() else []):
        key, separator, value = (word.strip() for word in item.partition("="))
        if not separator or not key or not value:
            raise ValueError(f"{name}({text}): {item!r} is not option=value")
        if key in options:
            raise ValueError(f"{name}({text}): {key} is given twice")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` if it has the type of the field, ints passing as floats; else one clear line."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ValueError(f"{name}={value!r}: choose {' or '.join(map(repr, get_args(hint)))}")
    if get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name}={value!r}: expected several, as [1.0,2.0]")
        return tuple(_checked(name, item, get_args(hint)[0]) for item in value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ValueError(f"{name}={value!r}: expected {hint.__name__}")
    if hint in (int, float) and not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r}: expected a number from 0 up")
    return value


def at_least(config: Any, **least: int) -> None:
    """ValueError, naming the field, when one of a part's config is below what it needs."""
    for field, low in least.items():
        if getattr(config, field) < low:
            name = type(config).__module__.rsplit(".", 1)[1]
            raise ValueError(f"{name}.{field}={getattr(config, field)}: must be at least {low}")


def above_zero(config: Any, *fields: str) -> None:
    """ValueError, naming the field, when one of a part's config is not above 0."""
    for field in fields:
        if getattr(config, field) <= 0:
            name = type(config).__module__.rsplit(".", 1)[1]
            raise ValueError(f"{name}.{field}={getattr(config, field)}: must be above 0")
