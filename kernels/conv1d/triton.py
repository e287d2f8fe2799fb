"""Causal depthwise convolution on a GPU: one pass forward, two back (the outputs' slopes and the weights', then x's).

Without segments a tap is the row a few columns before, or one of the carried tail. With them, two small tables made
beforehand say where the real tokens are: `rank` numbers them in their row, `column` is where the n-th one is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.conv1d.tail import give, order, places, take
from kernels.launch import launch

ROWS = 32  # tokens of a tile
PROGRAMS = 128  # along time, of the pass that adds up the weights' gradients


def forward(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    state_BWD: Tensor | None,
    segments_BT: Tensor | None,
    silu: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """As `reference`."""
    given = _given(x_BTD, weight_DW, bias_D, state_BWD, segments_BT)
    rows, tokens, size = x_BTD.shape
    taps = weight_DW.shape[1]
    y = torch.empty_like(given[0])
    block = _block(size)
    launch(
        _forward, (rows * triton.cdiv(tokens, ROWS), triton.cdiv(size, block)), *given, y, tokens,
        size, taps, block, ROWS, silu, num_warps=4,
    )  # fmt: skip
    state = take(x_BTD, state_BWD, *places(segments_BT, rows, tokens, keep, taps - 1, x_BTD.device))
    return y, state if keep else state[:, 0]


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    x_BTD, weight_DW, bias_D, state_BWD, segments_BT, silu, keep = args
    given = _given(x_BTD, weight_DW, bias_D, state_BWD, segments_BT)
    rows, tokens, size = x_BTD.shape
    taps = weight_DW.shape[1]
    dy = grads[0].contiguous()
    block, wide = _block(size), triton.next_power_of_2(taps)
    programs = min(PROGRAMS, rows * triton.cdiv(tokens, ROWS))
    g = torch.empty_like(dy, dtype=torch.float32) if silu else dy
    dweight = dy.new_empty(programs, size, taps, dtype=torch.float32)
    dbias = None if bias_D is None else dy.new_empty(programs, size, dtype=torch.float32)
    launch(
        _slopes, (programs, triton.cdiv(size, block)), *given, dy, g if silu else None, dweight, dbias,
        rows, tokens, size, taps, block, wide, ROWS, num_warps=4,
    )  # fmt: skip
    dx = torch.empty_like(given[0]) if segments_BT is None else torch.zeros_like(given[0])
    dstate = dy.new_empty(rows, taps - 1, size)
    launch(
        _inputs, (rows * triton.cdiv(tokens + taps - 1, ROWS), triton.cdiv(size, block)), given[1], *given[4:],
        g, dx, dstate, tokens, size, taps, block, ROWS, num_warps=4,
    )  # fmt: skip
    give(grads[1], *places(segments_BT, rows, tokens, keep, taps - 1, x_BTD.device), dx, dstate)
    found = (dx, dweight.sum(0), None if dbias is None else dbias.sum(0), dstate)
    return [v.to(arg.dtype) for v, arg, need in zip(found, args, needs, strict=False) if need]


def _given(x_BTD, weight_DW, bias_D, state_BWD, segments_BT) -> list[Tensor | None]:
    """x, weight, bias, tail, segment numbers, rank and column as the kernels take them."""
    rank = column = None
    if segments_BT is not None:
        real_BT = segments_BT >= 0
        rank = torch.where(real_BT, real_BT.cumsum(1) - 1, -1).to(torch.int32)
        column = order(segments_BT).to(torch.int32)
    tail = None if state_BWD is None else state_BWD.to(x_BTD.dtype)
    given = (x_BTD, weight_DW, bias_D, tail, segments_BT, rank, column)
    return [v if v is None else v.contiguous() for v in given]


def _block(size: int) -> int:
    return min(128, max(16, triton.next_power_of_2(size)))


@triton.jit
def _tap(x, tail, number, column, line, row, t, n, d, inside, BACK: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """The input BACK real tokens before those of rank n in columns t, as fp32; 0 before their documents' start."""
    m = n - BACK
    here = inside & (m >= 0)
    at = m
    early = inside & (m < 0)
    if number is not None:
        at = tl.load(column + line + m, mask=here, other=0).to(tl.int64)
        own = tl.load(number + line + t, mask=inside, other=0)
        here = here & (tl.load(number + line + at, mask=here, other=-2) == own)
        early = early & (own == 0)
    real_d = (d < D)[None, :]
    value = tl.load(x + (line + at)[:, None] * D + d[None, :], mask=here[:, None] & real_d, other=0.0).to(tl.float32)
    if tail is not None:
        place = (row * (W - 1) + m + W - 1)[:, None] * D + d[None, :]
        value += tl.load(tail + place, mask=early[:, None] & real_d, other=0.0).to(tl.float32)
    return value


@triton.jit
def _weight(weight, d, BACK: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    return tl.load(weight + d * W + (W - 1 - BACK), mask=d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _rank(number, rank, line, t, tokens):
    """The ranks of the tokens in columns t, and which of them are real."""
    inside = t < tokens
    n = t
    if number is not None:
        n = tl.load(rank + line + t, mask=inside, other=-1).to(tl.int64)
        inside = inside & (n >= 0)
    return n, inside


@triton.jit
def _sum(
    x, weight, bias, tail, number, column, line, row, t, n, d, inside,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The convolution before the activation."""
    y = tl.zeros((ROWS, BLOCK), tl.float32)
    if bias is not None:
        y += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(W):
        y += _tap(x, tail, number, column, line, row, t, n, d, inside, back, D, W) * _weight(weight, d, back, D, W)
    return y


@triton.jit
def _forward(
    x, weight, bias, tail, number, rank, column, y, tokens,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, ROWS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = row * tokens
    n, inside = _rank(number, rank, line, t, tokens)
    value = _sum(x, weight, bias, tail, number, column, line, row, t, n, d, inside, D, W, BLOCK, ROWS)
    if SILU:
        value *= tl.sigmoid(value)
    value = tl.where(inside[:, None], value, 0.0)
    at = (line + t)[:, None] * D + d[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & (d < D)[None, :])


@triton.jit
def _slopes(
    x, weight, bias, tail, number, rank, column, dy, g, dweight, dbias, rows, tokens,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation, where there is one, and what it adds to weight and bias."""
    tiles = tl.cdiv(tokens, ROWS)
    program = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w = tl.arange(0, WIDE)
    of_weight = tl.zeros((BLOCK, WIDE), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0), rows * tiles, tl.num_programs(0)):
        row = (tile // tiles).to(tl.int64)
        t = (tile % tiles) * ROWS + tl.arange(0, ROWS).to(tl.int64)
        line = row * tokens
        n, inside = _rank(number, rank, line, t, tokens)
        at = (line + t)[:, None] * D + d[None, :]
        found = tl.load(dy + at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        if g is not None:
            value = _sum(x, weight, bias, tail, number, column, line, row, t, n, d, inside, D, W, BLOCK, ROWS)
            gate = tl.sigmoid(value)
            found *= gate * (1.0 + value * (1.0 - gate))
            tl.store(g + at, found, mask=(t < tokens)[:, None] & (d < D)[None, :])
        for back in tl.static_range(W):
            value = _tap(x, tail, number, column, line, row, t, n, d, inside, back, D, W)
            of_weight += tl.where((w == W - 1 - back)[None, :], tl.sum(found * value, 0)[:, None], 0.0)
        of_bias += tl.sum(found, 0)
    place = (program * D + d)[:, None] * W + w[None, :]
    tl.store(dweight + place, of_weight, mask=(d < D)[:, None] & (w < W)[None, :])
    if dbias is not None:
        tl.store(dbias + program * D + d, of_bias, mask=d < D)


@triton.jit
def _inputs(
    weight, number, rank, column, g, dx, dtail, tokens,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of each input, the carried tail's first: from the W real tokens that read it."""
    tiles = tl.cdiv(tokens + W - 1, ROWS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS).to(tl.int64) - (W - 1)  # rank; the tail's are below 0
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = row * tokens
    own = tl.zeros((ROWS,), tl.int64)
    at = n
    inside = n < tokens
    if number is not None:
        at = tl.load(column + line + n, mask=inside & (n >= 0), other=0).to(tl.int64)
        own = tl.load(number + line + at, mask=inside & (n >= 0), other=0)
        inside = inside & (own >= 0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for ahead in tl.static_range(W):
        m = n + ahead
        reads = inside & (m >= 0) & (m < tokens)
        from_t = m
        if number is not None:
            from_t = tl.load(column + line + m, mask=reads, other=0).to(tl.int64)
            reads = reads & (tl.load(number + line + from_t, mask=reads, other=-1) == own)
        place = (line + from_t)[:, None] * D + d[None, :]
        value = tl.load(g + place, mask=reads[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += value * _weight(weight, d, ahead, D, W)
    late = (inside & (n >= 0))[:, None] & (d < D)[None, :]
    tl.store(dx + (line + at)[:, None] * D + d[None, :], total.to(dx.dtype.element_ty), mask=late)
    early = (n < 0)[:, None] & (d < D)[None, :]
    place = (row * (W - 1) + n + W - 1)[:, None] * D + d[None, :]
    tl.store(dtail + place, total.to(dtail.dtype.element_ty), mask=early)
