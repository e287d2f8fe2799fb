"""Sparse softmax: bound by memory on a GPU, with the threshold found on chip; on a CPU by the passes to find it."""

from collections.abc import Iterator
from functools import partial

from kernels import entmax
from kernels.bench import Bench, Case
from kernels.entmax.reference import reference


def cases(bench: Bench) -> Iterator[Case]:
    """One tensor in and one out forward; two in and one out backward. Softmax is there for the scale."""
    for rows, size in ((65536, 4096), (262144, 1024)) if bench.gpu else ((512, 256), (128, 1024)):
        for alpha in (1.5, 2.0, 1.25):
            yield Case(
                f"alpha {alpha} N{rows} D{size}",
                lambda rows=rows, size=size: {"x": bench.randn(rows, size)},
                partial(entmax, alpha=alpha),
                0,
                2 * rows * size * bench.dtype.itemsize,
                backward=1.5,
                peers={"definition": lambda x, alpha=alpha: reference(x, alpha), "softmax": lambda x: x.softmax(-1)},
            )
