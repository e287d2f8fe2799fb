"""When tokens came, and what that says: how many a second, how long until the first, how long from one to the next."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

Stream = list[tuple[float, int]]  # of a request: seconds since all were asked, and tokens that had come by then


@dataclass(frozen=True)
class Round:
    """rate: tokens a second of all requests together, from when each has begun until the last has ended.

    first: seconds to a first token, the median request's.
    middle, late: seconds from one arrival to the next of the same request, P50 and P99.
    """

    rate: float
    first: float
    middle: float
    late: float

    @classmethod
    def of(cls, streams: Sequence[Stream]) -> "Round":
        begin = max(stream[0][0] for stream in streams)
        end = max(stream[-1][0] for stream in streams)
        came = sum(stream[-1][1] - _by(stream, begin) for stream in streams)
        gaps = sorted(later - sooner for stream in streams for (sooner, _), (later, _) in zip(stream, stream[1:]))
        first = statistics.median(stream[0][0] for stream in streams)
        rate = came / (end - begin) if end > begin else 0.0
        return cls(rate, first, percentile(gaps, 0.50), percentile(gaps, 0.99))

    def json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Rounds:
    """Several of them: medians, and how far the rates lie apart, as a part of their median."""

    rate: float
    first: float
    middle: float
    late: float
    spread: float

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> "Rounds":
        medians = {name: statistics.median(asdict(one)[name] for one in rounds) for name in Round.__annotations__}
        rates = [one.rate for one in rounds]
        return cls(**medians, spread=(max(rates) - min(rates)) / max(medians["rate"], 1e-9))


def percentile(ordered: Sequence[float], part: float) -> float:
    """The smallest of `ordered` that so many of them do not exceed; 0 when there are none."""
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)] if ordered else 0.0


def _by(stream: Stream, seconds: float) -> int:
    return max((count for time, count in stream if time <= seconds), default=0)
