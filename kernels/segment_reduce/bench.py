"""Message passing: bound by memory; each message is read once, each node written once."""

from collections.abc import Iterator
from functools import partial

import torch

from kernels import segment_reduce
from kernels.bench import Bench, Case


def cases(bench: Bench) -> Iterator[Case]:
    """The peer is torch's scatter, which adds atomically on a GPU."""

    def scatter(x_ED, segments_E, count, reduce):
        start = x_ED.new_zeros(count, x_ED.shape[1])
        index = segments_E[:, None].expand_as(x_ED)
        return start.scatter_reduce(0, index, x_ED, {"max": "amax"}.get(reduce, reduce), include_self=False)

    edges, count, dim = (2**20, 2**16, 128) if bench.gpu else (2**15, 2**11, 64)
    for reduce in ("sum", "mean", "max"):
        yield Case(
            f"{reduce} E{edges} N{count} D{dim}",
            lambda: {
                "x_ED": bench.randn(edges, dim),
                "segments_E": torch.randint(0, count, (edges,), device=bench.device),
            },
            partial(segment_reduce, count=count, reduce=reduce),
            0,
            (edges + count) * dim * bench.dtype.itemsize + 8 * edges,
            backward=1 if reduce != "max" else 2,
            peers={"scatter": partial(scatter, count=count, reduce=reduce)},
        )
