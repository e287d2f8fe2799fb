"""Log probabilities as OpenAI's two endpoints write them.

There is one entry for each token that was generated, also for an end token and for what a stop text took away: what a
person sees may be shorter, but whoever trains on the numbers needs them all. Before them come those of a prompt that is
repeated. Bytes that are no text by themselves are spelled `bytes:\\xe4\\xbd`, as OpenAI does.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from serve.request import Event
from serve.sampler import Logprobs

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Speller:
    """The bytes and the spelling of single tokens."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._added = {} if tokenizer is None else tokenizer.get_added_tokens_decoder()
        self._levels = {} if tokenizer is None or "ByteLevel" not in repr(tokenizer.decoder) else byte_letters()
        self.spell = lru_cache(65536)(self._spell)

    def bytes(self, token: int) -> bytes | None:
        """UTF-8, perhaps only a part of a character; None for an id without a piece of text."""
        piece = None if self._tokenizer is None else self._tokenizer.id_to_token(token)
        if piece is None:
            return None
        if token in self._added:
            return piece.encode()
        if self._levels:
            return b"".join(self._levels.get(letter, letter.encode()) for letter in piece)
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()

    def _spell(self, token: int) -> str:
        data = self.bytes(token)
        if data is None:
            return f"token_id:{token}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def byte_letters() -> dict[str, bytes]:
    """How byte-level tokenizers write bytes: printable Latin-1 as itself, the rest from U+0100 on, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    letters = {chr(256 + index): bytes([byte]) for index, byte in enumerate(others)}
    return letters | {chr(byte): bytes([byte]) for byte in printable}


def of_completion(speller: Speller, entries: Iterable[tuple[int, Logprobs | None, int]]) -> dict[str, list]:
    """tokens, token_logprobs, top_logprobs and text_offset; top_logprobs always have the token itself.

    entries: a token, what is told of it, None of the first of a prompt, and whole characters before it.
    """
    table: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, told, offset in entries:
        top = None if told is None else {**dict(told.top), token: told.token}
        table["tokens"].append(speller.spell(token))
        table["token_logprobs"].append(None if told is None else told.token)
        table["top_logprobs"].append(None if top is None else {speller.spell(t): value for t, value in top.items()})
        table["text_offset"].append(offset)
    return table


def of_chat(speller: Speller, events: Iterable[Event]) -> dict[str, Any]:
    """content: the token that was drawn and the likeliest at each position."""

    def entry(token: int, value: float) -> dict[str, Any]:
        data = speller.bytes(token)
        return {"token": speller.spell(token), "logprob": value, "bytes": None if data is None else list(data)}

    content = [
        {
            **entry(event.token, event.logprobs.token),
            "top_logprobs": [entry(token, value) for token, value in event.logprobs.top],
        }
        for event in events
    ]
    return {"content": content, "refusal": None}
