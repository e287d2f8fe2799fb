"""Which tokens the next step computes. There is no prefill and no decoding: a sequence has tokens still to compute.

A step computes one token of each running sequence that lacks one, and beside them up to `chunk` tokens of those that
lack more, first come first served. A waiting sequence starts when a row and pages for all it has are free. When pages
run out, the sequence that came last gives its memory back and waits, first in line, to compute its tokens again.
"""

from collections import deque
from dataclasses import dataclass, field

from serve.memory import StateMemory
from serve.sampler import Sampling
from serve.text import TextStream


@dataclass(eq=False)
class Sequence:
    """One request on its way: `tokens` are known, the first `computed` of them are in the state of `row`."""

    id: int
    tokens: list[int]
    sampling: Sampling
    prompt: int  # tokens that were not generated
    text: TextStream | None
    computed: int = 0
    row: int | None = None
    generated: int = field(init=False)

    def __post_init__(self) -> None:
        self.generated = len(self.tokens) - self.prompt

    @property
    def missing(self) -> int:
        """Tokens still to compute; the last one's logits give the next token."""
        return len(self.tokens) - self.computed


Work = list[tuple[Sequence, int]]


class Scheduler:
    def __init__(self, memory: StateMemory, chunk: int) -> None:
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: must be at least 1 token")
        self.memory, self.chunk = memory, chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order they were admitted
        self.preemptions = 0

    def plan(self) -> Work:
        """The sequences of the next step and how many tokens each computes."""
        self._make_room()
        work, budget = [], self.chunk
        for sequence in self.running:
            count = sequence.missing if sequence.missing == 1 else min(sequence.missing, budget)
            if count > 0:
                work.append((sequence, count))
                budget -= count if sequence.missing > 1 else 0
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            # A page for each running sequence stays free, or the newcomer would soon be sent back.
            sequence.row = self.memory.allocate(len(sequence.tokens), spare=True)
            if sequence.row is None:
                break
            self.running.append(self.waiting.popleft())
            count = min(sequence.missing, budget)
            work.append((sequence, count))
            budget -= count
        return work

    def _make_room(self) -> None:
        """Pages for the tokens of every running sequence, the oldest first, at the cost of the youngest."""
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            if self.memory.grow(sequence.row, len(sequence.tokens)):
                position += 1
                continue
            youngest = self.running.pop()
            self.release(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1

    def release(self, sequence: Sequence) -> None:
        """Forget what was computed of a sequence."""
        if sequence.row is not None:
            self.memory.free(sequence.row)
        sequence.row, sequence.computed = None, 0

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, wherever it is."""
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self.release(sequence)
