"""Calls of a client's functions, in the form that Hermes models made common:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Bern"}}
    </tool_call>

The template tells the model about the functions. Where a call is required, a grammar makes the model write one. In what
it writes otherwise, `Calls` finds them while the text streams: words of an answer pass at once, arguments as they come.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve import grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_LONGEST = 512  # characters within which a call begins


@dataclass(frozen=True, slots=True)
class Piece:
    """Of an answer: text, or of call number `call` its name or a part of its arguments."""

    text: str = ""
    call: int | None = None
    name: str | None = None


def rule(functions: Sequence[tuple[str, Mapping[str, Any]]], several: bool) -> str:
    """The grammar of one call, or of one or more. functions: name and JSON schema of the arguments of each."""
    start = 'start: call ("\\n" call)*' if several else "start: call"
    names = [f"f{index}" for index in range(len(functions))]
    lines = [start, f"call: {grammar.literal(OPEN + chr(10))} ({' | '.join(names)}) {grammar.literal(chr(10) + CLOSE)}"]
    for own, (name, schema) in zip(names, functions):
        head = grammar.literal(f'{{"name": {json.dumps(name)}, "arguments": ')
        lines.append(f'{own}: {head} {grammar.json_rule({"type": "object", **schema})} "}}"')
    return grammar.of_lark("\n".join(lines))


class Calls:
    """Takes the text of an answer apart while it comes. names: of the functions there are; others are text."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.count = 0
        self._read, self._rest = self._text, ""
        self._depth, self._quoted, self._escaped = 0, False, False

    def push(self, text: str) -> list[Piece]:
        """What has become certain."""
        self._rest += text
        pieces: list[Piece] = []
        while True:
            before = (self._read, len(self._rest))
            pieces += self._read()
            if (self._read, len(self._rest)) == before:
                return pieces

    def close(self) -> list[Piece]:
        """What was held back; the arguments of a call that was cut off stay as they are."""
        rest, self._rest = self._rest, ""
        if self._read == self._head:
            rest = OPEN + rest
        if self._read not in (self._text, self._head) or not rest or (self.count and rest.isspace()):
            return []
        return [Piece(rest)]

    def _text(self) -> list[Piece]:
        place = self._rest.find(OPEN)
        if place >= 0:
            text, self._rest, self._read = self._rest[:place], self._rest[place + len(OPEN) :], self._head
            return [Piece(text)] if text and not (self.count and text.isspace()) else []
        hold = next(
            (n for n in range(min(len(OPEN) - 1, len(self._rest)), 0, -1) if OPEN.startswith(self._rest[-n:])), 0
        )
        text, rest = self._rest[: len(self._rest) - hold], self._rest[len(self._rest) - hold :]
        if not text or (self.count and text.isspace()):  # perhaps between two calls
            return []
        self._rest = rest
        return [Piece(text)]

    def _head(self) -> list[Piece]:
        match = _HEAD.match(self._rest)
        name = json.loads(match[1], strict=False) if match else None
        if name in self.names:
            self._rest, self._read = self._rest[match.end() :], self._arguments
            self._depth, self._quoted, self._escaped = 0, False, False
            self.count += 1
            return [Piece(call=self.count - 1, name=name)]
        if match or CLOSE in self._rest or len(self._rest) > _LONGEST:  # no call of ours
            text, self._rest, self._read = OPEN + self._rest, "", self._text
            return [Piece(text)]
        return []

    def _arguments(self) -> list[Piece]:
        """Up to the brace that closes the first one."""
        for place, letter in enumerate(self._rest):
            if self._quoted:
                self._quoted = letter != '"' or self._escaped
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if not self._depth:
                    return self._told(place + 1, self._tail)
        return self._told(len(self._rest), self._arguments)

    def _told(self, size: int, then: Any) -> list[Piece]:
        text, self._rest, self._read = self._rest[:size], self._rest[size:], then
        return [Piece(text, self.count - 1)] if text else []

    def _tail(self) -> list[Piece]:
        place = self._rest.find(CLOSE)
        if place >= 0:
            self._rest, self._read = self._rest[place + len(CLOSE) :], self._text
        return []
