"""How many prompt tokens a step may compute beside those that generate, so that a stream never stutters.

    tokens = max n with  t(decoding) + a + b n <= SLACK usual t(live)

t is the measured time of a call that generates one token for each of so many rows; a + b n, a line through what was
measured lately, that of a call for n prompt tokens; usual the median of steps, in units of t(live) and at least 1. A
step with prompt tokens in it then lasts at most SLACK times a step of all rows that are there or wait, so that the
slowest gaps of a stream stay below twice the usual one. Where prompts never stop coming, steps with prompts become the
usual ones, and grow until they keep up. With nothing generating a step lasts as long as somebody who comes may wait for
it; and it never takes so little that it does little else than read weights.
"""

from serve.width import Times

SLACK = 1.8
MOST = 2.0  # times a step of all rows that the usual one may last
LONGEST = 0.25  # seconds of a step in which nothing is generated
LEAST = 32  # tokens
FIRST = 256  # tokens of a step before it is known how long they take
_FORGET = 0.1  # weight of a new measurement
_MEDIAN = 0.005  # part by which the median moves at each step
_SLOW = 4.0  # a call that takes so many times as long as expected was disturbed, and counts as no more


class Line:
    """Seconds by tokens, a + b n, through the latest measurements."""

    def __init__(self) -> None:
        self._n = self._t = self._nn = self._nt = 0.0  # means, of n, t and their products

    def add(self, n: int, seconds: float) -> None:
        a, b = self.coefficients() if self else (0.0, 0.0)
        if not self or seconds * _SLOW < a + b * n:  # no call is faster than it can be: those before were disturbed
            self._n, self._t, self._nn, self._nt = n, seconds, n * n, n * seconds
            return
        seconds = min(seconds, _SLOW * (a + b * n))
        self._n += _FORGET * (n - self._n)
        self._t += _FORGET * (seconds - self._t)
        self._nn += _FORGET * (n * n - self._nn)
        self._nt += _FORGET * (n * seconds - self._nt)

    def coefficients(self) -> tuple[float, float]:
        """a >= 0, b > 0. Through the origin as long as all sizes were alike."""
        variance, slope = self._nn - self._n**2, self._t / self._n
        if variance > 1:
            slope = min(slope, max((self._nt - self._n * self._t) / variance, 0.1 * slope))
        return self._t - slope * self._n, slope

    def __bool__(self) -> bool:
        return bool(self._n)


class Pace:
    """chunk: prompt tokens of a step at most."""

    def __init__(self, chunk: int) -> None:
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: must be at least 1 token")
        self.chunk = chunk
        self._generating, self._computing = Times(), Line()
        self._usual, self._plain, self._share = 1.0, 0.0, 0.0

    def generated(self, rows: int, seconds: float) -> None:
        """A call that gave one token to each of `rows` rows took so long."""
        self._generating.add(rows, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """A call for `tokens` prompt tokens took so long."""
        self._computing.add(tokens, seconds)

    def stepped(self, seconds: float) -> None:
        """The step that `room` was asked for took so long. For as many tokens the median moves up as down."""
        if self._share:
            self._usual *= 1 + _MEDIAN * self._share * (1 if seconds > self._usual * self._plain else -1)
            self._usual = min(max(self._usual, 1.0), MOST)

    def room(self, decoding: int, live: int) -> int:
        """Prompt tokens of the next step, in which `decoding` rows of `live` that are wanted generate."""
        self._share = 0.0
        if not self._computing or (decoding and not len(self._generating)):
            return min(self.chunk, FIRST)
        seconds = LONGEST
        if decoding:
            self._share, self._plain = decoding / live, self._generating(live)
            seconds = SLACK * self._usual * self._plain - self._generating(decoding)
        a, b = self._computing.coefficients()
        return min(self.chunk, max(LEAST, int((seconds - a) / b)))
