"""Rotary embedding: bound by memory, so the copy is its limit."""

from collections.abc import Iterator

import torch

from kernels import rope
from kernels.bench import Bench, Case
from kernels.rope.reference import reference


def cases(bench: Bench) -> Iterator[Case]:
    """One tensor in and one out, each way."""
    sizes = ((4, 4096, 32, 128), (1, 32768, 8, 128)) if bench.gpu else ((4, 512, 8, 64), (16, 1, 8, 64))
    for rows, tokens, heads, size in sizes:

        def inputs(rows=rows, tokens=tokens, heads=heads, size=size):
            angle = torch.rand(1, tokens, size // 2, device=bench.device) * 6
            return {"x_BTHK": bench.randn(rows, tokens, heads, size), "cos_BTR": angle.cos(), "sin_BTR": angle.sin()}

        def fixed(run):
            return lambda x_BTHK, cos_BTR, sin_BTR: run(x_BTHK, cos_BTR.detach(), sin_BTR.detach())

        def plain(x_BTHK, cos_BTR, sin_BTR):
            return reference(x_BTHK, cos_BTR, sin_BTR, False)

        yield Case(
            f"B{rows} T{tokens} H{heads} K{size}",
            inputs,
            fixed(rope),
            0,
            2 * rows * tokens * heads * size * bench.dtype.itemsize,
            backward=1,
            peers={"torch": fixed(plain)} | ({"compiled": fixed(torch.compile(plain))} if bench.gpu else {}),
        )
