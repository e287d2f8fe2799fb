"""What may be asked of a model: texts as token ids, and whether a request can ever be answered.

It needs no weights, so it works where the engine is and where only HTTP is: a prompt is encoded and checked before it
is sent anywhere. Thread-safe.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from serve.request import Request

BOS = "<|bos|>"  # opens a document


class Prompts:
    """tokenizer: None for token ids only. vocab: ids there are. max_len: tokens of prompt and completion together.

    longest: those that fit into the engine's memory at once, None for all.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab: int, max_len: int, longest: int | None = None) -> None:
        self.tokenizer, self.vocab, self.max_len = tokenizer, vocab, max_len
        self.longest = max_len if longest is None else min(longest, max_len)
        spellings = () if tokenizer is None else tokenizer.get_vocab()
        self._longest_text = max_len * max((len(token.encode()) for token in spellings), default=0)  # in bytes

    def encode(self, text: str) -> list[int]:
        """Token ids of a text prompt, which opens a document. ValueError without a tokenizer, or as `check_text`."""
        if self.tokenizer is None:
            raise ValueError("prompt: the model has no tokenizer, so the prompt must be token ids")
        self.check_text(text)
        start = self.tokenizer.token_to_id(BOS)
        return ([] if start is None else [start]) + self.tokenizer.encode(text, add_special_tokens=False).ids

    def check_text(self, *texts: str) -> None:
        """ValueError when `texts`, one after the other, are too long whatever their tokens: it is told at once."""
        size = sum(len(text.encode()) for text in texts)
        if size > self._longest_text:
            raise ValueError(
                f"prompt has {size} bytes, more than any {self.max_len} tokens of this model: together with max_tokens "
                f"at most {self.max_len} are allowed"
            )

    def check(self, request: "Request") -> None:
        """ValueError when `request` can never be answered."""
        sampling = request.sampling
        if not request.prompt:
            raise ValueError("prompt: must have at least one token")
        if request.resumed and len(request.resumed) >= sampling.max_tokens:
            raise ValueError(f"resumed: {len(request.resumed)} tokens, but max_tokens={sampling.max_tokens}")
        total = len(request.prompt) + sampling.max_tokens
        if total > self.max_len:
            raise ValueError(
                f"prompt has {len(request.prompt)} tokens and max_tokens is {sampling.max_tokens}: together at most "
                f"{self.max_len} are allowed"
            )
        wrong = self._unknown(request.prompt) or self._unknown(request.resumed)
        if wrong:
            raise ValueError(f"prompt: token {wrong[0]} is not in the vocabulary of {self.vocab} tokens")
        named = [*sampling.stop_token_ids, *(token for token, _ in sampling.logit_bias)]
        wrong = self._unknown(named)
        if wrong:
            field = "stop_token_ids" if wrong[0] in sampling.stop_token_ids else "logit_bias"
            raise ValueError(f"{field}: token {wrong[0]} is not in the vocabulary of {self.vocab} tokens")
        if total > self.longest:
            raise ValueError(
                f"prompt and max_tokens together are {total} tokens, more than fit into the engine's memory"
            )
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop: the model has no tokenizer, so there is no text to compare with")

    def _unknown(self, tokens: Sequence[int]) -> list[int]:
        """The first of `tokens` that is no id, in a list."""
        if not tokens or 0 <= min(tokens) <= max(tokens) < self.vocab:
            return []
        return [next(token for token in tokens if not 0 <= token < self.vocab)]
