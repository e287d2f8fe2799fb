"""Rectified softmax: bound by memory, so the copy is its limit."""

from collections.abc import Iterator

import torch

from kernels import softpick
from kernels.bench import Bench, Case
from kernels.softpick.reference import reference


def cases(bench: Bench) -> Iterator[Case]:
    """One tensor in and one out forward; two in and one out backward. Softmax is there for the scale."""
    for rows, size in ((65536, 4096), (262144, 1024)) if bench.gpu else ((2048, 512), (512, 2048)):
        yield Case(
            f"N{rows} D{size}",
            lambda rows=rows, size=size: {"x": bench.randn(rows, size)},
            softpick,
            0,
            2 * rows * size * bench.dtype.itemsize,
            backward=1.5,
            peers={"torch": reference, "softmax": lambda x: x.softmax(-1)}
            | ({"compiled": torch.compile(reference)} if bench.gpu else {}),
        )
