"""The recurrence on logarithms on a GPU: per tile of time, a scan for the scales and one for the values at them.

As in `chunked`, with the tiles of `diagonal_scan`. The scale before each row is a scan over rows shifted by one; its
own follows from it. What enters a tile, its scale and its u, is kept for backward, which walks the tiles from the end:
with r_t what u_t gets from outside, c_t = a_t (r_t + c_{t+1}) passes on to u_{t-1}.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compose import linear, linear_before, max_plus, row
from kernels.diagonal_scan.triton import block_of, kinds
from kernels.launch import launch

SAVED = 1  # scale and u that entered each tile
ROWS = 64  # tokens of a tile


def forward(
    log_a_BTD: Tensor,
    log_b_BTD: Tensor,
    sign_a_BTD: Tensor | None,
    sign_b_BTD: Tensor | None,
    log_state_BD: Tensor | None,
    sign_state_BD: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference`, then what entered each tile, (B, n, 2, D)."""
    args = [x if x is None else x.contiguous() for x in (log_a_BTD, log_b_BTD, sign_a_BTD, sign_b_BTD)]
    states = [x if x is None else x.contiguous() for x in (log_state_BD, sign_state_BD)]
    y, sign, state, sign_state, entered = fake(*args, *states, segments_BT, keep)
    rows, tokens, size = log_a_BTD.shape
    block = block_of(rows, size)
    launch(
        _forward, (rows * triton.cdiv(size, block),), *args, *states, kinds(segments_BT),
        y, sign, state, sign_state, entered, tokens, keep, size, block, ROWS, num_warps=4,
    )  # fmt: skip
    return y, sign, state, sign_state, entered


def fake(
    log_a_BTD: Tensor,
    log_b_BTD: Tensor,
    sign_a_BTD: Tensor | None,
    sign_b_BTD: Tensor | None,
    log_state_BD: Tensor | None,
    sign_state_BD: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs of forward's shapes."""
    rows, tokens, size = log_a_BTD.shape
    y = torch.empty_like(log_a_BTD, memory_format=torch.contiguous_format)
    state = y.new_empty(rows, *((keep + 1,) if keep else ()), size, dtype=torch.float32)
    entered = y.new_empty(rows, triton.cdiv(tokens, ROWS), 2, size, dtype=torch.float32)
    return y, torch.empty_like(y, dtype=torch.int8), state, torch.empty_like(state, dtype=torch.int8), entered


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """By one walk back."""
    log_a, log_b, sign_a, sign_b, log_state, sign_state, segments_BT, keep = args
    log_a, log_b, sign_a, sign_b = (x if x is None else x.contiguous() for x in (log_a, log_b, sign_a, sign_b))
    log_state, sign_state = (x if x is None else x.contiguous() for x in (log_state, sign_state))
    rows, tokens, size = log_a.shape
    dlog_a, dlog_b = torch.empty_like(log_a), torch.empty_like(log_b)
    dstate = None if log_state is None else torch.empty_like(log_state)
    block = block_of(rows, size)
    launch(
        _backward, (rows * triton.cdiv(size, block),), log_a, log_b, sign_a, sign_b, log_state, sign_state,
        kinds(segments_BT), outputs[0], grads[0].contiguous(), grads[2].contiguous(),
        dlog_a, dlog_b, dstate, tokens, keep, size, block, ROWS, num_warps=4,
    )  # fmt: skip
    found = (dlog_a, dlog_b, None, None, dstate)
    return [g for g, need in zip(found, needs, strict=False) if need]


@triton.jit
def _finite(m):
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _logarithm(u, m):
    return tl.where(u == 0.0, -float("inf"), tl.log(tl.where(u == 0.0, 1.0, tl.abs(u))) + m)


@triton.jit
def _sign(u):
    return tl.where(u > 0.0, 1, tl.where(u < 0.0, -1, 0)).to(tl.int8)


@triton.jit
def _start(log_state, sign_state, at, inside):
    """The carried h as its log and the u at that scale."""
    m = tl.full(at.shape, -float("inf"), tl.float32)
    if log_state is not None:
        m = tl.load(log_state + at, mask=inside, other=-float("inf")).to(tl.float32)
    u = tl.where(m == -float("inf"), 0.0, 1.0)
    if sign_state is not None:
        u *= tl.load(sign_state + at, mask=inside, other=0).to(tl.float32)
    return m, u


@triton.jit
def _logs(log_a, log_b, kind, line, t, d, inside_t, D: tl.constexpr):
    """log a and log b in force: as given; -inf for a where a document begins; 0 and -inf at padding and outside."""
    at = (line + t)[:, None] * D + d[None, :]
    inside = inside_t[:, None] & (d < D)[None, :]
    a = tl.load(log_a + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(log_b + at, mask=inside, other=-float("inf")).to(tl.float32)
    if kind is not None:
        which = tl.load(kind + line + t, mask=inside_t, other=2).to(tl.int32)[:, None]
        a = tl.where(which == 1, -float("inf"), tl.where(which == 2, 0.0, a))
        b = tl.where(which == 2, -float("inf"), b)
    return a, b


@triton.jit
def _factors(log_a, log_b, sign_a, sign_b, kind, line, tile, d, tokens, carry_m, D: tl.constexpr, ROWS: tl.constexpr):
    """a, b of u_t = a u_{t-1} + b, and the scales m_t, not yet finite, of a tile that m = carry_m enters."""
    r = tl.arange(0, ROWS).to(tl.int64)
    t = tile * ROWS + r
    a_before, b_before = _logs(log_a, log_b, kind, line, t - 1, d, (t <= tokens) & (r > 0), D)
    p, q = tl.associative_scan((a_before, b_before), 0, max_plus)
    m_before = tl.maximum(p + carry_m[None, :], q)
    a, b = _logs(log_a, log_b, kind, line, t, d, t < tokens, D)
    m = tl.maximum(a + m_before, b)
    a = tl.exp(tl.minimum(a - (_finite(m) - _finite(m_before)), 1.0))
    b = tl.exp(b - _finite(m))
    at = (line + t)[:, None] * D + d[None, :]
    inside = (t < tokens)[:, None] & (d < D)[None, :]
    if sign_a is not None:
        a *= tl.load(sign_a + at, mask=inside, other=1).to(tl.float32)
        if kind is not None:  # the sign of padding is not looked at
            which = tl.load(kind + line + t, mask=t < tokens, other=2).to(tl.int32)[:, None]
            a = tl.where(which == 2, 1.0, a)
    if sign_b is not None:
        b *= tl.load(sign_b + at, mask=inside, other=1).to(tl.float32)
    return a, b, m


@triton.jit
def _forward(
    log_a, log_b, sign_a, sign_b, log_state, sign_state, kind, y, sign, state, sign_after, entered, tokens, keep,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // tl.cdiv(D, BLOCK)).to(tl.int64)
    d = (program % tl.cdiv(D, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    real_d = d < D
    line = b * tokens
    first = tokens - keep - 1  # the token whose h is the first moment
    moment = b * (keep + 1) * D + d
    tiles = tl.cdiv(tokens, ROWS)
    carry_m, carry_u = _start(log_state, sign_state, b * D + d, real_d)
    if first < 0:
        tl.store(state + moment, _logarithm(carry_u, _finite(carry_m)), mask=real_d)
        tl.store(sign_after + moment, _sign(carry_u), mask=real_d)
    for tile in tl.range(0, tiles, num_stages=2):
        place = (b * tiles + tile) * 2 * D + d
        tl.store(entered + place, carry_m, mask=real_d)
        tl.store(entered + place + D, carry_u, mask=real_d)
        t = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        fa, fb, m = _factors(log_a, log_b, sign_a, sign_b, kind, line, tile, d, tokens, carry_m, D, ROWS)
        p, q = tl.associative_scan((fa, fb), 0, linear)
        u = p * carry_u[None, :] + q
        log_h, sign_h = _logarithm(u, _finite(m)), _sign(u)
        inside = (t < tokens)[:, None] & real_d[None, :]
        last = inside & (t >= first)[:, None]
        moment_at = moment[None, :] + (t - first)[:, None] * D
        tl.store(state + moment_at, log_h, mask=last)
        tl.store(sign_after + moment_at, sign_h, mask=last)
        if kind is not None:
            padding = tl.load(kind + line + t, mask=t < tokens, other=2)[:, None] == 2
            log_h = tl.where(padding, -float("inf"), log_h)
            sign_h = tl.where(padding, 0, sign_h).to(tl.int8)
        at = (line + t)[:, None] * D + d[None, :]
        tl.store(y + at, log_h.to(y.dtype.element_ty), mask=inside)
        tl.store(sign + at, sign_h, mask=inside)
        carry_m, carry_u = row(m, ROWS - 1, ROWS), row(u, ROWS - 1, ROWS)


@triton.jit
def _backward(
    log_a, log_b, sign_a, sign_b, log_state, sign_state, kind, entered, dy, dmoments, dlog_a, dlog_b, dstate,
    tokens, keep, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // tl.cdiv(D, BLOCK)).to(tl.int64)
    d = (program % tl.cdiv(D, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    real_d = d < D
    line = b * tokens
    first = tokens - keep - 1
    moment = b * (keep + 1) * D + d
    tiles = tl.cdiv(tokens, ROWS)
    carry = tl.zeros((BLOCK,), tl.float32)  # c of the row after the tile
    one, none = tl.full((ROWS, BLOCK), 1.0, tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for back in tl.range(0, tiles, num_stages=2):
        tile = tiles - 1 - back
        place = (b * tiles + tile) * 2 * D + d
        came_m = tl.load(entered + place, mask=real_d, other=0.0)
        came_u = tl.load(entered + place + D, mask=real_d, other=0.0)
        fa, fb, m = _factors(log_a, log_b, sign_a, sign_b, kind, line, tile, d, tokens, came_m, D, ROWS)
        p, q, p_before, q_before = tl.associative_scan((fa, fb, one, none), 0, linear_before)
        u = p * came_u[None, :] + q
        u_before = p_before * came_u[None, :] + q_before
        t = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (t < tokens)[:, None] & real_d[None, :]
        at = (line + t)[:, None] * D + d[None, :]
        goes = inside
        begins = inside & (t < 0)[:, None]
        if kind is not None:
            which = tl.load(kind + line + t, mask=t < tokens, other=2).to(tl.int32)[:, None]
            goes, begins = inside & (which != 2), which == 1
        r = tl.load(dy + at, mask=goes, other=0.0).to(tl.float32)
        moment_at = moment[None, :] + (t - first)[:, None] * D
        r += tl.load(dmoments + moment_at, mask=inside & (t >= first)[:, None], other=0.0)
        r = tl.where(u == 0.0, 0.0, r / tl.where(u == 0.0, 1.0, u))
        p, q, p_after, q_after = tl.associative_scan((fa, fa * r, one, none), 0, linear_before, reverse=True)
        g = r + p_after * carry[None, :] + q_after
        of_a = tl.where(goes & ~begins, g * fa * u_before, 0.0)
        tl.store(dlog_a + at, of_a.to(dlog_a.dtype.element_ty), mask=inside)
        tl.store(dlog_b + at, (g * fb).to(dlog_b.dtype.element_ty), mask=inside)
        carry = row(fa * g, 0, ROWS)
    if dstate is not None:
        m, u = _start(log_state, sign_state, b * D + d, real_d)
        found = carry * u
        if first < 0:
            found += tl.where(u == 0.0, 0.0, tl.load(dmoments + moment, mask=real_d, other=0.0))
        tl.store(dstate + b * D + d, found.to(dstate.dtype.element_ty), mask=real_d)
