"""Answers of POST /v1/completions."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

from serve.http.answers import Answer
from serve.http.logprobs import of_completion
from serve.http.schema import Completion
from serve.request import Event
from serve.sampler import Logprobs
from serve.text import TextStream


class CompletionAnswer(Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    body: Completion

    def count(self) -> int:
        return len(self.body.prompts())

    def prompts(self) -> list[list[int]]:
        prompts = self.served.prompts
        if self.body.echo and prompts.tokenizer is None:
            raise ValueError("echo: the model has no tokenizer, so there is no text to repeat")
        self.ids = [prompts.encode(prompt) if isinstance(prompt, str) else prompt for prompt in self.body.prompts()]
        return self.ids

    def own(self, prompt: Sequence[int]) -> dict[str, Any]:
        body = self.body
        own = {"max_tokens": body.max_tokens, "logprobs": body.logprobs, "stop": tuple(body.stop)}
        return {**own, "prompt_logprobs": body.logprobs if body.echo else None}

    @cached_property
    def echoes(self) -> list[str]:
        """What comes before each completion."""
        if not self.body.echo:
            return [""] * self.rows
        decode = self.served.prompts.tokenizer.decode
        texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in self.body.prompts()]
        return [text for text in texts for _ in range(self.body.n)]

    @property
    def opening(self) -> list[dict[str, Any]]:
        return [self._choice(index, text, (), None) for index, text in enumerate(self.echoes) if text]

    def choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        text = self.echoes[index] + "".join(event.text for event in events)
        return self._choice(index, text, events, events[-1].reason)

    def deltas(self, index: int, events: Sequence[Event]) -> list[dict[str, Any]]:
        text, reason = "".join(event.text for event in events), events[-1].reason
        if text or reason or self.body.logprobs is not None:
            return [self._choice(index, text, events, reason)]
        return []

    def _choice(self, index: int, text: str, events: Sequence[Event], reason: str | None) -> dict[str, Any]:
        table = None
        if self.body.logprobs is not None:
            table = of_completion(self.served.speller, chain(*(self._entries(index, event) for event in events)))
        return {"index": index, "text": text, "logprobs": table, "finish_reason": reason}

    def _entries(self, index: int, event: Event) -> Iterator[tuple[int, Logprobs | None, int]]:
        """What `event` tells of tokens, those of the prompt first, with their places in the text."""
        if event.prompt_logprobs is not None:
            stream = TextStream(self.served.prompts.tokenizer)
            for token, told in zip(self.ids[index // self.body.n], (None, *event.prompt_logprobs)):
                yield token, told, stream.length
                stream.push(token)
        if event.logprobs is not None:
            yield event.token, event.logprobs, len(self.echoes[index]) + event.offset
