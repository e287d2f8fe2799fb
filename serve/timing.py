"""How long requests wait and are computed, and how much a step computes, as histograms in an engine's numbers.

They are plain numbers by name, so that those of several engines are summed like all others (`serve.replicas.remote`).
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
KINDS = {  # name and bounds
    "queue": SECONDS,  # from submission to the first row
    "prefill": SECONDS,  # from there to the first token
    "decode": SECONDS,  # from there to the end
    "inference": SECONDS,  # both together
    "step": TOKENS,  # computed in one
}


class Timing:
    """Counts of all KINDS."""

    def __init__(self) -> None:
        self._counts = {kind: [0] * (len(bounds) + 1) for kind, bounds in KINDS.items()}
        self._sums = dict.fromkeys(KINDS, 0.0)

    def add(self, kind: str, value: float) -> None:
        self._counts[kind][bisect_left(KINDS[kind], value)] += 1
        self._sums[kind] += value

    def ended(self, arrived: float, begun: float, first: float, now: float) -> None:
        """The times of a request, in seconds of one clock."""
        for kind, value in zip(KINDS, (begun - arrived, first - begun, now - first, now - begun)):
            self.add(kind, value)

    def stats(self) -> dict[str, float]:
        """As `read` takes them."""
        told: dict[str, float] = {_key(kind, "sum"): value for kind, value in self._sums.items()}
        for kind, counts in self._counts.items():
            told |= {_key(kind, bound): count for bound, count in zip((*KINDS[kind], "inf"), counts)}
        return told


def read(stats: Mapping[str, float], kind: str) -> tuple[Sequence[tuple[str, float]], float] | None:
    """Of the numbers of one engine or several: (bound, count of what is at most that) of each, and the sum of all.

    None when there are none.
    """
    if _key(kind, "sum") not in stats:
        return None
    bounds = (*KINDS[kind], "inf")
    counts = accumulate(stats[_key(kind, bound)] for bound in bounds)
    spelled = [*map(str, map(float, KINDS[kind])), "+Inf"]
    return list(zip(spelled, counts)), stats[_key(kind, "sum")]


def _key(kind: str, bound: float | str) -> str:
    return f"{kind}_le_{bound}"
