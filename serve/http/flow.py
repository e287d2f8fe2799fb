"""How often a stream is written to. Each write costs the server, its proxy and the client some work, whatever is in it.

A first token goes out at once. Those of several steps go out together, the later the more streams there are, so that
all writes together take a bounded part of the machine: where the engine has the same cores, it has the rest.
"""

import os
import time

WRITE_SECONDS = 0.0011  # of one write, in the gateway and in Ray's proxy: measured with 32 streams
PART = 0.05 * (os.cpu_count() or 1)  # of a core that writing may take
LONGEST = 0.2  # seconds that a token may wait


class Flow:
    """Of all streams of one process."""

    def __init__(self) -> None:
        self.streams = 0

    @property
    def interval(self) -> float:
        """Seconds between two writes of a stream."""
        return min(LONGEST, self.streams * WRITE_SECONDS / PART)

    def rest(self, written: float) -> float:
        """Seconds to wait before the next write of a stream that wrote at `written` (`time.perf_counter`)."""
        return written + self.interval - time.perf_counter()
