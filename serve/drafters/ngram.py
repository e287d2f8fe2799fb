"""Prompt lookup: what followed the last tokens where they stood before is guessed to follow again.

    draft = tokens[j : j + k],   j the end of the latest earlier place of the last n tokens, n as large as there is one

Costs no model and no tokens of its own; right where texts repeat themselves: code, answers about a given text.
An index of each sequence's n-grams grows with it, so that a guess is a few lookups however long the sequence is.
"""

from collections.abc import Sequence as Items

from serve.scheduler import Sequence
from serve.speculative import Draft, Outputs
from serve.width import Chains


class NGram(Chains):
    """longest, shortest: n-grams that are looked up, the longest first. widest: tokens of a draft."""

    reads = False

    def __init__(self, longest: int = 4, shortest: int = 2, widest: int = 15) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"ngram: shortest={shortest} must be from 1 to longest={longest}")
        if widest < 1:
            raise ValueError(f"ngram: widest={widest}: must be at least 1 token")
        self.sizes, self.widest = range(longest, shortest - 1, -1), widest
        self._ends: dict[int, _Index] = {}

    def propose(self, sequences: Items[Sequence], width: int) -> list[Draft | None]:
        drafts = []
        for sequence in sequences:
            index = self._ends.get(sequence.id)
            if index is None:
                index = self._ends[sequence.id] = _Index(self.sizes)
            end = index.find(sequence.tokens)
            drafts.append(None if end is None else Draft.chain(_copied(sequence.tokens, end, width)))
        return drafts

    def see(self, sequence: Sequence, outputs: Outputs) -> None:
        """Nothing: `reads` is False."""

    def forget(self, sequence: Sequence) -> None:
        self._ends.pop(sequence.id, None)


class _Index:
    """Where the n-grams of one sequence end, each at its latest place before the last token."""

    def __init__(self, sizes: Items[int]) -> None:
        self._sizes, self._known = sizes, 0
        self._latest: dict[tuple[int, ...], int] = {}

    def find(self, tokens: list[int]) -> int | None:
        """The end of the latest earlier place of the longest n-gram that `tokens` end with."""
        latest = self._latest
        for end in range(max(self._known, 1), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    latest[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)
        for size in self._sizes:
            end = latest.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if end is not None:
                return end
        return None


def _copied(tokens: list[int], start: int, width: int) -> list[int]:
    """`width` tokens from `start` on; past the end the copy reads itself, as a text of period len - start goes on."""
    period = len(tokens) - start
    return [tokens[start + step % period] for step in range(width)]
