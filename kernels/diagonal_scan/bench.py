"""The elementwise recurrence: bound by memory, three numbers moved for each one made."""

from collections.abc import Iterator

import torch

from kernels import diagonal_scan
from kernels.bench import Bench, Case
from kernels.diagonal_scan.reference import reference


def cases(bench: Bench) -> Iterator[Case]:
    """Backward reads decay, x and the output's gradient, and writes two gradients."""
    sizes = ((8, 4096, 2048), (1, 65536, 2048)) if bench.gpu else ((1, 2048, 64), (1, 4096, 64), (1, 32768, 64))
    for rows, tokens, size in sizes:

        def inputs(rows=rows, tokens=tokens, size=size):
            return {"decay": torch.sigmoid(bench.randn(rows, tokens, size)), "x": bench.randn(rows, tokens, size)}

        def loop(decay, x):
            return reference(x, decay, None, None, 0)

        peers = {}
        if tokens == 2048 and not bench.gpu:
            peers["loop"] = loop
        if bench.fla:
            peers["fla hgrn"] = hgrn
        moved = 3 * rows * tokens * size * bench.dtype.itemsize
        yield Case(
            f"B{rows} T{tokens} D{size}", inputs, diagonal_scan, 0, moved,
            backward=5 / 3, peers=peers, series="tokens" if tokens != 2048 else "", tokens=tokens,
        )  # fmt: skip


def hgrn(decay, x):
    """flash-linear-attention's recurrence of the same kind; it takes the logarithm of the decay."""
    from fla.ops.hgrn import chunk_hgrn

    return chunk_hgrn(x, decay.log())[0]
