"""Normalisation: bound by memory, so the copy is its limit."""

from collections.abc import Iterator

import torch

from kernels import layer_norm, rms_norm
from kernels.bench import Bench, Case


def cases(bench: Bench) -> Iterator[Case]:
    """One tensor in and one out forward; two in and one out backward."""
    functional = torch.nn.functional
    for rows, size in ((16384, 4096), (16384, 1024)) if bench.gpu else ((4096, 256), (2048, 1024)):

        def inputs(rows=rows, size=size):
            return {"x": bench.randn(rows, size), "weight": bench.randn(size)}

        moved = 2 * rows * size * bench.dtype.itemsize
        for name, run, peer in (
            ("rms", rms_norm, lambda x, weight: functional.rms_norm(x, weight.shape, weight, 1e-6)),
            ("layer", layer_norm, lambda x, weight: functional.layer_norm(x, weight.shape, weight)),
        ):
            shape = f"{name} N{rows} D{size}"
            yield Case(shape, inputs, run, 0, moved, backward=1.5, peers={"torch": peer})
