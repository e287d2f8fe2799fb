"""Packed weights: one row is decoding alone, where the bytes of the weight are the time; 32 is a batch."""

from collections.abc import Iterator

import torch

from kernels.bench import Bench, Case
from kernels.packed_linear import pack, packed_linear


def cases(bench: Bench) -> Iterator[Case]:
    """The peer is torch's product with the weight that is not packed. There is no form for GPUs."""
    if bench.gpu:
        return
    dim, size = 1024, 4096
    weight = bench.randn(size, dim) * dim**-0.5
    names = ("int8", "int4", "bf16" if bench.dtype == torch.bfloat16 else "fp32")
    for tokens in (1, 8, 32):
        for name in names:
            packed = pack(weight, name)

            def inputs(tokens=tokens):
                return {"x": bench.randn(tokens, dim)}

            def run(x, packed=packed):
                with torch.inference_mode():
                    return packed_linear(x, packed)

            def linear(x):
                return torch.nn.functional.linear(x, weight)

            yield Case(
                f"{name} N{tokens} D{dim} F{size}",
                inputs,
                run,
                2.0 * tokens * dim * size,
                packed.weight.nbytes + tokens * (dim + size) * bench.dtype.itemsize,
                backward=0,
                peers={f"{bench.dtype} linear".removeprefix("torch."): linear},
                truth=False,
            )
