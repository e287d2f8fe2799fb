"""Grouped products: bound by the matmul peak in training, by reading the weights in decoding."""

from collections.abc import Iterator

import torch

from kernels import grouped_matmul
from kernels.bench import Bench, Case


def cases(bench: Bench) -> Iterator[Case]:
    """One product forward, two backward; runs of unequal length."""

    def loop(x_MD, weight_EDF, counts_E):
        return torch.cat([x @ w for x, w in zip(x_MD.split(counts_E.tolist()), weight_EDF, strict=True)])

    def torchs(x_MD, weight_EDF, counts_E):
        return torch._grouped_mm(x_MD, weight_EDF, offs=counts_E.cumsum(0).int())

    sizes = ((65536, 64, 2048, 1408), (512, 64, 2048, 1408)) if bench.gpu else ((1024, 8, 256, 512), (16, 16, 256, 512))
    for rows, count, dim, size in sizes:

        def inputs(rows=rows, count=count, dim=dim, size=size):
            counts = torch.multinomial(torch.rand(count), rows, replacement=True).bincount(minlength=count)
            weight = bench.randn(count, dim, size) * dim**-0.5
            return {"x_MD": bench.randn(rows, dim), "weight_EDF": weight, "counts_E": counts.to(bench.device)}

        yield Case(
            f"M{rows} E{count} D{dim} F{size}",
            inputs,
            grouped_matmul,
            2.0 * rows * dim * size,
            (rows * (dim + size) + count * dim * size) * bench.dtype.itemsize,
            backward=2,
            peers={"loop": loop} | ({"torch": torchs} if bench.gpu else {}),
        )
