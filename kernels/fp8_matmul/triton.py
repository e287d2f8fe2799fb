"""Products of 8-bit floating-point matrices on a GPU's tensor cores, with sums in fp32.

A step is a block of K, after which its scales meet the sum; scales of whole rows and columns wait for the end. On
Hopper the cores want b with its K next to each other: pass the transpose of a weight (N, K).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8_matmul.reference import BLOCK
from kernels.launch import launch

BAND = 8  # tiles of rows that walk over the columns together, for the L2 cache


def forward(a_MK: Tensor, b_KN: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: str) -> Tensor:
    """As `reference`."""
    (rows, dim), size = a_MK.shape, b_KN.shape[1]
    y_MN = torch.empty(rows, size, dtype=getattr(torch, dtype), device=a_MK.device)
    tall = min(128, max(16, triton.next_power_of_2(rows)))
    wide = 128 if tall > 16 else 64
    tiles, columns = triton.cdiv(rows, tall), triton.cdiv(size, wide)
    blocked = scale_a.shape[1] > 1 or len(scale_b) > 1
    share = size if scale_b.shape[1] == 1 else 1 if scale_b.shape[1] == size else BLOCK
    steps = [n if scale.shape[axis] > 1 else 0 for scale in (scale_a, scale_b) for axis, n in enumerate(scale.stride())]
    launch(
        _kernel, (tiles * columns,), a_MK, b_KN, scale_a, scale_b, y_MN, rows, size, dim, tiles, columns,
        *a_MK.stride(), *b_KN.stride(), *steps, share, tall, wide, BLOCK, BAND, blocked,
        num_warps=8 if tall > 64 else 4, num_stages=4,
    )  # fmt: skip
    return y_MN


@triton.jit
def _kernel(
    a, b, scale_a, scale_b, y, M, N, K, tiles, columns,
    a_row, a_column, b_row, b_column, of_row, of_row_block, of_column_block, of_column, share,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, BAND: tl.constexpr, BLOCKED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    band = program // (BAND * columns)
    high = tl.minimum(tiles - band * BAND, BAND)
    m = (band * BAND + program % (BAND * columns) % high) * TALL + tl.arange(0, TALL)
    n = program % (BAND * columns) // high * WIDE + tl.arange(0, WIDE)
    k = tl.arange(0, DEEP)
    a_at = a + m.to(tl.int64)[:, None] * a_row + k[None, :] * a_column
    b_at = b + n.to(tl.int64)[None, :] * b_column + k[:, None] * b_row
    sa_at = scale_a + m * of_row
    sb_at = scale_b + n // share * of_column
    total = tl.zeros((TALL, WIDE), tl.float32)
    for done in range(0, K, DEEP):
        one = tl.load(a_at, mask=(m < M)[:, None] & (k < K - done)[None, :], other=0.0)
        two = tl.load(b_at, mask=(n < N)[None, :] & (k < K - done)[:, None], other=0.0)
        if BLOCKED:
            sa = tl.load(sa_at, mask=m < M, other=0.0).to(tl.float32)
            sb = tl.load(sb_at, mask=n < N, other=0.0).to(tl.float32)
            total += tl.dot(one, two) * sa[:, None] * sb[None, :]
            sa_at += of_row_block
            sb_at += of_column_block
        else:
            # Hopper's cores add 8-bit products up in fewer bits than 24: they are to hand over after each step.
            total = tl.dot(one, two, total, max_num_imprecise_acc=DEEP)
        a_at += DEEP * a_column
        b_at += DEEP * b_row
    if not BLOCKED:
        sa = tl.load(sa_at, mask=m < M, other=0.0).to(tl.float32)
        total *= sa[:, None] * tl.load(sb_at, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=inside)
