"""What one call of an endpoint gets: a whole answer or a stream of chunks, in the words of the completions or the chat
endpoint.

An answer takes its requests in when it is opened, so that whatever can be refused is refused with a status. It is
closed when its client has it or has gone away, and then nothing of it goes on. What takes long, encoding prompts, is
done in a thread: the event loop serves all others meanwhile.
"""

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope
from starlette.types import Send as SendMessage

from serve.chat import Chat
from serve.engine import Event, Request
from serve.errors import APIError, translate
from serve.logprobs import Speller, of_chat, of_completion
from serve.metrics import Metrics, Watch
from serve.sampler import Sampling
from serve.schema import Body, ChatCompletion, Completion
from serve.worker import Busy, Failed, Worker


@dataclass(frozen=True)
class Service:
    """What the routes need. name: of the model. keys: API keys, none of them means this machine only.

    chat: the model's template, None when it has none. replica: told with the metrics.
    """

    worker: Worker
    name: str
    keys: Sequence[str] = ()
    chat: Chat | None = None
    replica: str = ""
    created: int = field(default_factory=lambda: int(time.time()))


class Answer(ABC):
    """What both endpoints share."""

    prefix, kind, chunk_kind = "", "", ""
    opening: Sequence[dict[str, Any]] = ()  # choices of chunks that come before everything

    def __init__(self, service: Service, metrics: Metrics, speller: Speller, body: Body) -> None:
        self.service, self.metrics, self.speller, self.body = service, metrics, speller, body

    async def open(self) -> None:
        """Takes the requests in. Raises APIError when the call can't be answered."""
        body, worker, metrics = self.body, self.service.worker, self.metrics
        try:
            worker.check_room(self.count() * body.n)
            prompts = await asyncio.to_thread(self.prompts)
            requests = [Request(p, self.sampling(p, index)) for p in prompts for index in range(body.n)]
            self.call = worker.open(requests)
        except (ValueError, Busy, Failed) as error:
            outcome = {Busy: "overloaded", Failed: "failed"}.get(type(error), "invalid")
            metrics.count(outcome)
            raise self.refusal(error) from error
        self.rows = len(requests)
        self.prompt_tokens, self.completion_tokens = sum(map(len, prompts)), 0
        self.watch = Watch(metrics, self.rows, self.prompt_tokens)
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    # -- what the endpoints differ in ----------------------------------------------------------------------------

    @abstractmethod
    def count(self) -> int:
        """Prompts there are."""

    @abstractmethod
    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt. Called in a thread."""

    @abstractmethod
    def limits(self, prompt: Sequence[int]) -> dict[str, Any]:
        """max_tokens and logprobs of a request's Sampling."""

    @abstractmethod
    def choice(self, index: int, text: str, events: Sequence[Event]) -> dict[str, Any]:
        """A whole completion."""

    @abstractmethod
    def deltas(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Choices of the chunks of one event."""

    def refusal(self, error: Exception) -> APIError:
        return translate(error)

    # -- what they share -----------------------------------------------------------------------------------------

    def sampling(self, prompt: Sequence[int], index: int) -> Sampling:
        """Of completion `index` of a prompt: with a seed, each has its own."""
        body = self.body
        return Sampling(
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            seed=None if body.seed is None else (body.seed + index) % 2**64,
            stop=tuple(body.stop),
            ignore_eos=body.ignore_eos,
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
            **self.limits(prompt),
        )

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        try:
            async for index, event in self.call:
                if event.error is not None:
                    message = f"a completion broke: {type(event.error).__name__}: {event.error}"
                    raise APIError(500, " ".join(message.split()), code="completion_failed") from event.error
                self.completion_tokens += event.token is not None
                self.watch.see(index, event)
                yield index, event
        except APIError:
            self.watch.close("failed")
            raise
        except Failed as error:
            self.watch.close("failed")
            raise translate(error) from error

    def close(self) -> None:
        """Any number of times."""
        self.call.close()
        self.watch.close("cancelled")

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    async def whole(self) -> dict[str, Any]:
        rows: list[list[Event]] = [[] for _ in range(self.rows)]
        try:
            async for index, event in self.events():
                rows[index].append(event)
        finally:
            self.close()
        choices = [self.choice(index, "".join(e.text for e in events), events) for index, events in enumerate(rows)]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    async def chunks(self) -> AsyncIterator[str]:
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = {**self.head, "object": self.chunk_kind, **({"usage": None} if with_usage else {})}
        try:
            for choice in self.opening:
                yield _sse({**head, "choices": [choice]})
            async for index, event in self.events():
                for choice in self.deltas(index, event):
                    yield _sse({**head, "choices": [choice]})
        except APIError as error:  # too late for a status
            yield _sse(error.json())
            return
        if with_usage:
            yield _sse({**head, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


class Stream(StreamingResponse):
    """Server-sent events of an answer, which is closed whenever the response is over, even before it began."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.chunks(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: SendMessage) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.close()


class CompletionAnswer(Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    body: Completion

    def count(self) -> int:
        return len(self.body.prompts())

    def prompts(self) -> list[list[int]]:
        engine = self.service.worker.engine
        if self.body.echo and engine.tokenizer is None:
            raise ValueError("echo: the model has no tokenizer, so there is no text to repeat")
        return [engine.encode(prompt) if isinstance(prompt, str) else prompt for prompt in self.body.prompts()]

    @cached_property
    def echoes(self) -> list[str]:
        """What comes before each completion."""
        if not self.body.echo:
            return [""] * self.rows
        decode = self.service.worker.engine.tokenizer.decode
        texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in self.body.prompts()]
        return [text for text in texts for _ in range(self.body.n)]

    def limits(self, prompt: Sequence[int]) -> dict[str, Any]:
        return {"max_tokens": self.body.max_tokens, "logprobs": self.body.logprobs}

    def choice(self, index: int, text: str, events: Sequence[Event]) -> dict[str, Any]:
        return self._choice(index, self.echoes[index] + text, events, events[-1].reason)

    @property
    def opening(self) -> list[dict[str, Any]]:
        return [self._choice(index, text, (), None) for index, text in enumerate(self.echoes) if text]

    def deltas(self, index: int, event: Event) -> list[dict[str, Any]]:
        if event.text or event.reason or event.logprobs:
            return [self._choice(index, event.text, [event], event.reason)]
        return []

    def _choice(self, index: int, text: str, events: Sequence[Event], reason: str | None) -> dict[str, Any]:
        told = [event for event in events if event.logprobs is not None]
        table = of_completion(self.speller, told) if self.body.logprobs is not None else None
        return {"index": index, "text": text, "logprobs": table, "finish_reason": reason}


class ChatAnswer(Answer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatCompletion

    def count(self) -> int:
        return 1

    def prompts(self) -> list[list[int]]:
        if self.service.chat is None:
            raise ValueError("messages: this model has no chat template; use /v1/completions")
        turns = [turn.plain() for turn in self.body.messages]
        self.service.worker.engine.check_text(*(turn["content"] for turn in turns))
        return [self.service.chat.encode(turns)]

    @cached_property
    def begun(self) -> set[int]:
        """Completions whose first chunk was made."""
        return set()

    def limits(self, prompt: Sequence[int]) -> dict[str, Any]:
        room = self.service.worker.engine.memory.longest - len(prompt)
        if room < 1:
            raise ValueError(
                f"messages: they are {len(prompt)} tokens, and at most {len(prompt) + room - 1} leave room"
            )
        told = (self.body.top_logprobs or 0) if self.body.logprobs else None
        return {"max_tokens": self.body.max_tokens or room, "logprobs": told}

    def refusal(self, error: Exception) -> APIError:
        refusal = translate(error)
        if refusal.param == "prompt":  # of which the messages make one
            refusal.param = "messages"
        return refusal

    def choice(self, index: int, text: str, events: Sequence[Event]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        reason = events[-1].reason
        return {"index": index, "message": message, "logprobs": self._logprobs(events), "finish_reason": reason}

    def deltas(self, index: int, event: Event) -> list[dict[str, Any]]:
        choices = []
        if index not in self.begun:
            self.begun.add(index)
            choices.append(_delta(index, {"role": "assistant", "content": "", "refusal": None}))
        if event.text or event.logprobs:
            choices.append(_delta(index, {"content": event.text}, logprobs=self._logprobs([event])))
        if event.reason:
            choices.append(_delta(index, {}, reason=event.reason))
        return choices

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        told = [event for event in events if event.logprobs is not None]
        return of_chat(self.speller, told) if self.body.logprobs else None


def _delta(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _sse(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
