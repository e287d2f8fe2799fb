"""Sparse softmax on a GPU: a row stays on chip while its threshold is found, so nothing is sorted.

The threshold lies within 1 below the row's maximum: halvings bring it near, and where y is a power of at least 1
Newton's steps from below end it. One pass over memory each way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.rows import tile

SAVED = 1


def forward(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """As `chunked`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    t = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _run(_forward, x, y, t, alpha=alpha, HALVINGS=12 if alpha <= 2 else 28, NEWTON=6 if alpha <= 2 else 0)
    return y, t


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    x, alpha = args
    x = x.contiguous()
    dx = torch.empty_like(x)
    _run(_backward, x, outputs[0], grads[0].contiguous(), dx, alpha=alpha)
    return [dx]


def _run(kernel, x, *tensors, alpha, **meta) -> None:
    size = x.shape[-1]
    rows = x.numel() // max(size, 1)
    block, lines, warps = tile(size)
    launch(
        kernel, (triton.cdiv(rows, lines),), x, *tensors, rows, ALPHA=alpha, N=size, BLOCK=block, LINES=lines, **meta,
        num_warps=warps,
    )  # fmt: skip


@triton.jit
def _power(over, P: tl.constexpr):
    """over^P for over >= 0, P >= 0; 0^P = 0."""
    if P == 0:
        found = tl.where(over > 0, 1.0, 0.0)
    elif P == 1:
        found = over
    elif P == 2:
        found = over * over
    else:
        found = tl.where(over > 0, tl.exp2(P * tl.log2(tl.where(over > 0, over, 1.0))), 0.0)
    return found


@triton.jit
def _raised(x, rows, ALPHA: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr):
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    n = tl.arange(0, BLOCK)
    inside = (line < rows)[:, None] & (n < N)[None, :]
    at = line[:, None] * N + n[None, :]
    z = tl.load(x + at, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(z, 1)
    z = (ALPHA - 1.0) * (z - tl.where(top == float("-inf"), 0.0, top)[:, None])
    return z, line, at, inside


@triton.jit
def _forward(
    x, y, t, rows, ALPHA: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
    HALVINGS: tl.constexpr, NEWTON: tl.constexpr,
):  # fmt: skip
    z, line, at, inside = _raised(x, rows, ALPHA, N, BLOCK, LINES)
    P: tl.constexpr = 1.0 / (ALPHA - 1.0)
    low = tl.full((LINES,), -1.0, tl.float32)
    size = tl.full((), 1.0, tl.float32)
    for _ in range(HALVINGS):
        size *= 0.5
        total = tl.sum(_power(tl.maximum(z - (low + size)[:, None], 0.0), P), 1)
        low = tl.where(total >= 1.0, low + size, low)
    for _ in range(NEWTON):
        over = tl.maximum(z - low[:, None], 0.0)
        slope = _power(over, P - 1.0)
        low += (tl.sum(slope * over, 1) - 1.0) / (P * tl.maximum(tl.sum(slope, 1), 1e-30))
    found = _power(tl.maximum(z - low[:, None], 0.0), P)
    tl.store(y + at, found.to(y.dtype.element_ty), mask=inside)
    tl.store(t + line, low, mask=line < rows)


@triton.jit
def _backward(
    x, t, g, dx, rows, ALPHA: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    z, line, at, inside = _raised(x, rows, ALPHA, N, BLOCK, LINES)
    over = tl.maximum(z - tl.load(t + line, mask=line < rows, other=0.0)[:, None], 0.0)
    Q: tl.constexpr = (2.0 - ALPHA) / (ALPHA - 1.0)
    s = _power(over, Q)
    sg = s * tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(sg, 1) / tl.maximum(tl.sum(s, 1), 1e-30)
    tl.store(dx + at, (sg - s * mean[:, None]).to(dx.dtype.element_ty), mask=inside)
