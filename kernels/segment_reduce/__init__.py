"""What a node of a graph makes of the messages it gets: their sum, mean or maximum."""

from torch import Tensor

from kernels import check, op
from kernels.segment_reduce.chunked import chunked, grad
from kernels.segment_reduce.reference import reference


def _fake(x_ED: Tensor, segments_E: Tensor, count: int, reduce: str) -> Tensor:
    return x_ED.new_empty(count, x_ED.shape[1])


_op = op.Op("segment_reduce", reference, chunked, _fake, grad=grad)


def segment_reduce(x_ED: Tensor, segments_E: Tensor, count: int, *, reduce: str = "sum") -> Tensor:
    """y (count, D): the sum, mean or max of the rows of x with each segment number; 0 where there are none.

    x (E, D) floating; segments (E) int64 in 0..count - 1, in any order. Computed in fp32 (fp64 for fp64), y in x.dtype.
    Gradient for x; that of a maximum is shared by the equals, as torch's amax has it. On a GPU the result is the same
    every time: nothing is added atomically. Raises ValueError or TypeError naming the argument; segment numbers are
    checked on a CPU only, on a GPU rows of others are left out, and their gradient is not defined.
    """
    name = "segment_reduce"
    check.shape(name, "x_ED", x_ED, (None, None), "(E, D)")
    check.floating(name, "x_ED", x_ED)
    check.shape(name, "segments_E", segments_E, (len(x_ED),), f"(E={len(x_ED)},), E from x_ED")
    check.whole(name, "segments_E", segments_E)
    check.device(name, "segments_E", segments_E, x_ED)
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}: count must be an int, got {type(count).__name__}")
    if count < 0:
        raise ValueError(f"{name}: count={count} must be at least 0")
    if reduce not in ("sum", "mean", "max"):
        raise ValueError(f"{name}: reduce={reduce!r} must be sum, mean or max")
    return _op(x_ED, segments_E, count, reduce)
