"""The nearest code on a GPU: distances to a tile of codes live in registers; best and second best are all that is kept.

Rows whose two best are nearer to each other than rounding can tell are compared again, by differences in float64: a
program per row, of which nearly all end at once. The CPU need not know how many.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch, precision
from kernels.nearest_code.bound import bound


def forward(x_ND: Tensor, codes_CD: Tensor) -> Tensor:
    """As `reference`."""
    dtype = torch.promote_types(x_ND.dtype, codes_CD.dtype)
    x_ND, codes_CD = x_ND.to(dtype).contiguous(), codes_CD.to(dtype).contiguous()
    (rows, dim), count = x_ND.shape, len(codes_CD)
    half_C = codes_CD.float().square().sum(1) / 2
    index_N = torch.empty(rows, dtype=torch.int64, device=x_ND.device)
    gap_N = x_ND.new_empty(rows, dtype=torch.float32)
    narrow = dtype.itemsize == 2
    tall = min(128 if narrow else 64, max(16, triton.next_power_of_2(rows)))
    wide = min(128 if narrow else 64, max(16, triton.next_power_of_2(count)))
    deep = min(64 if narrow else 32, max(16, triton.next_power_of_2(dim)))
    launch(
        _search, (triton.cdiv(rows, tall),), x_ND, codes_CD, half_C, index_N, gap_N, rows, count,
        dim, tall, wide, deep, precision(dtype), num_warps=8 if tall * wide > 4096 else 4, num_stages=3,
    )  # fmt: skip
    block = triton.next_power_of_2(max(dim, 1))
    launch(
        _compare, (rows,), x_ND, codes_CD, index_N, gap_N, bound(x_ND.float(), half_C), count, dim, block,
        max(1, min(64, 2048 // block)), num_warps=4,
    )  # fmt: skip
    return index_N


@triton.jit
def _search(
    x, codes, half, index, gap, N, C,
    D: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TALL + tl.arange(0, TALL)
    k = tl.arange(0, DEEP)
    best = tl.full((TALL,), float("inf"), tl.float32)
    second = tl.full((TALL,), float("inf"), tl.float32)
    found = tl.zeros((TALL,), tl.int32)
    x_at = x + n.to(tl.int64)[:, None] * D + k[None, :]
    for start in range(0, C, WIDE):
        c = start + tl.arange(0, WIDE)
        made = tl.zeros((TALL, WIDE), tl.float32)
        for first in range(0, D, DEEP):
            a = tl.load(x_at + first, mask=(n < N)[:, None] & (first + k < D)[None, :], other=0.0)
            at = c.to(tl.int64)[None, :] * D + first + k[:, None]
            b = tl.load(codes + at, mask=(c < C)[None, :] & (first + k < D)[:, None], other=0.0)
            made = tl.dot(a, b, made, input_precision=PRECISION)
        score = tl.load(half + c, mask=c < C, other=float("inf"))[None, :] - made
        least = tl.min(score, 1)
        at = tl.min(tl.where(score == least[:, None], c[None, :], 2147483647), 1)
        other = tl.min(tl.where(c[None, :] == at[:, None], float("inf"), score), 1)
        second = tl.minimum(tl.maximum(best, least), tl.minimum(second, other))
        found = tl.where(least < best, at, found)
        best = tl.minimum(best, least)
    tl.store(index + n, found.to(tl.int64), mask=n < N)
    tl.store(gap + n, second - best, mask=n < N)


@triton.jit
def _compare(
    x, codes, index, gap, near, C, D: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    if tl.load(gap + n) <= tl.load(near + n):
        d = tl.arange(0, BLOCK)
        value = tl.load(x + n * D + d, mask=d < D, other=0.0).to(tl.float32).to(tl.float64)
        best = tl.full((), float("inf"), tl.float64)
        found = tl.full((), 0, tl.int32)
        for start in range(0, C, LINES):
            c = start + tl.arange(0, LINES)
            inside = (c < C)[:, None] & (d < D)[None, :]
            at = c.to(tl.int64)[:, None] * D + d[None, :]
            other = tl.load(codes + at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
            off = tl.where(inside, value[None, :] - other, 0.0)
            distance = tl.where(c < C, tl.sum(off * off, 1), float("inf"))
            least = tl.min(distance, 0)
            at_least = tl.min(tl.where(distance == least, c, 2147483647), 0)
            found = tl.where(least < best, at_least, found)
            best = tl.minimum(best, least)
        tl.store(index + n, found.to(tl.int64))
