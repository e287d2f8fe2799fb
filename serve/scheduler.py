"""Which tokens the next step computes. There is no prefill and no decoding: a sequence has tokens still to compute.

A step computes one token of each running sequence that lacks one, and beside them up to so many tokens of those that
lack more as do not hold up the others (`serve.pace`). A waiting sequence starts when a row and pages for all it has are
free, and begins where the prefix cache knows the beginning. Who starts first:

    the lowest priority number;  of these the key that was served the fewest tokens;  of these who came first

In the same order prompts get the tokens that a step has for them: a long one holds up nobody who goes before it.
Whoever was passed by too often goes before all others, so nobody starves. When pages run out, the sequence of the worst
priority that came last gives its memory back and waits, to compute its tokens again (what is still in the prefix cache
is found there) or with its state kept outside. So does one whose row a sequence of better priority needs.

Where nothing may depend on who else is there (`invariant`), what a call computes of a sequence follows from its prompt
alone: whole pages, the rest of the prompt, then every generated token by itself, also when it is computed again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from time import perf_counter

from serve.memory import Offload, StateMemory
from serve.pace import LEAST, Pace
from serve.prefix import PrefixCache, Trail
from serve.sampler import Logprobs, Sampling
from serve.shaping import Shaper
from serve.text import TextStream

_PATIENCE = 64  # sequences that may start before one that came earlier is computed


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way: `tokens` are known, the first `computed` of them are in the state of `row`.

    cached: prompt tokens that were found in the prefix cache. passed: how often a later one started before its prompt
    was computed.
    arrived, begun, first: when it came, first had a row and had its first token, in seconds of `perf_counter`.
    """

    id: int
    tokens: list[int]
    sampling: Sampling
    prompt: int  # tokens that were not generated
    text: TextStream | None
    shaper: Shaper | None = None  # of its logits, when its sampling asks for it
    embed: bool = False  # it wants what the model thinks of its prompt, and no tokens
    priority: int = 0
    key: str = ""
    computed: int = 0
    row: int | None = None
    generated: int = field(init=False)
    cached: int | None = None
    passed: int = 0
    trail: Trail | None = None
    offload: Offload | None = None
    arrived: float = field(default_factory=perf_counter)
    begun: float | None = None
    first: float | None = None
    prompt_logprobs: list[Logprobs] | None = None  # so far; None: nobody wants them any more

    def __post_init__(self) -> None:
        self.generated = len(self.tokens) - self.prompt

    @property
    def missing(self) -> int:
        """Tokens still to compute; the last one's logits give the next token."""
        return len(self.tokens) - self.computed

    @property
    def known(self) -> int:
        """Tokens whose outputs nobody needs, if others have computed them."""
        return len(self.tokens) if self.prompt_logprobs is None else len(self.prompt_logprobs)


Work = list[tuple[Sequence, int]]


class Scheduler:
    """cache: None for none. offload: state of a sequence that must wait is kept in host memory, not computed again.

    isolated: sequences of different keys share nothing in the cache, so that none can time what another has asked.
    invariant: the tokens of a call depend on no other sequence. on_preempt: told of each that gives its memory back.
    """

    def __init__(
        self,
        memory: StateMemory,
        pace: Pace,
        cache: PrefixCache | None = None,
        offload: bool = False,
        isolated: bool = False,
        invariant: bool = False,
        on_preempt: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        self.memory, self.pace, self.cache = memory, pace, cache
        self.offload, self.isolated, self.invariant, self.on_preempt = offload, isolated, invariant, on_preempt
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # in the order they started
        self.preemptions = 0
        self._served: dict[str, int] = {}  # tokens by key
        self._left = 0  # prompt tokens that this step may still compute
        self._cut: list[Sequence] = []

    # -- who is there --------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Into the line. A key that was away has not saved anything up meanwhile; when nobody is here, all are even."""
        here = {other.key for other in (*self.waiting, *self.running)}
        least = min((self._served[key] for key in here), default=inf)
        # Of those that are away, whoever got no more than anybody here would come back even: it can be forgotten.
        self._served = {key: tokens for key, tokens in self._served.items() if key in here or tokens > least}
        self._served[sequence.key] = max(self._served.get(sequence.key, 0), least if here else 0)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, wherever it is."""
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self._remember(sequence)
            self.running.remove(sequence)
            self._release(sequence)

    def computed(self, sequence: Sequence, tokens: int) -> None:
        """`tokens` more tokens of a running sequence are in its state for good."""
        sequence.computed += tokens
        self._served[sequence.key] += tokens

    def _remember(self, sequence: Sequence) -> None:
        if sequence.trail is not None and sequence.computed <= self._shareable(sequence):
            self.cache.extend(sequence.trail, sequence.row, sequence.tokens, sequence.computed)

    def _shareable(self, sequence: Sequence) -> int:
        """The first so many of its tokens are computed in the same calls by all sequences that begin with them."""
        page = self.memory.page
        return sequence.prompt // page * page if self.invariant else len(sequence.tokens)

    def room(self, sequence: Sequence) -> int:
        """Tokens that may be computed of a sequence before a checkpoint is due; 0: any number."""
        stop = self.cache.stop(sequence.trail, sequence.computed) if sequence.trail is not None else 0
        return stop - sequence.computed if stop else 0

    # -- a step --------------------------------------------------------------------------------------------------

    def plan(self) -> Work:
        """The sequences of the next step and how many tokens each computes."""
        for sequence in self.running:
            self._remember(sequence)
        self._make_room()
        decoding = sum(sequence.missing == 1 for sequence in self.running)
        budget = self.pace.room(decoding, min(self.memory.rows, len(self.running) + len(self.waiting)))
        if self.waiting:
            self._start(budget)
        self._left, self._cut = budget, []
        work = [(sequence, 1) for sequence in self.running if sequence.missing == 1]
        return work + self._parts(sorted(self._prompts(), key=self._turn))

    def rest(self) -> Work:
        """What the same step computes after that: of prompts that were cut, more."""
        cut, self._cut = self._cut, []
        for sequence in cut:
            self._remember(sequence)
        return self._parts(cut)

    def _parts(self, sequences: Iterable[Sequence]) -> Work:
        """Of each as many tokens as the step has left, and as one call may compute.

        None is begun for the sake of a few tokens: its next call would cost as much as one for all of them.
        """
        work = []
        for sequence in sequences:
            tokens = min(sequence.missing, self._left)
            if tokens <= 0 or (work and tokens < min(sequence.missing, LEAST)):
                continue
            run, price = self._run(sequence, tokens)
            if run < tokens:
                self._cut.append(sequence)
            work.append((sequence, run))
            self._left -= price
        return work

    def _run(self, sequence: Sequence, tokens: int) -> tuple[int, int]:
        """Tokens of the next call, where a sequence may have `tokens`, and how many of the step's they are worth."""
        if not self.invariant:
            run = min(tokens, self.room(sequence) or tokens)
            return run, run
        page, rest = self.memory.page, sequence.prompt - sequence.computed
        # They follow from the prompt alone, and few cost what a page of them does.
        return (min(rest, page - sequence.computed % page) if rest > 0 else 1), page

    def _start(self, budget: int) -> None:
        """Rows for those whose turn it is, while those that run and go before them leave some of `budget`."""
        best = min(sequence.priority for sequence in self.waiting)
        if not self.memory.free_rows and best >= max(sequence.priority for sequence in self.running):
            return
        for sequence in sorted(self.waiting, key=self._turn)[: self.memory.rows]:
            turn = self._turn(sequence)
            if budget <= sum(other.missing for other in self._prompts() if self._turn(other) < turn):
                return
            trail = self._look_up(sequence)
            if trail is not None and self._is_computed_now(sequence, trail):
                self.cache.end(trail)
                continue
            while not self._admit(sequence, trail):
                worse = [s for s in self.running if s.passed < _PATIENCE and s.priority > sequence.priority]
                if not worse:
                    return
                self._preempt(max(worse, key=_rank))
                trail = self._look_up(sequence)

    def _prompts(self) -> list[Sequence]:
        """Those that run and lack more than their last token."""
        return [sequence for sequence in self.running if sequence.missing > 1]

    def _turn(self, sequence: Sequence) -> tuple[float, int, int]:
        return (_rank(sequence)[0], self._served[sequence.key], sequence.id)

    def _look_up(self, sequence: Sequence) -> Trail | None:
        if self.cache is None:
            return None
        return self.cache.begin(sequence.tokens, self._salt(sequence), self._findable(sequence))

    def _findable(self, sequence: Sequence) -> int:
        """So many of its tokens need not be computed, if the cache has them."""
        return min(sequence.known, self._shareable(sequence))

    def _salt(self, sequence: Sequence) -> str:
        return sequence.key if self.isolated else ""

    def _is_computed_now(self, sequence: Sequence, trail: Trail) -> bool:
        """Whether a running sequence is about to leave more of the same beginning in the cache: that is waited for."""
        for other in self.running:
            if other.missing == 1 or self._salt(other) != self._salt(sequence):
                continue
            end = next((stop for stop in other.trail.stops if stop > max(trail.length, other.computed)), 0)
            end = end if self.memory.checkpoints else trail.length + self.cache.page
            if 0 < end <= min(len(sequence.tokens) - 1, self._findable(sequence), self._shareable(other)):
                if other.tokens[end - 1] == sequence.tokens[end - 1] and other.tokens[:end] == sequence.tokens[:end]:
                    return True
        return False

    def _admit(self, sequence: Sequence, trail: Trail | None) -> bool:
        """A row for a waiting sequence, beginning where `trail` says; False, and `trail` ended: memory is short."""
        start = trail.start if trail is not None and sequence.offload is None else None
        # A page for each running sequence stays free, or the newcomer would soon be sent back.
        row = self.memory.allocate(len(sequence.tokens), spare=True, start=start)
        if row is None and trail is not None and not self.running:  # what the trail pins is all that is in the way
            self.cache.end(trail)
            trail, start = self.cache.begin((), self._salt(sequence)), None
            row = self.memory.allocate(len(sequence.tokens))
        if row is None:
            if trail is not None:
                self.cache.end(trail)
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        turn = self._turn(sequence)
        for other in (*self.waiting, *(prompt for prompt in self._prompts() if turn < self._turn(prompt))):
            other.passed += other.id < sequence.id
        sequence.row, sequence.trail, sequence.computed = row, trail, start.length if start else 0
        if sequence.offload is not None:
            self.memory.restore(row, sequence.offload)
            sequence.computed, sequence.offload = sequence.offload.length, None
        elif trail is not None:
            self.cache.found(trail, len(sequence.tokens))
        if sequence.begun is None:
            sequence.begun = perf_counter()
            sequence.cached = min(sequence.computed, sequence.prompt)
        return True

    def _make_room(self) -> None:
        """Pages for the tokens of every running sequence, at the cost of the worst priority and the youngest."""
        short = [s for s in self.running if not self.memory.grow(s.row, len(s.tokens))]
        while short:
            self._preempt(max(self.running, key=_rank))
            short = [s for s in short if s.row is not None and not self.memory.grow(s.row, len(s.tokens))]

    def _preempt(self, sequence: Sequence) -> None:
        self.on_preempt(sequence)
        self.running.remove(sequence)
        if self.offload and sequence.computed:
            sequence.offload = self.memory.offload(sequence.row, sequence.computed)
        self._release(sequence)
        self.waiting.append(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        """Forget what was computed of a sequence; the cache may remember."""
        if sequence.trail is not None:
            self.cache.end(sequence.trail)
        self.memory.free(sequence.row)
        sequence.row, sequence.trail, sequence.computed = None, None, 0


def _rank(sequence: Sequence) -> tuple[float, int]:
    """The smaller, the sooner it runs; the largest gives way."""
    return (-inf if sequence.passed >= _PATIENCE else sequence.priority, sequence.id)
