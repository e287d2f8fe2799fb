"""Text of a stream, token by token: never half a character, never any part of a stop text."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_HALF = "\ufffd"  # what a decoder writes for bytes that are not, or not yet, a character
_CONTEXT = 4  # tokens decoded again before new ones: some decoders treat the first token of a text differently
_LONGEST = 16


class TextStream:
    """Turns tokens into pieces of text that can be shown at once; their sum is the decoded text up to a stop text.

    A character split over tokens waits for its last byte, and what could be the beginning of a stop text waits until
    it is none. `stopped` tells that a stop text came. The text before whichever stop text is complete first is kept.
    `length` counts the whole characters there are so far, passed on or not.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped, self.length = False, 0
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []  # the last ones, as far as decoding still depends on them
        self._shown = 0  # characters of their text that were passed on
        self._held = ""  # passed on, and perhaps the beginning of a stop text

    def push(self, token: int) -> str:
        """The text that has become certain with this token."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        sure = text.rstrip(_HALF)
        new = sure[self._shown :]
        self.length += len(new)
        self._shown = max(self._shown, len(sure))
        if len(self._tokens) >= _LONGEST and len(sure) == len(text):
            self._tokens = self._tokens[-_CONTEXT:]
            self._shown = len(self._tokenizer.decode(self._tokens))
        return self._release(new)

    def close(self) -> str:
        """What was held back, when the stream ends for another reason than a stop text."""
        if self.stopped:
            return ""
        text = self._release(self._tokenizer.decode(self._tokens)[self._shown :])
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, new: str) -> str:
        if self.stopped or not self._stop:
            return "" if self.stopped else new
        text = self._held + new
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stop if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        longest = max(len(stop) for stop in self._stop) - 1
        hold = next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-n:]) for stop in self._stop)
            ),
            0,
        )
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]
