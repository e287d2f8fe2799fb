"""How often a stream is written to. Each write costs the server, its proxy and the client some work, whatever is in it.

A first token goes out at once, and so does every token while there are few streams. With more of them the events of
several steps go out together, so that all writes together take a bounded part of one core.
"""

import time

WRITE_SECONDS = 0.0007  # of one write, here and in Ray's proxy: measured with 32 streams
PART = 0.15  # of a core that writing may take
LONGEST = 0.1  # seconds that a token may wait


class Flow:
    """Of all streams of one process."""

    def __init__(self) -> None:
        self.streams = 0

    @property
    def interval(self) -> float:
        """Seconds between two writes of a stream."""
        return min(LONGEST, (self.streams - 1) * WRITE_SECONDS / PART)

    def rest(self, written: float) -> float:
        """Seconds to wait before the next write of a stream that wrote at `written` (`time.perf_counter`)."""
        return written + self.interval - time.perf_counter()
