"""Products with a weight of few bits on a GPU: numbers become operands in registers, scales meet the sums.

A step covers numbers of one group, so that the product is of x with whole numbers, which bf16 holds exactly. With few
rows of x the weight's columns are split between programs, whose sums are added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch, precision
from kernels.quantized_matmul.reference import SYMMETRIC

PROGRAMS = 264  # two for each processor of a large card


def forward(
    x_ND: Tensor, packed_FP: Tensor, scales_FG: Tensor, zeros_FG: Tensor | None, bits: int, group: int
) -> Tensor:
    """As `reference`."""
    x_ND, packed_FP, scales_FG = (v.contiguous() for v in (x_ND, packed_FP, scales_FG))
    zeros_FG = None if zeros_FG is None else zeros_FG.contiguous()
    (tokens, dim), rows = x_ND.shape, len(packed_FP)
    tall = min(64, max(16, triton.next_power_of_2(tokens)))
    narrow = x_ND.element_size() == 2
    wide = 128 if narrow and tall == 64 else 64
    deep = next(n for n in ((128, 64, 32) if narrow else (32,)) if group % n == 0 or n == 32)
    tiles = triton.cdiv(tokens, tall) * triton.cdiv(rows, wide)
    steps = triton.cdiv(dim, deep)
    splits = max(1, min(steps // 4, PROGRAMS // max(tiles, 1))) if tokens <= 64 else 1
    sums = x_ND.new_empty(splits, tokens, rows, dtype=x_ND.dtype if splits == 1 else torch.float32)
    launch(
        _kernel, (tiles * splits,), x_ND, packed_FP, scales_FG, zeros_FG, sums, tokens, rows, tiles,
        triton.cdiv(steps, splits) * deep, dim, group, bits, SYMMETRIC[bits], tall, wide, deep, precision(x_ND.dtype),
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return sums[0] if splits == 1 else sums.sum(0).to(x_ND.dtype)


@triton.jit
def _operand(q, zeros, row, part, F, GROUPS: tl.constexpr, SYMMETRIC: tl.constexpr, dtype: tl.constexpr):
    """Numbers (deep, wide) less the one that stands for 0."""
    q = q.to(tl.float32)
    if zeros is not None:
        q -= tl.load(zeros + row * GROUPS + part, mask=row < F, other=0.0).to(tl.float32)[None, :]
    else:
        q -= SYMMETRIC
    return q.to(dtype)


@triton.jit
def _kernel(
    x, packed, scales, zeros, sums, N, F, tiles, share,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = D // GROUP
    split, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n = tile % tl.cdiv(N, TALL) * TALL + tl.arange(0, TALL)
    row = tile // tl.cdiv(N, TALL) * WIDE + tl.arange(0, WIDE)
    row_at = row.to(tl.int64)
    x_at = n.to(tl.int64)[:, None] * D
    total = tl.zeros((TALL, WIDE), tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, D), DEEP):
        part = start // GROUP
        if BITS == 8:
            d = start + tl.arange(0, DEEP)
            a = tl.load(x + x_at + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
            q = tl.load(packed + row_at[None, :] * D + d[:, None], mask=(row < F)[None, :] & (d < D)[:, None], other=0)
            made = tl.dot(a, _operand(q, zeros, row_at, part, F, GROUPS, SYMMETRIC, a.dtype), input_precision=PRECISION)
        else:
            p = start // 2 + tl.arange(0, DEEP // 2)
            inside = (n < N)[:, None] & (2 * p < D)[None, :]
            even = tl.load(x + x_at + 2 * p[None, :], mask=inside, other=0.0)
            odd = tl.load(x + x_at + 2 * p[None, :] + 1, mask=inside, other=0.0)
            inside = (row < F)[None, :] & (2 * p < D)[:, None]
            q = tl.load(packed + row_at[None, :] * (D // 2) + p[:, None], mask=inside, other=0)
            low = _operand(q & 15, zeros, row_at, part, F, GROUPS, SYMMETRIC, even.dtype)
            high = _operand(q >> 4, zeros, row_at, part, F, GROUPS, SYMMETRIC, even.dtype)
            made = tl.dot(even, low, input_precision=PRECISION)
            made = tl.dot(odd, high, made, input_precision=PRECISION)
        scale = tl.load(scales + row_at * GROUPS + part, mask=row < F, other=0.0).to(tl.float32)
        total += made * scale[None, :]
    at = split.to(tl.int64) * N * F + n.to(tl.int64)[:, None] * F + row[None, :]
    tl.store(sums + at, total.to(sums.dtype.element_ty), mask=(n < N)[:, None] & (row < F)[None, :])
