"""Rotary position embedding on a GPU: x crosses memory once each way, cos and sin come from the cache for each head.

x may be a part of a packed projection: only its channels must be next to each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.rope.chunked import folded


def forward(x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
    """As `reference`."""
    return _turned(x_BTHK, cos_BTR, sin_BTR, interleaved, back=False)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    x_BTHK, cos_BTR, sin_BTR, interleaved = args
    found = [_turned(grads[0], cos_BTR, sin_BTR, interleaved, back=True)] if needs[0] else []
    if needs[1] or needs[2]:
        x, g = _dense(x_BTHK), _dense(grads[0])
        (rows, tokens, heads, _), pairs = x.shape, cos_BTR.shape[-1]
        sums = [x.new_empty(rows, tokens, pairs, dtype=torch.float32) if need else None for need in needs[1:3]]
        block = triton.next_power_of_2(max(pairs, 1))
        lines = max(1, min(16, 1024 // block))
        launch(
            _angles, (triton.cdiv(rows * tokens, lines),), x, g, *sums, rows * tokens, tokens,
            *x.stride()[:3], *g.stride()[:3], heads, pairs, block, lines, interleaved,
        )  # fmt: skip
        found += [folded(d, given) for d, given in zip(sums, args[1:3], strict=True) if d is not None]
    return found


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    x, cos, sin = _dense(x), cos.contiguous(), sin.contiguous()
    rows, tokens, heads, size = x.shape
    pairs = cos.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, rest = (triton.next_power_of_2(max(n, 1)) for n in (pairs, size - 2 * pairs))
    lines = max(1, min(64, 2048 // max(block, rest)))
    launch(
        _turn, (triton.cdiv(rows * tokens * heads, lines),), x, cos, sin, y, rows * tokens * heads, tokens, heads,
        *x.stride()[:3], 0 if len(cos) == 1 else tokens * pairs, 0 if len(sin) == 1 else tokens * pairs,
        size, pairs, block, rest, lines, interleaved, back,
    )  # fmt: skip
    return y


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _load(x, at, r, inside, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both channels of each pair, as fp32: `at` (LINES) begins a head, r (BLOCK) are the pairs."""
    if INTERLEAVED:
        both = at[:, None, None] + 2 * r[None, :, None] + tl.arange(0, 2)[None, None, :]
        first, second = tl.split(tl.load(x + both, mask=inside[:, :, None], other=0.0).to(tl.float32))
    else:
        first = tl.load(x + at[:, None] + r[None, :], mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + at[:, None] + R + r[None, :], mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _turn(
    x, cos, sin, y, count, T, H, row_stride, token_stride, head_stride, cos_stride, sin_stride,
    K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, LINES: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    token, row = (line // H) % T, line // H // T
    at = row * row_stride + token * token_stride + (line % H) * head_stride
    to = line * K
    r = tl.arange(0, BLOCK)
    inside = (line < count)[:, None] & (r < R)[None, :]
    first, second = _load(x, at, r, inside, R, INTERLEAVED)
    angle = (token * R)[:, None] + r[None, :]
    c = tl.load(cos + (row * cos_stride)[:, None] + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + (row * sin_stride)[:, None] + angle, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    one = (first * c - second * s).to(y.dtype.element_ty)
    two = (second * c + first * s).to(y.dtype.element_ty)
    if INTERLEAVED:
        both = to[:, None, None] + 2 * r[None, :, None] + tl.arange(0, 2)[None, None, :]
        tl.store(y + both, tl.join(one, two), mask=inside[:, :, None])
    else:
        tl.store(y + to[:, None] + r[None, :], one, mask=inside)
        tl.store(y + to[:, None] + R + r[None, :], two, mask=inside)
    if K > 2 * R:
        k = 2 * R + tl.arange(0, REST)
        inside = (line < count)[:, None] & (k < K)[None, :]
        kept = tl.load(x + at[:, None] + k[None, :], mask=inside, other=0.0)
        tl.store(y + to[:, None] + k[None, :], kept, mask=inside)


@triton.jit
def _angles(
    x, g, dcos, dsin, count, T, x_row, x_token, x_head, g_row, g_token, g_head, H,
    R: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    r = tl.arange(0, BLOCK)
    inside = (line < count)[:, None] & (r < R)[None, :]
    of_cos = tl.zeros((LINES, BLOCK), tl.float32)
    of_sin = tl.zeros((LINES, BLOCK), tl.float32)
    x_at = line // T * x_row + line % T * x_token
    g_at = line // T * g_row + line % T * g_token
    for head in range(H):
        a, b = _load(x, x_at + head * x_head, r, inside, R, INTERLEAVED)
        c, d = _load(g, g_at + head * g_head, r, inside, R, INTERLEAVED)
        of_cos += c * a + d * b
        of_sin += d * a - c * b
    to = (line * R)[:, None] + r[None, :]
    if dcos is not None:
        tl.store(dcos + to, of_cos, mask=inside)
    if dsin is not None:
        tl.store(dsin + to, of_sin, mask=inside)
