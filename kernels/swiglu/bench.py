"""The gated unit: bound by memory, so the copy is its limit."""

from collections.abc import Iterator

import torch

from kernels import swiglu
from kernels.bench import Bench, Case


def cases(bench: Bench) -> Iterator[Case]:
    """Two tensors in and one out forward; three in and two out backward."""

    def plain(gate, up):
        return torch.nn.functional.silu(gate) * up

    for rows, size in ((16384, 11008), (8192, 4096)) if bench.gpu else ((2048, 1024), (4096, 256)):
        yield Case(
            f"N{rows} D{size}",
            lambda rows=rows, size=size: {"gate": bench.randn(rows, size), "up": bench.randn(rows, size)},
            swiglu,
            0,
            3 * rows * size * bench.dtype.itemsize,
            backward=5 / 3,
            peers={"torch": plain} | ({"compiled": torch.compile(plain)} if bench.gpu else {}),
        )
