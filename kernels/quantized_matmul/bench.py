"""Quantised linear layers: one row of x is decoding, where the bytes of the weight are the time."""

from collections.abc import Iterator
from functools import partial

import torch

from kernels import quantize, quantized_matmul
from kernels.bench import Bench, Case


def cases(bench: Bench) -> Iterator[Case]:
    """The peer reads the weight in the dtype of x: at best bits / 16 of its time with one row in bf16."""
    dim, size = (8192, 8192) if bench.gpu else (2048, 2048)
    weight = bench.randn(size, dim) * dim**-0.5
    for tokens in (1, 16, 4096) if bench.gpu else (1, 16):
        for bits, group in ((8, 0), (8, 128), (4, 128)):
            packed, scales, _ = quantize(weight, bits=bits, group=group)

            def inputs(tokens=tokens, packed=packed, scales=scales):
                return {"x_ND": bench.randn(tokens, dim), "packed_FP": packed, "scales_FG": scales}

            def linear(x_ND, packed_FP, scales_FG):
                return torch.nn.functional.linear(x_ND, weight)

            itemsize = bench.dtype.itemsize
            yield Case(
                f"int{bits} group {group or dim} N{tokens} D{dim} F{size}",
                inputs,
                partial(quantized_matmul, bits=bits),
                2.0 * tokens * dim * size,
                dim * size * bits / 8 + scales.nbytes + tokens * (dim + size) * itemsize,
                backward=0,
                peers={f"{bench.dtype} linear".removeprefix("torch."): linear},
            )
