"""The nearest code: a product, whose result never leaves the chip on a GPU."""

from collections.abc import Iterator

import torch

from kernels import nearest_code
from kernels.bench import Bench, Case


def cases(bench: Bench) -> Iterator[Case]:
    """The peer holds all distances, and is not exact where two are near."""

    def cdist(x_ND, codes_CD):
        return torch.cdist(x_ND.float(), codes_CD.float()).argmin(1)

    for rows, count, dim in (
        ((65536, 8192, 64), (65536, 1024, 256)) if bench.gpu else ((4096, 1024, 64), (1024, 256, 64))
    ):
        yield Case(
            f"N{rows} C{count} D{dim}",
            lambda rows=rows, count=count, dim=dim: {
                "x_ND": bench.randn(rows, dim),
                "codes_CD": bench.randn(count, dim),
            },
            nearest_code,
            2.0 * rows * count * dim,
            (rows + count) * dim * bench.dtype.itemsize + 8 * rows,
            backward=0,
            peers={"cdist": cdist},
        )
