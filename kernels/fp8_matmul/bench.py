"""Products of 8-bit floats: twice the peak of bf16 on a GPU that has them; a CPU only emulates them."""

from collections.abc import Iterator
from functools import partial

import torch

from kernels import fp8_matmul
from kernels.bench import Bench, Case


def cases(bench: Bench) -> Iterator[Case]:
    """Whole-tensor scales and those of blocks; the peer computes in bf16 from the same operands, widened before."""
    sizes = ((8192, 8192, 8192), (16, 8192, 8192)) if bench.gpu else ((64, 512, 512),)
    for rows, dim, size in sizes:
        for kind in ("whole", "rows", "blocks"):

            def inputs(rows=rows, dim=dim, size=size, kind=kind):
                shapes = {"whole": ((1, 1), (1, 1)), "rows": ((rows, 1), (1, size))}
                shapes["blocks"] = (rows, dim // 128), (dim // 128, size // 128)
                scales = [torch.rand(shape, device=bench.device) for shape in shapes[kind]]
                a, b = (bench.randn(n, dim).to(torch.float8_e4m3fn) for n in (rows, size))
                return {"a_MK": a, "b_KN": b.T, "scale_a": scales[0], "scale_b": scales[1]}

            wide = [bench.randn(*shape).bfloat16() for shape in ((rows, dim), (dim, size))]
            peers = {"bfloat16": lambda wide=wide, **_: wide[0] @ wide[1]}
            if bench.gpu and kind != "blocks":
                peers["torch"] = lambda a_MK, b_KN, scale_a, scale_b: torch._scaled_mm(
                    a_MK, b_KN, scale_a, scale_b, out_dtype=torch.bfloat16
                )
            flops, moved = 2.0 * rows * dim * size, (rows + size) * dim + 2 * rows * size
            run = partial(fp8_matmul, dtype=torch.bfloat16)
            # float64 operands are not 8-bit ones, so the check of the bench has nothing to run; the tests have.
            yield Case(
                f"{kind} M{rows} K{dim} N{size}", inputs, run, flops, moved, backward=0, peers=peers, truth=False
            )
