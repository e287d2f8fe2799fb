"""Answers of POST /v1/completions."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from serve.http.answers import Answer
from serve.http.logprobs import of_completion
from serve.http.schema import Completion
from serve.request import Event


class CompletionAnswer(Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    body: Completion

    def count(self) -> int:
        return len(self.body.prompts())

    def prompts(self) -> list[list[int]]:
        prompts = self.served.prompts
        if self.body.echo and prompts.tokenizer is None:
            raise ValueError("echo: the model has no tokenizer, so there is no text to repeat")
        return [prompts.encode(prompt) if isinstance(prompt, str) else prompt for prompt in self.body.prompts()]

    def own(self, prompt: Sequence[int]) -> dict[str, Any]:
        body = self.body
        return {"max_tokens": body.max_tokens, "logprobs": body.logprobs, "stop": tuple(body.stop)}

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
        told = [event for event in events if event.logprobs is not None]
        table = of_completion(self.served.speller, told) if self.body.logprobs is not None else None
        return {"index": index, "text": text, "logprobs": table, "finish_reason": reason}
