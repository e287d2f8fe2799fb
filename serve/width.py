"""How wide the next drafts are: as wide as pays, by what calls were measured to cost and how often drafts were right.

    width = argmax_k  sum_rows E_r(k) / (t(rows (1 + k)) + d(k)),    E_r(k) = 1 + a_r + a_r^2 + .. + a_r^k

t is the time of a call by its number of columns, d that of drafting k tokens, a_r the rate at which single guesses of
row r hold. Plain decoding, k = 0, is always among the choices, and a wider call must win by a margin. While nothing is
drafted the rates would never change: now and then a small draft is made to see.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence as Items

MARGIN = 1.05  # by which drafting must look faster than plain decoding
PROBE = 64  # calls between two looks at rows that do not draft
_FORGET = 0.1  # weight of a new measurement
_PRIOR = 0.6  # of guesses of a drafter nothing is known about
_SLOW = 4.0  # a measurement this far above what is known is a disturbance, and counts as no more than this


class Times:
    """Seconds of a call by its size, averaged; between measured sizes on a line, beyond them along the last one."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._seconds: dict[int, float] = {}

    def add(self, size: int, seconds: float) -> None:
        known = self._seconds.get(size)
        if known is None:
            insort(self._sizes, size)
        if known is None or seconds * _SLOW < known:  # no call is faster than it can be: the earlier was disturbed
            self._seconds[size] = seconds
        else:
            seconds = min(seconds, _SLOW * known)
            self._seconds[size] = known + _FORGET * (seconds - known)

    def __len__(self) -> int:
        return len(self._sizes)

    def __call__(self, size: int) -> float:
        """Seconds of a call of `size`; 0 when nothing was measured."""
        sizes = self._sizes
        if not sizes:
            return 0.0
        right = bisect_left(sizes, size)
        if right < len(sizes) and sizes[right] == size:
            return self._seconds[size]
        if right == 0:
            return self._seconds[sizes[0]]
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
    """How often guesses of one sequence hold, from how far its drafts were followed."""

    __slots__ = ("value",)

    def __init__(self, value: float = _PRIOR) -> None:
        self.value = value

    def add(self, accepted: int, steps: int) -> None:
        """Of a draft of `steps` steps the first `accepted` held."""
        tries = accepted + (accepted < steps)
        for hit in (1.0,) * accepted + (0.0,) * (tries - accepted):
            self.value += _FORGET * (hit - self.value)

    def tokens(self, steps: int) -> float:
        """Expected tokens of a call that checks `steps` steps."""
        a = min(self.value, 0.999)
        return (1 - a ** (steps + 1)) / (1 - a)


class Chains:
    """What a width means to those that draft chains: so many tokens. For trees another class says."""

    def size(self, width: int) -> int:
        """Tokens of a draft."""
        return width

    def gain(self, rate: Rate, width: int) -> float:
        """Tokens that are expected of a call with it, for a row with such a rate."""
        return rate.tokens(width)


_CHAINS = Chains()


class Width:
    """The choice, for one engine. widest: there is. drafts: says what widths mean."""

    def __init__(self, widest: int, drafts: Chains = _CHAINS) -> None:
        self.widest, self.drafts = widest, drafts
        self.calls, self.drafting = Times(), Times()
        self._since = 0

    def choose(self, rates: Items[Rate]) -> int:
        """Width of the next drafts for rows with such rates."""
        rows = len(rates)
        plain = self.calls(rows)
        if not plain:  # first of all, what there is to win over
            return 0
        best, width = rows / plain * MARGIN, 0
        for steps in range(1, self.widest + 1):
            seconds = self.calls(rows * (1 + self.drafts.size(steps))) + self.drafting(rows * steps)
            speed = sum(self.drafts.gain(rate, steps) for rate in rates) / seconds
            if speed > best:
                best, width = speed, steps
        self._since = 0 if width else self._since + 1
        if self._since >= PROBE:
            self._since = 0
            return 1
        return width
