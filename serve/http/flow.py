"""How often a stream is written to. Each write costs the server, its proxy and the client some work, whatever is in it.

A first token goes out at once. Those of several steps go out together, the later the more streams there are, so that
all writes together take a bounded part of the machine: where the engine has the same cores, it has the rest. All
streams are written to at the same moments, for much of what a write costs is to wake the threads it passes through.
"""

import os
import time

WRITE_SECONDS = 0.0011  # of one write, in the gateway and in Ray's proxy: measured with 32 streams
PART = 0.05 * (os.cpu_count() or 1)  # of a core that writing may take
LONGEST = 0.1  # seconds that a token may wait


class Flow:
    """Of all streams of one process."""

    def __init__(self) -> None:
        self.streams = 0

    @property
    def interval(self) -> float:
        """Seconds between two moments of writing."""
        return min(LONGEST, self.streams * WRITE_SECONDS / PART)

    def rest(self) -> float:
        """Seconds until the next moment."""
        interval = self.interval
        return interval - time.perf_counter() % interval
