"""How many prompt tokens a step may compute beside those that generate, so that a stream never stutters.

    tokens(step) = max(page, (SLACK t(live) - t(decoding)) / c)

t is the measured time of a call that generates one token for each of so many rows, c that of one prompt token. A step
with prompt tokens in it then lasts at most SLACK times a step of all rows that are there or wait: the slowest gaps
between two tokens of a stream stay below twice the usual one. With nothing generating, a step takes all it may.
"""

from serve.width import Times

SLACK = 1.8
_FORGET = 0.2  # weight of a new measurement


class Pace:
    """chunk: prompt tokens of a step at most. least: of any step."""

    def __init__(self, chunk: int, least: int) -> None:
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: must be at least 1 token")
        self.chunk, self.least = chunk, min(least, chunk)
        self._calls, self._token = Times(), 0.0

    def generated(self, rows: int, seconds: float) -> None:
        """A call that gave one token to each of `rows` rows took so long."""
        self._calls.add(rows, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """A call for `tokens` prompt tokens took so long."""
        cost = seconds / tokens
        self._token = self._token + _FORGET * (cost - self._token) if self._token else cost

    def room(self, decoding: int, live: int) -> int:
        """Prompt tokens of the next step, in which `decoding` rows of `live` that are wanted generate."""
        if not decoding or not self._token or not len(self._calls):
            return self.chunk
        seconds = SLACK * self._calls(live) - self._calls(decoding)
        return min(self.chunk, max(self.least, int(seconds / self._token)))
