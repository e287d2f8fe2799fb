"""The selective scan on a GPU: a program keeps the states of some channels on chip and goes through time by tiles.

A tile is (tokens, channels, N). Inside, an associative scan; from tile to tile, one state (channels, N). Backward walks
the tiles from the end, with the states of each made again from the one that entered it, which forward keeps. What a
token's B and C get from all channels is added up in memory by atomic additions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compose import linear, linear_before
from kernels.diagonal_scan.triton import kinds
from kernels.launch import launch

SAVED = 1  # the states that entered the tiles
ROWS = 32  # tokens of a tile


def forward(
    x_BTD: Tensor,
    step_BTD: Tensor,
    a_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    d_D: Tensor | None,
    state_BDN: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
    scan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`, then the states that entered the tiles, (B, n, D, N). `scan` is for CPUs."""
    y, state, entered = fake(x_BTD, step_BTD, a_DN, b_BTN, c_BTN, d_D, state_BDN, segments_BT, keep, scan)
    rows, tokens, size = x_BTD.shape
    given = (x_BTD, step_BTD, a_DN, b_BTN, c_BTN, d_D, state_BDN)
    block, wide = _tile(a_DN)
    launch(
        _forward, (rows * triton.cdiv(size, block),), *(v if v is None else v.contiguous() for v in given),
        kinds(segments_BT), y, state, entered, tokens, keep,
        size, a_DN.shape[1], block, wide, ROWS, num_warps=8,
    )  # fmt: skip
    return y, state, entered


def fake(
    x_BTD: Tensor,
    step_BTD: Tensor,
    a_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    d_D: Tensor | None,
    state_BDN: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
    scan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of forward's shapes."""
    rows, tokens, _ = x_BTD.shape
    y = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    state = y.new_empty(rows, *((keep + 1,) if keep else ()), *a_DN.shape, dtype=torch.float32)
    return y, state, state.new_empty(rows, triton.cdiv(tokens, ROWS), *a_DN.shape)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """By one walk back."""
    x, step, a, b, c, d, state, segments_BT, keep, _ = args
    rows, tokens, size = x.shape
    x, step, a, b, c = (v.contiguous() for v in (x, step, a, b, c))
    dx, dstep = torch.empty_like(x), torch.empty_like(step)
    da = x.new_empty(rows, *a.shape, dtype=torch.float32)
    db, dc = (torch.zeros_like(v, dtype=torch.float32) for v in (b, c))
    dd = None if d is None else x.new_empty(rows, size, dtype=torch.float32)
    dstate = torch.empty_like(da)
    block, wide = _tile(a)
    launch(
        _backward, (rows * triton.cdiv(size, block),), x, step, a, b, c, d, kinds(segments_BT), outputs[0],
        grads[0].contiguous(), grads[1].contiguous(), dx, dstep, da, db, dc, dd, dstate, tokens, keep,
        size, a.shape[1], block, wide, ROWS, num_warps=8,
    )  # fmt: skip
    found = (dx, dstep, da.sum(0), db, dc, None if dd is None else dd.sum(0), dstate)
    return [g.to(arg.dtype) for g, arg, need in zip(found, args, needs, strict=False) if need]


def _tile(a_DN: Tensor) -> tuple[int, int]:
    """Channels of a program, and N as a power of two: with 32 tokens, 4,096 states, 16 of a thread."""
    wide = triton.next_power_of_2(max(1, a_DN.shape[1]))
    return max(1, min(64, 4096 // (ROWS * wide))), wide


@triton.jit
def _tokens(base, line, t, inside, n, size, SIZE: tl.constexpr):
    """(tokens, n) of a tensor (B, T, SIZE) as fp32."""
    at = (line + t)[:, None] * SIZE + n[None, :]
    return tl.load(base + at, mask=inside[:, None] & (n < size)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _forward(
    x, step, a, b, c, skip, start, kind, y, state, entered, tokens, keep,
    D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // tl.cdiv(D, BLOCK)).to(tl.int64)
    d = (program % tl.cdiv(D, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, WIDE)
    r = tl.arange(0, ROWS)
    real = (d < D)[:, None] & (n < N)[None, :]
    place = d[:, None] * N + n[None, :]  # in one (D, N)
    line = row * tokens
    first = tokens - keep - 1  # the token after which the first moment is
    tiles = tl.cdiv(tokens, ROWS)
    decay = tl.load(a + place, mask=real, other=0.0).to(tl.float32)
    carry = tl.zeros((BLOCK, WIDE), tl.float32)
    if start is not None:
        carry = tl.load(start + row * D * N + place, mask=real, other=0.0).to(tl.float32)
    if first < 0:
        tl.store(state + row * (keep + 1) * D * N + place, carry, mask=real)
    for tile in tl.range(0, tiles, num_stages=2):
        tl.store(entered + (row * tiles + tile) * D * N + place, carry, mask=real)
        t = tile * ROWS + r.to(tl.int64)
        inside = t < tokens
        writes, begins = inside, t < 0
        if kind is not None:
            which = tl.load(kind + line + t, mask=inside, other=2).to(tl.int32)
            writes, begins = which != 2, which == 1
        s = _tokens(step, line, t, writes, d, D, D)
        v = _tokens(x, line, t, writes, d, D, D)
        bs = _tokens(b, line, t, writes, n, N, N)
        cs = _tokens(c, line, t, writes, n, N, N)
        f = tl.where(begins[:, None, None], 0.0, tl.exp(s[:, :, None] * decay[None, :, :]))
        p, q = tl.associative_scan((f, (s * v)[:, :, None] * bs[:, None, :]), 0, linear)
        h = p * carry[None, :, :] + q
        out = tl.sum(h * cs[:, None, :], 2)
        if skip is not None:
            out += tl.load(skip + d, mask=d < D, other=0.0).to(tl.float32)[None, :] * v
        at = (line + t)[:, None] * D + d[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
        if tile * ROWS + ROWS > first:
            moment = (row * (keep + 1) + t - first)[:, None, None] * D * N + place[None, :, :]
            last = inside & (t >= first)
            tl.store(state + moment, h, mask=last[:, None, None] & real[None, :, :])
        carry = tl.sum(tl.where((r == ROWS - 1)[:, None, None], h, 0.0), 0)


@triton.jit
def _backward(
    x, step, a, b, c, skip, kind, entered, dy, dmoments, dx, dstep, da, db, dc, dskip, dstart, tokens, keep,
    D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // tl.cdiv(D, BLOCK)).to(tl.int64)
    d = (program % tl.cdiv(D, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, WIDE)
    r = tl.arange(0, ROWS)
    real = (d < D)[:, None] & (n < N)[None, :]
    place = d[:, None] * N + n[None, :]
    line = row * tokens
    first = tokens - keep - 1
    tiles = tl.cdiv(tokens, ROWS)
    decay = tl.load(a + place, mask=real, other=0.0).to(tl.float32)
    carry = tl.zeros((BLOCK, WIDE), tl.float32)  # what the row after the tile passes on
    of_decay = tl.zeros((BLOCK, WIDE), tl.float32)
    of_skip = tl.zeros((BLOCK,), tl.float32)
    one = tl.full((ROWS, BLOCK, WIDE), 1.0, tl.float32)
    none = tl.zeros((ROWS, BLOCK, WIDE), tl.float32)
    for back in tl.range(0, tiles):
        tile = tiles - 1 - back
        came = tl.load(entered + (row * tiles + tile) * D * N + place, mask=real, other=0.0)
        t = tile * ROWS + r.to(tl.int64)
        inside = t < tokens
        writes, begins = inside, t < 0
        if kind is not None:
            which = tl.load(kind + line + t, mask=inside, other=2).to(tl.int32)
            writes, begins = which != 2, which == 1
        s = _tokens(step, line, t, writes, d, D, D)
        v = _tokens(x, line, t, writes, d, D, D)
        g_y = _tokens(dy, line, t, writes, d, D, D)
        bs = _tokens(b, line, t, writes, n, N, N)
        cs = _tokens(c, line, t, writes, n, N, N)
        f = tl.where(begins[:, None, None], 0.0, tl.exp(s[:, :, None] * decay[None, :, :]))
        added = (s * v)[:, :, None] * bs[:, None, :]
        p, q, p_before, q_before = tl.associative_scan((f, added, one, none), 0, linear_before)
        before = p_before * came[None, :, :] + q_before
        h = f * before + added
        at_n = (line + t)[:, None] * N + n[None, :]
        inside_n = writes[:, None] & (n < N)[None, :]
        tl.atomic_add(dc + at_n, tl.sum(h * g_y[:, :, None], 1), mask=inside_n, sem="relaxed")
        g = g_y[:, :, None] * cs[:, None, :]
        if tile * ROWS + ROWS > first:
            moment = (row * (keep + 1) + t - first)[:, None, None] * D * N + place[None, :, :]
            last = (inside & (t >= first))[:, None, None] & real[None, :, :]
            g += tl.load(dmoments + moment, mask=last, other=0.0).to(tl.float32)
        p, q, p_after, q_after = tl.associative_scan((f, f * g, one, none), 0, linear_before, reverse=True)
        g += p_after * carry[None, :, :] + q_after
        passed = f * g
        carry = tl.sum(tl.where((r == 0)[:, None, None], passed, 0.0), 0)
        e = passed * before
        of_decay += tl.sum(e * s[:, :, None], 0)
        of_write = tl.sum(g * bs[:, None, :], 2)
        of_x = of_write * s
        if skip is not None:
            of_x += tl.load(skip + d, mask=d < D, other=0.0).to(tl.float32)[None, :] * g_y
            of_skip += tl.sum(g_y * v, 0)
        of_step = tl.where(writes[:, None], tl.sum(e * decay[None, :, :], 2) + of_write * v, 0.0)
        at = (line + t)[:, None] * D + d[None, :]
        inside_d = inside[:, None] & (d < D)[None, :]
        tl.store(dx + at, of_x.to(dx.dtype.element_ty), mask=inside_d)
        tl.store(dstep + at, of_step.to(dstep.dtype.element_ty), mask=inside_d)
        tl.atomic_add(db + at_n, tl.sum(g * (s * v)[:, :, None], 1), mask=inside_n, sem="relaxed")
    if first < 0:
        carry += tl.load(dmoments + row * (keep + 1) * D * N + place, mask=real, other=0.0).to(tl.float32)
    tl.store(dstart + row * D * N + place, carry, mask=real)
    tl.store(da + row * D * N + place, of_decay, mask=real)
    if dskip is not None:
        tl.store(dskip + row * D + d, of_skip, mask=d < D)
