"""Grouped products on a GPU, without padding and without a word to the CPU.

A tile of rows belongs to one run, so there are at most M / ROWS + E of them; a program finds its tile from the counts,
and those left over end at once. Programs that share rows or columns follow one another, for the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch, precision

BAND = 8  # tiles of rows that walk over the columns together


def forward(x_MD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """As `reference`."""
    return _product(x_MD, weight_EDF, counts_E)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    x_MD, weight_EDF, counts_E = args
    found = [_product(grads[0], weight_EDF.mT, counts_E)] if needs[0] else []
    if needs[1]:
        x_MD, g_MF = x_MD.contiguous(), grads[0].contiguous()
        count, dim, size = weight_EDF.shape
        dw_EDF = torch.empty(weight_EDF.shape, dtype=weight_EDF.dtype, device=weight_EDF.device)
        side, deep = (128, 64) if x_MD.element_size() == 2 else (64, 32)
        one, two = (min(side, max(16, triton.next_power_of_2(n))) for n in (dim, size))
        launch(
            _weight, (count * triton.cdiv(dim, one) * triton.cdiv(size, two),), x_MD, g_MF, counts_E, dw_EDF,
            len(x_MD), count, triton.next_power_of_2(count), dim, size, one, two, deep,
            precision(x_MD.dtype), num_warps=8 if one * two > 8192 else 4, num_stages=3,
        )  # fmt: skip
        found.append(dw_EDF)
    return found


def _product(x_MD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    x_MD = x_MD.contiguous()
    (rows, dim), (count, _, size) = x_MD.shape, weight_EDF.shape
    y_MF = x_MD.new_empty(rows, size)
    narrow = x_MD.element_size() == 2
    # Runs of few rows, as in decoding, take low tiles: the weights are what is read.
    tall = min(128 if narrow else 64, max(16, triton.next_power_of_2(triton.cdiv(rows, max(count, 1)))))
    wide = min(128 if narrow else 64, max(16, triton.next_power_of_2(size)))
    deep = min(64 if narrow else 32, max(16, triton.next_power_of_2(dim)))
    tiles, columns = triton.cdiv(rows, tall) + count, triton.cdiv(size, wide)
    launch(
        _rows, (tiles * columns if rows else 0,), x_MD, weight_EDF, counts_E, y_MF, rows, *weight_EDF.stride(), tiles,
        columns, count, triton.next_power_of_2(count), dim, size, tall, wide, deep, BAND, precision(x_MD.dtype),
        num_warps=8 if tall * wide > 8192 else 4, num_stages=4 if narrow else 3,
    )  # fmt: skip
    return y_MF


@triton.jit
def _rows(
    x, weight, counts, y, M, stride_e, stride_d, stride_f, tiles, columns,
    E: tl.constexpr, EBLOCK: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    band = program // (BAND * columns)
    high = tl.minimum(tiles - band * BAND, BAND)
    tile = band * BAND + program % (BAND * columns) % high
    column = program % (BAND * columns) // high
    e = tl.arange(0, EBLOCK)
    count = tl.load(counts + e, mask=e < E, other=0)
    tiles_of = (count + TALL - 1) // TALL
    own = tl.sum((tl.cumsum(tiles_of, 0) <= tile).to(tl.int32), 0)  # the run of this tile; past all real ones if none
    before = tl.sum(tl.where(e < own, tiles_of, 0), 0)
    start = tl.sum(tl.where(e < own, count, 0), 0)
    end = tl.minimum(start + tl.sum(tl.where(e == own, count, 0), 0), M)
    first = start + (tile - before) * TALL
    if first < end:
        m = first + tl.arange(0, TALL)
        f = column * WIDE + tl.arange(0, WIDE)
        d = tl.arange(0, DEEP)
        x_at = x + m.to(tl.int64)[:, None] * D + d[None, :]
        w_at = weight + own.to(tl.int64) * stride_e + d[:, None] * stride_d + f[None, :] * stride_f
        total = tl.zeros((TALL, WIDE), tl.float32)
        for done in range(0, D, DEEP):
            a = tl.load(x_at, mask=(m < end)[:, None] & (d < D - done)[None, :], other=0.0)
            b = tl.load(w_at, mask=(d < D - done)[:, None] & (f < F)[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            x_at += DEEP
            w_at += DEEP * stride_d
        inside = (m < end)[:, None] & (f < F)[None, :]
        tl.store(y + m.to(tl.int64)[:, None] * F + f[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _weight(
    x, g, counts, dweight, M,
    E: tl.constexpr, EBLOCK: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    ONE: tl.constexpr, TWO: tl.constexpr, DEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (F + TWO - 1) // TWO
    program = tl.program_id(0)
    own = program // (columns * ((D + ONE - 1) // ONE))
    d = program // columns % ((D + ONE - 1) // ONE) * ONE + tl.arange(0, ONE)
    f = program % columns * TWO + tl.arange(0, TWO)
    e = tl.arange(0, EBLOCK)
    count = tl.load(counts + e, mask=e < E, other=0)
    start = tl.sum(tl.where(e < own, count, 0), 0)
    end = tl.minimum(start + tl.sum(tl.where(e == own, count, 0), 0), M)
    total = tl.zeros((ONE, TWO), tl.float32)
    for first in range(start, end, DEEP):
        m = first + tl.arange(0, DEEP)
        a = tl.load(x + m[None, :] * D + d[:, None], mask=(m < end)[None, :] & (d < D)[:, None], other=0.0)
        b = tl.load(g + m[:, None] * F + f[None, :], mask=(m < end)[:, None] & (f < F)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = own.to(tl.int64) * D * F + d[:, None] * F + f[None, :]
    tl.store(dweight + at, total.to(dweight.dtype.element_ty), mask=(d < D)[:, None] & (f < F)[None, :])
