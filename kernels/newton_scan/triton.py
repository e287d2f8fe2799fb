"""Newton's method on a GPU: a program solves tile after tile of time for a block of channels, all rounds on chip.

What is iterated is the state before each row. A round finds by how much each is not what the row above makes, and
solves the linearised recurrence for the change by an associative scan. A tile starts from the exact end of the last
one, so each converges on its own. Backward is one walk from the end over the linear maps at the solution, which forward
keeps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compose import linear, linear_before
from kernels.diagonal_scan.triton import kinds
from kernels.launch import launch
from kernels.newton_scan.cells import CELLS

SAVED = 1  # the states before and after every token, (K, B, T+1, D)
ROWS = 32  # tokens of a tile
BLOCK = 32  # channels of a program


def forward(
    x_BT3D: Tensor,
    weight_ND: Tensor,
    state_BKD: Tensor | None,
    segments_BT: Tensor | None,
    keep: int,
    cell: str,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`, then the states before and after every token, (K, B, T+1, D)."""
    rows, tokens, _, size = x_BT3D.shape
    y = x_BT3D.new_empty(rows, tokens, size)
    line = x_BT3D.new_empty(CELLS[cell].states, rows, tokens + 1, size, dtype=torch.float32)
    line[:, :, 0] = 0 if state_BKD is None else state_BKD.transpose(0, 1)
    launch(
        _forward, (rows * triton.cdiv(size, BLOCK),), x_BT3D.contiguous(), weight_ND.contiguous(), kinds(segments_BT),
        y, line, line[0].numel(), tokens, iterations or ROWS, size, BLOCK, ROWS, cell == "lstm", num_warps=4,
    )  # fmt: skip
    moments = line[:, :, tokens - keep :]
    return y, (moments if keep else moments[:, :, 0]).movedim(0, -2).contiguous(), line


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    x_BT3D, weight_ND, state_BKD, segments_BT, keep, cell, _ = args
    rows, tokens, _, size = x_BT3D.shape
    x, weight, line = x_BT3D.contiguous(), weight_ND.contiguous(), outputs[0]
    dx = torch.empty_like(x)
    dweight = x.new_empty(rows, *weight.shape, dtype=torch.float32)
    dstate = x.new_empty(rows, line.shape[0], size, dtype=torch.float32)
    launch(
        _backward, (rows * triton.cdiv(size, BLOCK),), x, weight, kinds(segments_BT), line, line[0].numel(),
        grads[0].contiguous(), grads[1].contiguous(), dx, dweight, dstate, tokens, keep,
        size, BLOCK, ROWS, cell == "lstm", num_warps=4,
    )  # fmt: skip
    found = (dx, dweight.sum(0).to(weight.dtype), None if state_BKD is None else dstate.to(state_BKD.dtype))
    return [g for g, need in zip(found, needs, strict=False) if need]


@triton.jit
def _tanh(x):
    """By exponentials, and near 0, where those cancel, by its series."""
    y = x * x
    near = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 - y * 1382 / 155925))))
    return tl.where(y < 0.1, near, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@triton.jit
def _x(x, line, t, d, inside, K: tl.constexpr, D: tl.constexpr):
    at = ((line + t) * 3 + K)[:, None] * D + d[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _w(weight, d, K: tl.constexpr, D: tl.constexpr):
    return tl.load(weight + K * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _gru(z, r, c, a_z, a_r, a_c, h):
    """The next h, its slope by h, by z, r and c, and what a_c multiplies."""
    z, r = tl.sigmoid(a_z * h + z), tl.sigmoid(a_r * h + r)
    c = _tanh(a_c * r * h + c)
    by_z, by_c = (c - h) * z * (1 - z), z * (1 - c * c)
    by_r = by_c * a_c * h * r * (1 - r)
    return h + z * (c - h), 1 - z + a_z * by_z + a_r * by_r + a_c * r * by_c, by_z, by_r, by_c, r * h


@triton.jit
def _lstm(x_f, x_c, x_o, a_f, a_c, a_o, p_f, p_o, c, h):
    """The next c and h, and their slopes: c' by c, h, x_f, x_c; h' by c' and x_o."""
    f, g = tl.sigmoid(a_f * h + p_f * c + x_f), _tanh(a_c * h + x_c)
    by_f, by_g = (c - g) * f * (1 - f), (1 - f) * (1 - g * g)
    c_by_c, c_by_h = f + p_f * by_f, a_f * by_f + a_c * by_g
    c = g + f * (c - g)
    o, t = tl.sigmoid(a_o * h + p_o * c + x_o), _tanh(c)
    by_o = t * o * (1 - o)
    return c, o * t, c_by_c, c_by_h, by_f, by_g, o * (1 - t * t) + p_o * by_o, by_o


@triton.jit
def _pairs(a, b, c, d, x, y, a2, b2, c2, d2, x2, y2):
    """`linear` for pairs of numbers: the map [[a, b], [c, d]], (x, y)."""
    return (
        a2 * a + b2 * c, a2 * b + b2 * d, c2 * a + d2 * c, c2 * b + d2 * d, a2 * x + b2 * y + x2, c2 * x + d2 * y + y2,
    )  # fmt: skip


@triton.jit
def _pairs_before(a, b, c, d, x, y, ea, eb, ec, ed, ex, ey, a2, b2, c2, d2, x2, y2, fa, fb, fc, fd, fx, fy):
    """`linear_before` for pairs of numbers: a run's map, then that without its last."""
    return (
        a2 * a + b2 * c, a2 * b + b2 * d, c2 * a + d2 * c, c2 * b + d2 * d, a2 * x + b2 * y + x2, c2 * x + d2 * y + y2,
        fa * a + fb * c, fa * b + fb * d, fc * a + fd * c, fc * b + fd * d, fa * x + fb * y + fx, fc * x + fd * y + fy,
    )  # fmt: skip


@triton.jit
def _below(x, first, ROWS: tl.constexpr):
    """Every row moved down by one, `first` on top."""
    r = tl.arange(0, ROWS)[:, None] + tl.zeros_like(x).to(tl.int32)
    return tl.where(r == 0, first[None, :], tl.gather(x, tl.maximum(r - 1, 0), 0))


@triton.jit
def _bounded(x, bound):
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -bound), bound)


@triton.jit
def _largest(x):
    return tl.max(tl.max(tl.abs(x), 1), 0)


@triton.jit
def _forward(
    x, weight, kind, y, states, apart, tokens, rounds,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LSTM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // tl.cdiv(D, BLOCK)).to(tl.int64)
    d = (program % tl.cdiv(D, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    real_d = d < D
    line = b * tokens
    after = (b * (tokens + 1) + 1) * D  # of the first token, among the states
    none = tl.zeros((ROWS, BLOCK), tl.float32)
    w0, w1, w2 = _w(weight, d, 0, D), _w(weight, d, 1, D), _w(weight, d, 2, D)
    carry = tl.load(states + after - D + d, mask=real_d, other=0.0)
    bound = tl.maximum(1.0, tl.max(tl.abs(carry), 0))
    carry_h = carry  # of the LSTM, whose first state is c
    if LSTM:
        w3, w4 = _w(weight, d, 3, D), _w(weight, d, 4, D)
        carry_h = tl.load(states + apart + after - D + d, mask=real_d, other=0.0)
        bound = tl.maximum(bound, tl.max(tl.abs(carry_h), 0))
    r = tl.arange(0, ROWS)
    for tile in range(0, tl.cdiv(tokens, ROWS)):
        t = tile * ROWS + r.to(tl.int64)
        inside = (t < tokens)[:, None] & real_d[None, :]
        which = tl.where(t < tokens, 0, 2)[:, None]
        if kind is not None:
            which = tl.load(kind + line + t, mask=t < tokens, other=2).to(tl.int32)[:, None]
        adds = inside & (which != 2)
        x0, x1, x2 = _x(x, line, t, d, adds, 0, D), _x(x, line, t, d, adds, 1, D), _x(x, line, t, d, adds, 2, D)
        s = none + carry[None, :]
        h = none + carry_h[None, :]
        count = rounds * 0
        left = 2  # rounds after the change has become small: one more
        while (left > 0) & (count < rounds):
            s_at = tl.where(which == 1, 0.0, s)
            if LSTM:
                h_at = tl.where(which == 1, 0.0, h)
                c2, h2, c_c, c_h, _, _, h_c, by_o = _lstm(x0, x1, x2, w0, w1, w2, w3, w4, s_at, h_at)
                h_h = tl.where(which == 0, h_c * c_h + w2 * by_o, tl.where(which == 2, 1.0, 0.0))
                h_s = tl.where(which == 0, h_c * c_c, 0.0)
                c_h = tl.where(which == 0, c_h, 0.0)
                c_c = tl.where(which == 0, c_c, tl.where(which == 2, 1.0, 0.0))
                off_s = _below(tl.where(which == 2, s, c2), carry, ROWS) - s
                off_h = _below(tl.where(which == 2, h, h2), carry_h, ROWS) - h
                zero = tl.zeros_like(carry)
                _, _, _, _, e, e_h = tl.associative_scan(
                    (_below(c_c, zero, ROWS), _below(c_h, zero, ROWS), _below(h_s, zero, ROWS),
                     _below(h_h, zero, ROWS), off_s, off_h), 0, _pairs,
                )  # fmt: skip
                moved = tl.maximum(_largest(e), _largest(e_h))
                h = _bounded(h + e_h, bound)
            else:
                f, slope, _, _, _, _ = _gru(x0, x1, x2, w0, w1, w2, s_at)
                slope = tl.where(which == 0, slope, tl.where(which == 2, 1.0, 0.0))
                off = _below(tl.where(which == 2, s, f), carry, ROWS) - s
                _, e = tl.associative_scan((_below(slope, tl.zeros_like(carry), ROWS), off), 0, linear)
                moved = _largest(e)
            s = _bounded(s + e, bound)
            count += 1
            left = tl.where(moved <= 3e-5, left - 1, 2)
        s_at = tl.where(which == 1, 0.0, s)
        at = after + t[:, None] * D + d[None, :]
        if LSTM:
            h_at = tl.where(which == 1, 0.0, h)
            c2, h2, _, _, _, _, _, _ = _lstm(x0, x1, x2, w0, w1, w2, w3, w4, s_at, h_at)
            c2, h2 = tl.where(which == 2, s, c2), tl.where(which == 2, h, h2)
            tl.store(states + at, c2, mask=inside)
            tl.store(states + apart + at, h2, mask=inside)
            out = h2
            carry = tl.sum(tl.where((r == ROWS - 1)[:, None], c2, 0.0), 0)
            carry_h = tl.sum(tl.where((r == ROWS - 1)[:, None], h2, 0.0), 0)
        else:
            out, _, _, _, _, _ = _gru(x0, x1, x2, w0, w1, w2, s_at)
            out = tl.where(which == 2, s, out)
            tl.store(states + at, out, mask=inside)
            carry = tl.sum(tl.where((r == ROWS - 1)[:, None], out, 0.0), 0)
        out = tl.where(which == 2, 0.0, out)
        tl.store(y + (line + t)[:, None] * D + d[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _outside(dmoments, b, t, d, inside, tokens, keep, K: tl.constexpr, STATES: tl.constexpr, D: tl.constexpr):
    """The gradient of the state after token t as one of those returned."""
    first = tokens - keep - 1
    at = ((b * (keep + 1) + t - first) * STATES + K)[:, None] * D + d[None, :]
    return tl.load(dmoments + at, mask=inside & (t >= first)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _store_x(dx, line, t, d, value, inside, K: tl.constexpr, D: tl.constexpr):
    at = ((line + t) * 3 + K)[:, None] * D + d[None, :]
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, weight, kind, states, apart, dy, dmoments, dx, dweight, dstate, tokens, keep,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LSTM: tl.constexpr,
):  # fmt: skip
    STATES: tl.constexpr = 2 if LSTM else 1
    WEIGHTS: tl.constexpr = 5 if LSTM else 3
    program = tl.program_id(0)
    b = (program // tl.cdiv(D, BLOCK)).to(tl.int64)
    d = (program % tl.cdiv(D, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    real_d = d < D
    line = b * tokens
    before = b * (tokens + 1) * D
    one, none = tl.full((ROWS, BLOCK), 1.0, tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    w0, w1, w2 = _w(weight, d, 0, D), _w(weight, d, 1, D), _w(weight, d, 2, D)
    if LSTM:
        w3, w4 = _w(weight, d, 3, D), _w(weight, d, 4, D)
    carry = tl.zeros((BLOCK,), tl.float32)  # what the state after the tile gets from later ones
    carry_h = tl.zeros((BLOCK,), tl.float32)
    of_0 = tl.zeros((BLOCK,), tl.float32)
    of_1 = tl.zeros((BLOCK,), tl.float32)
    of_2 = tl.zeros((BLOCK,), tl.float32)
    of_3 = tl.zeros((BLOCK,), tl.float32)
    of_4 = tl.zeros((BLOCK,), tl.float32)
    r = tl.arange(0, ROWS)
    tiles = tl.cdiv(tokens, ROWS)
    for back in range(0, tiles):
        t = (tiles - 1 - back) * ROWS + r.to(tl.int64)
        inside = (t < tokens)[:, None] & real_d[None, :]
        which = tl.where(t < tokens, 0, 2)[:, None]
        if kind is not None:
            which = tl.load(kind + line + t, mask=t < tokens, other=2).to(tl.int32)[:, None]
        adds = inside & (which != 2)
        x0, x1, x2 = _x(x, line, t, d, adds, 0, D), _x(x, line, t, d, adds, 1, D), _x(x, line, t, d, adds, 2, D)
        goes = inside & (which == 0)
        stays = tl.where(which == 2, 1.0, 0.0)
        s = tl.load(states + before + t[:, None] * D + d[None, :], mask=goes, other=0.0)
        at = (line + t)[:, None] * D + d[None, :]
        g_y = tl.load(dy + at, mask=adds, other=0.0).to(tl.float32)
        g = _outside(dmoments, b, t, d, inside, tokens, keep, 0, STATES, D)
        if LSTM:
            h = tl.load(states + apart + before + t[:, None] * D + d[None, :], mask=goes, other=0.0)
            g_h = g_y + _outside(dmoments, b, t, d, inside, tokens, keep, 1, STATES, D)
            c2, _, c_c, c_h, by_f, by_g, h_c, by_o = _lstm(x0, x1, x2, w0, w1, w2, w3, w4, s, h)
            h_h = tl.where(which == 0, h_c * c_h + w2 * by_o, stays)
            h_s = tl.where(which == 0, h_c * c_c, 0.0)
            c_h = tl.where(which == 0, c_h, 0.0)
            c_c = tl.where(which == 0, c_c, stays)
            u, v = c_c * g + h_s * g_h, c_h * g + h_h * g_h
            _, _, _, _, _, _, pa, pb, pc, pd, px, py = tl.associative_scan(
                (c_c, h_s, c_h, h_h, u, v, one, none, none, one, none, none), 0, _pairs_before, reverse=True
            )
            g += pa * carry[None, :] + pb * carry_h[None, :] + px
            g_h += pc * carry[None, :] + pd * carry_h[None, :] + py
            carry = tl.sum(tl.where((r == 0)[:, None], c_c * g + h_s * g_h, 0.0), 0)
            carry_h = tl.sum(tl.where((r == 0)[:, None], c_h * g + h_h * g_h, 0.0), 0)
            whole = tl.where(adds, g + h_c * g_h, 0.0)
            d0, d1, d2 = whole * by_f, whole * by_g, tl.where(adds, g_h * by_o, 0.0)
            of_0 += tl.sum(d0 * h, 0)
            of_1 += tl.sum(d1 * h, 0)
            of_2 += tl.sum(d2 * h, 0)
            of_3 += tl.sum(d0 * s, 0)
            of_4 += tl.sum(d2 * c2, 0)
        else:
            g += g_y
            _, slope, by_0, by_1, by_2, factor = _gru(x0, x1, x2, w0, w1, w2, s)
            slope = tl.where(which == 0, slope, stays)
            _, _, p, q = tl.associative_scan((slope, slope * g, one, none), 0, linear_before, reverse=True)
            g += p * carry[None, :] + q
            carry = tl.sum(tl.where((r == 0)[:, None], slope * g, 0.0), 0)
            g = tl.where(adds, g, 0.0)
            d0, d1, d2 = g * by_0, g * by_1, g * by_2
            of_0 += tl.sum(d0 * s, 0)
            of_1 += tl.sum(d1 * s, 0)
            of_2 += tl.sum(d2 * factor, 0)
        _store_x(dx, line, t, d, d0, inside, 0, D)
        _store_x(dx, line, t, d, d1, inside, 1, D)
        _store_x(dx, line, t, d, d2, inside, 2, D)
    here = b * STATES * D + d
    if keep == tokens:
        carry += tl.load(dmoments + b * (keep + 1) * STATES * D + d, mask=real_d, other=0.0).to(tl.float32)
    tl.store(dstate + here, carry, mask=real_d)
    at_w = dweight + b * WEIGHTS * D + d
    tl.store(at_w, of_0, mask=real_d)
    tl.store(at_w + D, of_1, mask=real_d)
    tl.store(at_w + 2 * D, of_2, mask=real_d)
    if LSTM:
        if keep == tokens:
            carry_h += tl.load(dmoments + (b * (keep + 1) * STATES + 1) * D + d, mask=real_d, other=0.0).to(tl.float32)
        tl.store(dstate + here + D, carry_h, mask=real_d)
        tl.store(at_w + 3 * D, of_3, mask=real_d)
        tl.store(at_w + 4 * D, of_4, mask=real_d)
