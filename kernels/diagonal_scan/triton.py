"""The elementwise linear recurrence on a GPU: a program walks a block of channels through time, tile after tile.

Inside a tile the recurrence is an associative scan, and one row leaves it for the next: each tensor crosses memory
once. Backward walks the tiles from the end. With r_t the gradient that h_t gets from outside and c_t what passes on to
h_{t-1}, c_t = conj(a_t) (r_t + c_{t+1}): a scan as well. The h of each tile are made again from the row that entered
it, which forward keeps. Scans of a tile's rows shifted by one, the first replaced by "no change", give what comes
before each row. Complex numbers are pairs of reals in the last place; IM holds the imaginary halves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import segments
from kernels.compose import complex_linear, linear, row
from kernels.launch import launch

SAVED = 1  # what entered each tile
ROWS = 64  # tokens of a tile


def forward(
    x_BTD: Tensor, decay: Tensor, state_BD: Tensor | None, segments_BT: Tensor | None, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`, then what entered each tile, (B, n, D)."""
    rows, tokens, size = x_BTD.shape
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    start = x_BTD.new_zeros(rows, size, dtype=wide) if state_BD is None else state_BD.to(wide)
    x, decay, start = x_BTD.contiguous(), decay.contiguous(), start.contiguous()
    h = torch.empty_like(x)
    moments = x.new_empty(rows, keep + 1, size, dtype=wide)
    entered = x.new_empty(rows, triton.cdiv(tokens, ROWS), size, dtype=wide)
    block = block_of(rows, size)
    launch(
        _forward, (rows * triton.cdiv(size, block),), *_real(x, decay, start), kinds(segments_BT),
        *_real(h, moments, entered), tokens, keep,
        size, block, ROWS, decay.dim() == 1, x.is_complex(), num_warps=_warps(x),
    )  # fmt: skip
    return h, moments if keep else moments[:, 0], entered


def fake(
    x_BTD: Tensor, decay: Tensor, state_BD: Tensor | None, segments_BT: Tensor | None, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of forward's shapes."""
    rows, tokens, size = x_BTD.shape
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    state = x_BTD.new_empty(rows, *((keep + 1,) if keep else ()), size, dtype=wide)
    h = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    return h, state, x_BTD.new_empty(rows, triton.cdiv(tokens, ROWS), size, dtype=wide)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """By one walk back."""
    x_BTD, decay, state_BD, segments_BT, keep = args
    rows, tokens, size = x_BTD.shape
    x, decay, entered = x_BTD.contiguous(), decay.contiguous(), outputs[0]
    dh, dmoments = (g.contiguous() for g in grads)
    dx = torch.empty_like(x)
    ddecay = torch.empty_like(decay) if decay.dim() == 3 else x.new_empty(rows, size, dtype=entered.dtype)
    dstart = x.new_empty(rows, size, dtype=entered.dtype)
    block = block_of(rows, size)
    launch(
        _backward, (rows * triton.cdiv(size, block),), *_real(x, decay), kinds(segments_BT),
        *_real(entered, dh, dmoments, dx, ddecay, dstart), tokens, keep,
        size, block, ROWS, decay.dim() == 1, x.is_complex(), num_warps=_warps(x),
    )  # fmt: skip
    ddecay = ddecay if decay.dim() == 3 else ddecay.sum(0).to(decay.dtype)
    found = (dx, ddecay, None if state_BD is None else dstart.to(state_BD.dtype))
    return [g for g, need in zip(found, needs, strict=False) if need]


def kinds(segments_BT: Tensor | None) -> Tensor | None:
    """What a kernel asks of each token: 0 goes on with a document, 1 begins one, 2 is padding; int8."""
    if segments_BT is None:
        return None
    begins_BT = segments.begins(segments.filled(segments_BT))
    return torch.where(segments_BT < 0, 2, begins_BT).to(torch.int8)


def block_of(rows: int, size: int) -> int:
    """Channels of a program: 128 bytes of fp32, fewer where that would leave a large card idle."""
    return 32 if rows * size >= 32 * 512 else 16


def _warps(x: Tensor) -> int:
    return 8 if x.is_complex() else 4


def _real(*tensors: Tensor) -> list[Tensor]:
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors]


@triton.jit
def _take(base, at, inside, IM: tl.constexpr, CPLX: tl.constexpr):
    """Real or imaginary halves at `at` as fp32; 0 outside."""
    if CPLX:
        return tl.load(base + 2 * at + IM, mask=inside, other=0.0).to(tl.float32)
    return tl.load(base + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(base, at, value, inside, IM: tl.constexpr, CPLX: tl.constexpr):
    if CPLX:
        tl.store(base + 2 * at + IM, value, mask=inside)
    else:
        tl.store(base + at, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _kind(kind, line, t, inside_t):
    """0, 1 or 2 as `kinds` says."""
    if kind is None:
        return tl.zeros_like(t).to(tl.int32)
    else:  # not an early return: Triton compiles what follows one all the same
        return tl.load(kind + line + t, mask=inside_t, other=2).to(tl.int32)


@triton.jit
def _decays(
    decay, line, t, d, inside, which, D: tl.constexpr, IM: tl.constexpr, CONSTANT: tl.constexpr, CPLX: tl.constexpr
):
    """The decays in force: those given where a document goes on, 0 where one begins, 1 at padding and outside."""
    at = d[None, :] + tl.zeros_like(t)[:, None] if CONSTANT else (line + t)[:, None] * D + d[None, :]
    given = _take(decay, at, inside & (which == 0)[:, None], IM, CPLX)
    if IM == 0:
        given = tl.where((which == 2)[:, None] | ~inside, 1.0, given)
    return given


@triton.jit
def _forward(
    x, decay, start, kind, h, moments, entered, tokens, keep,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CONSTANT: tl.constexpr, CPLX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // tl.cdiv(D, BLOCK)).to(tl.int64)
    d = (program % tl.cdiv(D, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    real_d = d < D
    line = b * tokens
    first = tokens - keep - 1  # the token whose h is the first moment
    tiles = tl.cdiv(tokens, ROWS)
    carry = _take(start, b * D + d, real_d, 0, CPLX)
    carry_im = tl.zeros_like(carry)
    if CPLX:
        carry_im = _take(start, b * D + d, real_d, 1, CPLX)
    moment = b * (keep + 1) * D + d
    if first < 0:
        _put(moments, moment, carry, real_d, 0, CPLX)
        if CPLX:
            _put(moments, moment, carry_im, real_d, 1, CPLX)
    for tile in tl.range(0, tiles, num_stages=2):
        place = (b * tiles + tile) * D + d
        _put(entered, place, carry, real_d, 0, CPLX)
        t = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (t < tokens)[:, None] & real_d[None, :]
        which = _kind(kind, line, t, t < tokens)
        at = (line + t)[:, None] * D + d[None, :]
        adds = inside & (which != 2)[:, None]
        a = _decays(decay, line, t, d, inside, which, D, 0, CONSTANT, CPLX)
        b_re = _take(x, at, adds, 0, CPLX)
        last = inside & (t >= first)[:, None]
        moment_at = moment[None, :] + (t - first)[:, None] * D
        if CPLX:
            _put(entered, place, carry_im, real_d, 1, CPLX)
            a_im = _decays(decay, line, t, d, inside, which, D, 1, CONSTANT, CPLX)
            b_im = _take(x, at, adds, 1, CPLX)
            p, p_im, q, q_im = tl.associative_scan((a, a_im, b_re, b_im), 0, complex_linear)
            value = p * carry[None, :] - p_im * carry_im[None, :] + q
            value_im = p * carry_im[None, :] + p_im * carry[None, :] + q_im
            _put(h, at, tl.where(adds, value_im, 0.0), inside, 1, CPLX)
            _put(moments, moment_at, value_im, last, 1, CPLX)
            carry_im = row(value_im, ROWS - 1, ROWS)
        else:
            p, q = tl.associative_scan((a, b_re), 0, linear)
            value = p * carry[None, :] + q
        _put(h, at, tl.where(adds, value, 0.0), inside, 0, CPLX)
        _put(moments, moment_at, value, last, 0, CPLX)
        carry = row(value, ROWS - 1, ROWS)


@triton.jit
def _outside(
    dh, dmoments, line, t, d, inside, which, moment, first, D: tl.constexpr, IM: tl.constexpr, CPLX: tl.constexpr
):
    """What h_t gets from outside: of the output unless it is padding, and of the moment after it."""
    at = (line + t)[:, None] * D + d[None, :]
    found = _take(dh, at, inside & (which != 2)[:, None], IM, CPLX)
    moment_at = moment[None, :] + (t - first)[:, None] * D
    return found + _take(dmoments, moment_at, inside & (t >= first)[:, None], IM, CPLX)


@triton.jit
def _backward(
    x, decay, kind, entered, dh, dmoments, dx, ddecay, dstart, tokens, keep,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CONSTANT: tl.constexpr, CPLX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // tl.cdiv(D, BLOCK)).to(tl.int64)
    d = (program % tl.cdiv(D, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    real_d = d < D
    line = b * tokens
    first = tokens - keep - 1
    moment = b * (keep + 1) * D + d
    tiles = tl.cdiv(tokens, ROWS)
    r = tl.arange(0, ROWS).to(tl.int64)
    carry = tl.zeros((BLOCK,), tl.float32)  # c of the row after the tile
    carry_im = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    total_im = tl.zeros((BLOCK,), tl.float32)
    for back in tl.range(0, tiles, num_stages=2):
        tile = tiles - 1 - back
        t = tile * ROWS + r
        inside = (t < tokens)[:, None] & real_d[None, :]
        which = _kind(kind, line, t, t < tokens)
        at = (line + t)[:, None] * D + d[None, :]
        inside_before = inside & (r > 0)[:, None]
        which_before = _kind(kind, line, t - 1, (t < tokens) & (r > 0))
        adds_before = inside_before & (which_before != 2)[:, None]
        inside_after = (t + 1 < tokens)[:, None] & real_d[None, :] & (r < ROWS - 1)[:, None]
        which_after = _kind(kind, line, t + 1, (t + 1 < tokens) & (r < ROWS - 1))
        place = (b * tiles + tile) * D + d
        came = _take(entered, place, real_d, 0, CPLX)[None, :]
        a = _decays(decay, line, t, d, inside, which, D, 0, CONSTANT, CPLX)
        a_before = _decays(decay, line, t - 1, d, inside_before, which_before, D, 0, CONSTANT, CPLX)
        x_before = _take(x, at - D, adds_before, 0, CPLX)
        a_after = _decays(decay, line, t + 1, d, inside_after, which_after, D, 0, CONSTANT, CPLX)
        r_after = _outside(dh, dmoments, line, t + 1, d, inside_after, which_after, moment, first, D, 0, CPLX)
        g = _outside(dh, dmoments, line, t, d, inside, which, moment, first, D, 0, CPLX)
        given = inside & (which == 0)[:, None]
        if CPLX:
            came_im = _take(entered, place, real_d, 1, CPLX)[None, :]
            a_im = _decays(decay, line, t, d, inside, which, D, 1, CONSTANT, CPLX)
            a_before_im = _decays(decay, line, t - 1, d, inside_before, which_before, D, 1, CONSTANT, CPLX)
            x_before_im = _take(x, at - D, adds_before, 1, CPLX)
            a_after_im = -_decays(decay, line, t + 1, d, inside_after, which_after, D, 1, CONSTANT, CPLX)
            r_after_im = _outside(dh, dmoments, line, t + 1, d, inside_after, which_after, moment, first, D, 1, CPLX)
            p, p_im, q, q_im = tl.associative_scan((a_before, a_before_im, x_before, x_before_im), 0, complex_linear)
            before = p * came - p_im * came_im + q
            before_im = p * came_im + p_im * came + q_im
            passed = a_after * r_after - a_after_im * r_after_im
            passed_im = a_after * r_after_im + a_after_im * r_after
            p, p_im, q, q_im = tl.associative_scan(
                (a_after, a_after_im, passed, passed_im), 0, complex_linear, reverse=True
            )
            g += p * carry[None, :] - p_im * carry_im[None, :] + q
            g_im = _outside(dh, dmoments, line, t, d, inside, which, moment, first, D, 1, CPLX)
            g_im += p * carry_im[None, :] + p_im * carry[None, :] + q_im
            of_decay = tl.where(given, g * before + g_im * before_im, 0.0)
            of_decay_im = tl.where(given, g_im * before - g * before_im, 0.0)
            _put(dx, at, tl.where((which != 2)[:, None], g_im, 0.0), inside, 1, CPLX)
            carry = row(a * g + a_im * g_im, 0, ROWS)
            carry_im = row(a * g_im - a_im * g, 0, ROWS)
            total_im += tl.sum(of_decay_im, 0)
            if not CONSTANT:
                _put(ddecay, at, of_decay_im, inside, 1, CPLX)
        else:
            p, q = tl.associative_scan((a_before, x_before), 0, linear)
            before = p * came + q
            p, q = tl.associative_scan((a_after, a_after * r_after), 0, linear, reverse=True)
            g += p * carry[None, :] + q
            of_decay = tl.where(given, g * before, 0.0)
            carry = row(a * g, 0, ROWS)
        _put(dx, at, tl.where((which != 2)[:, None], g, 0.0), inside, 0, CPLX)
        total += tl.sum(of_decay, 0)
        if not CONSTANT:
            _put(ddecay, at, of_decay, inside, 0, CPLX)
    if first < 0:
        carry += _take(dmoments, moment, real_d, 0, CPLX)
        if CPLX:
            carry_im += _take(dmoments, moment, real_d, 1, CPLX)
    _put(dstart, b * D + d, carry, real_d, 0, CPLX)
    if CPLX:
        _put(dstart, b * D + d, carry_im, real_d, 1, CPLX)
    if CONSTANT:
        _put(ddecay, b * D + d, total, real_d, 0, CPLX)
        if CPLX:
            _put(ddecay, b * D + d, total_im, real_d, 1, CPLX)
