"""Speculation: a drafter guesses how a sequence goes on, one call of the model checks all guesses.

A draft never changes what is drawn. At each checked place the model's own token is drawn with the request's own number
for that position (`serve.sampler`), and the draft is followed for as long as it says the same. So tokens are those of
plain decoding, greedy or sampled, whatever drafts; a draft decides only how many of them one call gives.

How wide a draft may be is decided by what calls cost here and by how often this sequence's drafts were right.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from torch import Tensor

from serve.scheduler import Sequence
from serve.width import FORGET, PRIOR, Rate, Width


@dataclass(frozen=True, slots=True)
class Outputs:
    """Of a row of a call, at `columns`. x_BTD: of the whole call."""

    x_BTD: Tensor
    row: int
    columns: Items[int]

    def all(self) -> Tensor:
        """(N, D) in the order of the columns."""
        return self.x_BTD[self.row, list(self.columns)]

    def last(self) -> Tensor:
        """(D,), a view."""
        return self.x_BTD[self.row, self.columns[-1]]


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens. parents: of each the index of the token it follows, before it; -1: the sequence's last token."""

    tokens: Items[int]
    parents: Items[int]

    @classmethod
    def chain(cls, tokens: Items[int]) -> "Draft":
        return cls(tokens, range(-1, len(tokens) - 1))

    @property
    def branches(self) -> bool:
        """Whether it is more than a chain."""
        return any(parent != index - 1 for index, parent in enumerate(self.parents))

    def depths(self) -> list[int]:
        """How many tokens after the sequence's last one each stands: 1 for the next."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def cut(self, steps: int) -> "Draft | None":
        """Without the tokens that stand more than `steps` after the last known one; None when nothing is left."""
        depths = self.depths()
        stay = [index for index, depth in enumerate(depths) if depth <= steps]
        if len(stay) == len(depths):
            return self
        index_of = {index: place for place, index in enumerate(stay)}
        parents = [index_of.get(self.parents[index], -1) for index in stay]
        return Draft([self.tokens[index] for index in stay], parents) if stay else None

    def ancestry(self, index: int) -> list[int]:
        """Tokens from the root to `index`, itself included."""
        line = []
        while index >= 0:
            line.append(self.tokens[index])
            index = self.parents[index]
        return line[::-1]

    def follow(self, drawn: Items[int]) -> list[int]:
        """Indices of the accepted tokens, from the root on.

        drawn: the model's own token after the sequence's last one, then after each token of the draft.
        """
        children = {(parent, token): index for index, (parent, token) in enumerate(zip(self.parents, self.tokens))}
        path, here = [], -1
        while (here := children.get((here, drawn[here + 1]), None)) is not None:
            path.append(here)
        return path


class Drafter(Protocol):
    """What guesses. widest: of its drafts; what a width means, `size` and `gain` say as in `serve.width.Chains`.

    reads: it wants `see` to be called. trees: its drafts may branch. usual: making the last drafts took as long as it
    mostly will.
    """

    widest: int
    reads: bool
    trees: bool
    usual: bool

    def propose(self, sequences: Items[Sequence], width: int) -> list[Draft | None]:
        """For each sequence whose tokens but the last are computed a draft of at most `width`, or None."""

    def size(self, width: int) -> int:
        """Tokens of a draft."""

    def gain(self, rate: Rate, width: int) -> float:
        """Tokens that are expected of a call with it, for a row with such a rate."""

    def ready(self, rows: int) -> bool:
        """Whether drafts for so many rows are made as fast as they ever will; sees to it that they are."""

    def see(self, sequence: Sequence, outputs: Outputs) -> None:
        """What the model said to the last tokens of `sequence` that were computed."""

    def forget(self, sequence: Sequence) -> None:
        """`sequence` has ended, or begins anew."""


class Speculation:
    """Drafts for the sequences of an engine, as wide as they pay. drafted, accepted: tokens so far."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.width = drafter, Width(drafter.widest, drafter)
        self.drafts = self.drafted = self.accepted = 0
        self._rates: dict[int, Rate] = {}
        self._typical = PRIOR  # rate of a sequence that nothing is known about
        self._came = 0  # tokens of the last call that were right
        self._making = 0.0  # seconds that its drafts took

    def ready(self, rows: int, ready: Callable[[int], bool]) -> bool:
        """Whether drafts of every width are made and checked as fast as they ever will be. ready: as `Width.choose`."""
        lengths = [1 + self.drafter.size(width) for width in self.width.widths]
        return all([ready(tokens) for tokens in lengths]) and self.drafter.ready(rows)

    def propose(
        self, sequences: Items[Sequence], room: Callable[[Sequence], int], ready: Callable[[int], bool]
    ) -> list[Draft | None]:
        """A draft, or none, for each sequence that lacks only its last token.

        room: steps one has left. ready: as of `Width.choose`.
        """
        self._came, self._making = 0, 0.0
        rates, rows = [self._rate(sequence) for sequence in sequences], len(sequences)
        width = self.width.choose(rates, lambda tokens: ready(tokens) and (tokens == 1 or self.drafter.ready(rows)))
        if not width:
            return [None] * len(sequences)
        begin = perf_counter()
        drafts = self.drafter.propose(sequences, width)
        self._making = perf_counter() - begin
        self.width.covered(sum(draft is not None for draft in drafts) / len(drafts))
        return [draft and draft.cut(room(sequence)) for sequence, draft in zip(sequences, drafts)]

    def timed(self, rows: int, tokens: int, seconds: float) -> None:
        """The call that drafts were asked for had so many `tokens` for each of `rows` rows and took, with making them,
        so long."""
        if tokens > 1:
            self.width.add(rows, tokens, seconds, self._came, self.drafter.usual)
        else:
            self.width.add(rows, 1, seconds - self._making)
            self.width.spend(rows, self._making)

    def learn(self, sequence: Sequence, draft: Draft, path: Items[int]) -> None:
        """`path` of `draft` was accepted."""
        steps = max(draft.depths())
        self._rates[sequence.id].add(len(path), steps)
        self._came += len(path)
        self.drafts += 1
        self.drafted += len(draft.tokens)
        self.accepted += len(path)

    def forget(self, sequence: Sequence) -> None:
        rate = self._rates.pop(sequence.id, None)
        if rate is not None and rate.drafts:
            self._typical += FORGET * (rate.value - self._typical)
        self.drafter.forget(sequence)

    def _rate(self, sequence: Sequence) -> Rate:
        rate = self._rates.get(sequence.id)
        if rate is None:
            rate = self._rates[sequence.id] = Rate(self._typical)
        return rate
