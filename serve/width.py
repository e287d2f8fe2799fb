"""How wide the next drafts are: as wide as pays, by what calls were measured to cost and how often drafts were right.

    width = argmax_k  sum_rows (1 + c (E_r(k) - 1)) / t(rows (1 + k)),    E_r(k) = 1 + a_r + a_r^2 + .. + a_r^k

t is the time of a call by its number of columns and of the drafts for it, a_r the rate at which single guesses of row r
hold, c the part of rows that something was drafted for lately. Plain decoding, k = 0, is always among the choices, and
a wider call must win by a margin.

That is an estimate, and drafts live on credit, so that no wrong one can make decoding slow. It is counted in plain
calls: FIRST at once, for a drafter has to be tried, and ALLOWANCE for each plain call, up to SPARE; a call with drafts
adds the plain calls that it saved, up to SAVED, or takes those that it cost. A width that could cost more than there
is, should nothing be right, is not chosen.

What is not done is not measured: while drafts are made a plain call is made now and then. While none are, a small draft
is once there is credit for it and to go on after it, and what is known of other widths fades. Calls are as long as one
of LENGTHS, so that each kind can be recorded once (`serve.replay`); one that is not yet recorded would be slow and is
not chosen.
"""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable
from collections.abc import Sequence as Items

LENGTHS = (2, 4, 8, 16, 32)  # tokens of calls that check drafts; what is shorter is padded

MARGIN = 1.05  # by which drafting must look faster than plain decoding
PROBE = 64  # calls between two looks at what is not done, at least
ALLOWANCE, SPARE, SAVED, FIRST = 0.01, 8.0, 64.0, 16.0
_FADE = 0.97  # of what is known of calls with drafts, at each such look
FORGET = 0.1  # weight of a new guess that held or not, and of a sequence that ended
_LATEST = 8  # measurements of which the least counts: no call is faster than it can be, and many are disturbed
_RETHINK = 8  # calls without drafts, in which nothing new is learnt of them, until it is asked again whether they pay
_SLOW = 4.0  # a call that takes so many times as long as expected was disturbed, and costs no more
PRIOR = 0.6  # of guesses of a drafter nothing is known about


class Times:
    """Seconds of a call by its size, the least of the latest; between measured sizes on a line, beyond them along the
    last one. sure: measurements of a size until it is known; the first may have been disturbed."""

    def __init__(self, sure: int = 1) -> None:
        self._sure = sure
        self._sizes: list[int] = []
        self._latest: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_LATEST))
        self._seconds: dict[int, float] = {}

    def add(self, size: int, seconds: float) -> None:
        latest = self._latest[size]
        latest.append(seconds)
        if size not in self._seconds and len(latest) >= self._sure:
            insort(self._sizes, size)
        if size in self._sizes:
            self._seconds[size] = min(latest)

    def fade(self) -> None:
        """Nothing is as slow for ever as it once was; what has faded gives way to the next measurements."""
        for size in self._sizes:
            self._seconds[size] *= _FADE
            self._latest[size].clear()

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, size: int) -> bool:
        return size in self._seconds

    def __call__(self, size: int, least: tuple[int, float] | None = None) -> float:
        """Seconds of a call of `size`; least: the smallest size there is and its seconds, which they are if no other
        was measured."""
        sizes = self._sizes
        if not sizes:
            return least[1] if least else 0.0
        right = bisect_left(sizes, size)
        if right < len(sizes) and sizes[right] == size:
            return self._seconds[size]
        if right == 0:
            if least is None:
                return self._seconds[sizes[0]]
            part = (size - least[0]) / (sizes[0] - least[0])
            return least[1] + part * max(0.0, self._seconds[sizes[0]] - least[1])
        low = sizes[right - 1]
        if right == len(sizes):
            if len(sizes) == 1:
                return self._seconds[low]
            before = sizes[right - 2]
            slope = max(0.0, (self._seconds[low] - self._seconds[before]) / (low - before))
            return self._seconds[low] + slope * (size - low)
        high = sizes[right]
        part = (size - low) / (high - low)
        return self._seconds[low] + part * (self._seconds[high] - self._seconds[low])


class Rate:
    """How often guesses of one sequence hold, from how far its drafts were followed. drafts: there were so far."""

    __slots__ = ("value", "drafts")

    def __init__(self, value: float = PRIOR) -> None:
        self.value, self.drafts = value, 0

    def add(self, accepted: int, steps: int) -> None:
        """Of a draft of `steps` steps the first `accepted` held."""
        self.drafts += 1
        tries = accepted + (accepted < steps)
        for hit in (1.0,) * accepted + (0.0,) * (tries - accepted):
            self.value += FORGET * (hit - self.value)

    def tokens(self, steps: int) -> float:
        """Expected tokens of a call that checks `steps` steps."""
        a = min(self.value, 0.999)
        return (1 - a ** (steps + 1)) / (1 - a)


class Chains:
    """What a width means to those that draft chains: so many tokens. For trees another class says."""

    trees, usual = False, True

    def size(self, width: int) -> int:
        """Tokens of a draft."""
        return width

    def gain(self, rate: Rate, width: int) -> float:
        """Tokens that are expected of a call with it, for a row with such a rate."""
        return rate.tokens(width)

    def ready(self, rows: int) -> bool:
        """Whether drafts for so many rows are made as fast as they ever will; sees to it that they are."""
        return True


_CHAINS = Chains()


def _always(tokens: int) -> bool:
    return True


class Width:
    """The choice, for one engine. widest: there is. drafts: says what widths mean.

    plain, calls: times of calls without drafts by rows, and with drafts, which are made in it, by columns.
    credit: plain calls that drafts may cost.
    """

    def __init__(self, widest: int, drafts: Chains = _CHAINS) -> None:
        self.drafts = drafts
        self.widths = [width for width in range(1, widest + 1) if 1 + drafts.size(width) in LENGTHS]
        # What looks slow is not chosen, and so not measured again soon.
        self.plain, self.calls = Times(sure=2), Times(sure=2)
        self.credit = FIRST
        self._same = 0  # calls since it was last seen what the other way brings
        self._looking = False
        self._look = 0.0  # plain calls that the last look at a small draft cost, making it included
        self._drafted = False
        self._covered = 1.0

    def covered(self, part: float) -> None:
        """`part` of the rows have drafts."""
        self._covered += FORGET * (part - self._covered)

    def add(self, rows: int, tokens: int, seconds: float, came: int = 0, usual: bool = True) -> None:
        """A call of `tokens` tokens for each of `rows` rows, one of them known, took so long; `came` drafted tokens
        were right. usual: calls of this kind take as long; others cost as much, and nothing is learnt from them."""
        if tokens == 1:
            self.plain.add(rows, seconds)
            self.credit += max(0.0, min(ALLOWANCE, SPARE - self.credit))
            return
        columns, plain = rows * tokens, self.plain(rows)
        if plain and (columns in self.calls or not usual):  # what a kind costs is learnt once
            most = _SLOW * self.calls(columns) if usual else seconds
            self._charge(min(seconds, most) / plain - 1)
            self.credit = min(self.credit + came / rows, SAVED)
        if usual:
            self.calls.add(columns, seconds)

    def spend(self, rows: int, seconds: float) -> None:
        """Drafts for `rows` rows were asked for, and there were none."""
        if plain := self.plain(rows):
            self._charge(seconds / plain)

    def _charge(self, calls: float) -> None:
        self.credit -= calls
        if self._looking:
            self._look, self._looking = calls, False

    def choose(self, rates: Items[Rate], ready: Callable[[int], bool] = _always) -> int:
        """Width of the next drafts for rows with such rates, 0 for none.

        ready: whether a call of so many tokens for each of these rows runs as fast as it ever will.
        """
        if not self.widths or not ready(1) or not self.plain(len(rates)):  # first, what there is to win over
            return 0
        width = self._best(rates) if self._drafted or self._same % _RETHINK == 0 else 0
        self._same = self._same + 1 if bool(width) == self._drafted else 0
        self._drafted = bool(width)
        if self._same >= PROBE and (width or self.credit >= min(1 + 2 * self._look, SPARE)):
            self._same = 0
            self.calls.fade()
            self._looking = not width
            width = 0 if width else self.widths[0]
        return width if not width or ready(1 + self.drafts.size(width)) else 0

    def _best(self, rates: Items[Rate]) -> int:
        rows, plain = len(rates), self.plain(len(rates))
        best, chosen = rows / plain * MARGIN, 0
        for width in self.widths:
            seconds = max(plain, self.calls(rows * (1 + self.drafts.size(width)), (rows, plain)))
            hoped = self._covered * (sum(self.drafts.gain(rate, width) for rate in rates) - rows)
            speed = (rows + hoped) / seconds
            if speed > best and seconds - plain <= self.credit * plain:
                best, chosen = speed, width
        return chosen
