"""What one call of an endpoint gets: a whole answer or a stream of chunks. What the endpoints share is here; their
words are in `serve.http.completions` and `serve.http.chats`.

An answer takes its requests in when it is opened, so that whatever can be refused is refused with a status. It is
closed when its client has it or has gone away, and then nothing of it goes on. What takes long, encoding prompts and
compiling grammars, is done in a thread: the event loop serves all others meanwhile.
"""

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from serve import grammar
from serve.grammar import GrammarError
from serve.http import keys
from serve.http.clients import while_there
from serve.http.errors import APIError, broken, translate
from serve.http.flow import Flow
from serve.http.limits import Limits
from serve.http.metrics import Watch
from serve.http.schema import Body
from serve.http.served import Served
from serve.request import Event, Request
from serve.sampler import Sampling
from serve.worker import Busy, Failed

_write = json.JSONEncoder(separators=(",", ":")).encode


class Answer(ABC):
    prefix, kind, chunk_kind = "", "", ""
    opening: Sequence[dict[str, Any]] = ()  # choices of chunks that come before everything

    def __init__(self, served: Served, body: Body, limits: Limits) -> None:
        self.served, self.body, self.limits = served, body, limits
        self.caller = keys.caller()

    async def open(self) -> None:
        """Takes the requests in. Raises APIError when the call can't be answered."""
        backend, metrics = self.served.backend, self.served.metrics
        try:
            backend.check_room(self.count() * self.body.n)
            requests, prompts = await asyncio.to_thread(self._requests)
            self.call = backend.open(requests)
        except (ValueError, Busy, Failed) as error:
            metrics.refuse({Busy: "overloaded", Failed: "failed"}.get(type(error), "invalid"))
            raise self.refusal(error) from error
        self.rows = self.remaining = len(requests)
        self.prompt_tokens, self.cached_tokens = sum(map(len, prompts)), 0
        self.completion_tokens = 0
        self.watch = Watch(metrics, requests, self.prompt_tokens)
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.body.model}

    # -- what the endpoints differ in ----------------------------------------------------------------------------

    @abstractmethod
    def count(self) -> int:
        """Prompts there are."""

    @abstractmethod
    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt. Called in a thread."""

    @abstractmethod
    def own(self, prompt: Sequence[int]) -> dict[str, Any]:
        """max_tokens, logprobs and stop of a request's Sampling."""

    @abstractmethod
    def choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        """A whole completion."""

    @abstractmethod
    def deltas(self, index: int, events: Sequence[Event]) -> list[dict[str, Any]]:
        """Choices of the chunks of some events of one completion."""

    def refusal(self, error: Exception) -> APIError:
        return translate(error)

    # -- what they share -----------------------------------------------------------------------------------------

    def _requests(self) -> tuple[list[Request], list[list[int]]]:
        rule = self.rule()
        prompts = self.prompts()
        options = {"priority": self.body.priority, "deadline": self.limits.answer_seconds}
        if self.caller is not None:
            options["priority"] += self.caller.key.priority
            options["key"] = self.caller.key.name
        n = range(self.body.n)
        return [Request(p, self._sampling(p, index, rule), **options) for p in prompts for index in n], prompts

    def rule(self) -> str:
        """The grammar that completions follow; none when it is empty. ValueError for one that cannot be followed."""
        form, more = self.body.response_format, self.body.structured_outputs
        if self.body.json_asked:
            schema = {"type": "object"} if form.json_schema is None else form.json_schema.schema_
            return self.checked("response_format", grammar.of_schema, schema)
        if more is None:
            return ""
        if more.regex is not None:
            return self.checked("structured_outputs", grammar.of_regex, more.regex)
        if more.choice is not None:
            return self.checked("structured_outputs", grammar.of_choice, more.choice)
        if more.grammar is not None:
            return self.checked("structured_outputs", grammar.of_lark, more.grammar)
        return self.checked("structured_outputs", grammar.of_schema, more.json_ or {"type": "object"})

    def checked(self, field: str, make: Callable[..., str], *options: Any) -> str:
        """The grammar that `make` makes of `options`; a ValueError that begins with `field` tells what is wrong."""
        if self.body.ignore_eos:
            raise ValueError(f"ignore_eos: not together with {field}, whose end is the completion's")
        try:
            rule = make(*options)
            self.served.grammars.matcher(rule)
        except GrammarError as error:
            raise ValueError(f"{field}: {error}") from None
        return rule

    def _sampling(self, prompt: Sequence[int], index: int, rule: str) -> Sampling:
        """Of completion `index` of a prompt: with a seed, each has its own."""
        body = self.body
        return Sampling(
            temperature=body.temperature,
            top_k=max(body.top_k, 0),
            top_p=body.top_p,
            min_p=body.min_p,
            seed=None if body.seed is None else (body.seed + index) % 2**64,
            stop_token_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            min_tokens=body.min_tokens,
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=tuple((int(token), value) for token, value in body.logit_bias.items()),
            grammar=rule,
            **self.own(prompt),
        )

    async def batches(self, quiet_seconds: float | None = None) -> AsyncIterator[dict[int, list[Event]]]:
        """Events by completion, as many as there are each time. Nothing of any after `quiet_seconds` without one."""
        try:
            while True:
                try:
                    async with asyncio.timeout(quiet_seconds):
                        batch = await self.call.read()
                except TimeoutError:
                    yield {}
                    continue
                if not batch:
                    return
                rows: dict[int, list[Event]] = {}
                for index, event in batch:
                    if event.error is not None:
                        raise broken(event.error)
                    self.completion_tokens += event.token is not None
                    self.cached_tokens += event.cached
                    self.remaining -= event.reason is not None
                    rows.setdefault(index, []).append(event)
                self.watch.see(rows)
                yield rows
        except APIError:
            self.watch.close("failed")
            raise
        except Failed as error:
            self.watch.close("failed")
            raise translate(error) from error

    def close(self) -> None:
        """Once, when the client has its answer or has gone away."""
        self.call.close()
        self.watch.close("cancelled")
        if self.caller is not None:
            self.caller.charge(self.prompt_tokens + self.completion_tokens)

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    async def whole(self) -> dict[str, Any]:
        events: list[list[Event]] = [[] for _ in range(self.rows)]
        async for rows in self.batches():
            for index, some in rows.items():
                events[index] += some
        choices = [self.choice(index, some) for index, some in enumerate(events)]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    async def chunks(self, quiet_seconds: float) -> AsyncIterator[str]:
        """Server-sent events, all that there is to send at a time."""
        options = self.body.stream_options
        last = options is not None and options.include_usage
        each = options is not None and options.continuous_usage_stats
        before = f"data: {_write({**self.head, 'object': self.chunk_kind})[:-1]}"

        def sse(choices: Sequence[dict[str, Any]]) -> str:
            usage = f',"usage":{_write(self.usage())}' if each else ',"usage":null' if last else ""
            return "".join(f'{before},"choices":[{_write(choice)}]{usage}}}\n\n' for choice in choices)

        def end() -> str:
            usage = f'{before},"choices":[],"usage":{_write(self.usage())}}}\n\n' if last else ""
            return f"{usage}data: [DONE]\n\n"

        text = sse(self.opening)  # goes out with what comes first
        try:
            async for rows in self.batches(quiet_seconds):
                text += "".join(sse(self.deltas(index, events)) for index, events in rows.items())
                if not self.remaining:
                    text += end()
                if text or not rows:
                    yield text or ": still here\n\n"
                text = ""
        except APIError as error:  # too late for a status
            yield f"{text}data: {_write(error.json())}\n\n"


class Reply(Response):
    """An answer on its way to its client. It is closed when that is over, however and whenever."""

    def __init__(self, answer: Answer, flow: Flow) -> None:
        self.answer, self.limits, self.flow = answer, answer.limits, flow
        self.background = None
        self.raw_headers = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = self.answer.body.stream
        self.flow.streams += stream
        try:
            await while_there(receive, self._stream(send) if stream else self._whole(scope, receive, send))
        finally:
            self.flow.streams -= stream
            self.answer.close()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = JSONResponse(await self.answer.whole())
        except APIError as error:
            response = error.response()
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for text in self.answer.chunks(self.limits.quiet_seconds):
            try:
                async with asyncio.timeout(self.limits.send_seconds):
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            except TimeoutError:  # a client that does not read; it gets no proper end
                return
            if self.answer.remaining:
                await asyncio.sleep(self.flow.rest())
        await send({"type": "http.response.body", "body": b"", "more_body": False})
