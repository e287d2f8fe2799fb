"""Answers of POST /v1/chat/completions."""

import json
import uuid
from collections.abc import Sequence
from typing import Any

from serve.http import tools
from serve.http.answers import Answer
from serve.http.errors import APIError, translate
from serve.http.limits import Limits
from serve.http.logprobs import of_chat
from serve.http.messages import Tool, Turn, plain
from serve.http.schema import ChatCompletion
from serve.http.served import Served
from serve.http.tools import Calls, Piece
from serve.request import Event


class ChatAnswer(Answer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatCompletion

    def __init__(self, served: Served, body: ChatCompletion, limits: Limits) -> None:
        super().__init__(served, body, limits)
        self.called: dict[int, Calls] = {}  # of each completion that has begun; what finds calls in its text

    def count(self) -> int:
        return 1

    def prompts(self) -> list[list[int]]:
        return [encode(self.served, self.body.messages, self.functions)]

    @property
    def functions(self) -> Sequence[Tool]:
        """That may be called."""
        return self.body.tools if self.body.tool_choice != "none" else ()

    def rule(self) -> str:
        enforced = [(tool.function.name, tool.function.parameters) for tool in self.body.enforced]
        if not enforced:
            return super().rule()
        named = self.body.tool_choice != "required"
        return self.checked("tools", tools.rule, enforced, self.body.parallel_tool_calls and not named)

    def own(self, prompt: Sequence[int]) -> dict[str, Any]:
        room = self.served.prompts.longest - len(prompt)
        if room < 1:
            raise ValueError(
                f"messages: they are {len(prompt)} tokens, and at most {len(prompt) + room - 1} leave room"
            )
        if self.body.min_tokens > room:
            raise ValueError(f"min_tokens: there is room for {room} tokens after the messages")
        told = (self.body.top_logprobs or 0) if self.body.logprobs else None
        alone = self.functions and not self.body.parallel_tool_calls and not self.body.enforced
        stop = (*self.body.stop, tools.CLOSE) if alone else self.body.stop
        return {"max_tokens": self.body.max_tokens or room, "logprobs": told, "stop": tuple(stop)}

    def refusal(self, error: Exception) -> APIError:
        refusal = translate(error)
        if refusal.param == "prompt":  # of which the messages make one
            refusal.param = "messages"
        return refusal

    def choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        calls = self._calls()
        pieces = [*calls.push("".join(event.text for event in events)), *calls.close()]
        text = "".join(piece.text for piece in pieces if piece.call is None)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls.count:
            message["content"] = text or None
            message["tool_calls"] = [
                _call(
                    next(piece.name for piece in pieces if piece.call == number and piece.name is not None),
                    "".join(piece.text for piece in pieces if piece.call == number),
                )
                for number in range(calls.count)
            ]
        reason = _reason(events[-1].reason, calls)
        return {"index": index, "message": message, "logprobs": self._logprobs(events), "finish_reason": reason}

    def deltas(self, index: int, events: Sequence[Event]) -> list[dict[str, Any]]:
        choices = []
        if index not in self.called:
            self.called[index] = self._calls()
            choices.append(_delta(index, {"role": "assistant", "content": "", "refusal": None}))
        calls, reason = self.called[index], events[-1].reason
        text = "".join(event.text for event in events)
        if calls.names:
            pieces = calls.push(text) if text else []
            pieces += calls.close() if reason else []
            told = [_piece(piece) for piece in _joined(pieces)]
        else:
            told = [{"content": text}] if text else []
        logprobs = self._logprobs(events)
        if logprobs is not None and logprobs["content"] and not told:
            told = [{"content": ""}]
        choices += [_delta(index, delta, logprobs if not place else None) for place, delta in enumerate(told)]
        if reason:
            choices.append(_delta(index, {}, reason=_reason(reason, calls)))
        return choices

    def _calls(self) -> Calls:
        return Calls(tool.function.name for tool in self.functions)

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        told = [event for event in events if event.logprobs is not None]
        return of_chat(self.served.speller, told) if self.body.logprobs else None


def encode(served: Served, messages: Sequence[Turn], functions: Sequence[Tool] = ()) -> list[int]:
    """Token ids of a chat. ValueError when it is too long for the model, or the model is not made for it."""
    known = [tool.model_dump(exclude={"function": {"strict"}}) for tool in functions]
    if served.template is None:
        raise ValueError("messages: this model has no chat template; use /v1/completions")
    if functions and not served.template.takes_tools:
        raise ValueError("tools: this model's chat template does not know of tools")
    served.prompts.check_text(*(plain(message.content) for message in messages), *map(json.dumps, known))
    return served.template.encode([_known(message) for message in messages], known)


def _known(message: Turn) -> dict[str, Any]:
    """As templates know it: developer is a newer name of system, and the arguments of calls are tables."""
    known = message.model_dump(exclude_none=True, exclude={"content", "tool_calls"})
    known |= {"role": "system" if message.role == "developer" else message.role, "content": plain(message.content)}
    if message.role == "assistant" and message.tool_calls:
        known["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _table(call)}}
            for call in message.tool_calls
        ]
    return known


def _table(call: Any) -> Any:
    try:
        return json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        raise ValueError(f"messages: the arguments of call {call.id!r} are not JSON") from None


def _reason(reason: str | None, calls: Calls) -> str | None:
    return "tool_calls" if reason == "stop" and calls.count else reason


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind as one."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and piece.name is None and joined[-1].name is None and joined[-1].call == piece.call:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.call)
        else:
            joined.append(piece)
    return joined


def _piece(piece: Piece) -> dict[str, Any]:
    if piece.call is None:
        return {"content": piece.text}
    if piece.name is not None:
        return {"tool_calls": [{"index": piece.call, **_call(piece.name, "")}]}
    return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}


def _delta(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
