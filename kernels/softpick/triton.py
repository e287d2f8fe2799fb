"""Rectified softmax on a GPU: a row stays on chip, one pass over memory each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.rows import tile
from kernels.softpick.reference import EPS


def forward(x: Tensor) -> Tensor:
    """As `reference`."""
    return _run(x, None)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    return [_run(args[0], grads[0].contiguous())]


def _run(x: Tensor, g: Tensor | None) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    rows = x.numel() // max(size, 1)
    block, lines, warps = tile(size)
    launch(_softpick, (triton.cdiv(rows, lines),), x, g, out, rows, size, block, lines, EPS, num_warps=warps)
    return out


@triton.jit
def _expm1_near_0(x):
    """exp(x) - 1 for |x| < 0.5 to the last bit or two: the exponential series."""
    series = 1.0 + x / 8
    for n in tl.static_range(7, 1, -1):
        series = 1.0 + x / n * series
    return x * series


@triton.jit
def _softpick(x, g, out, rows, N: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, EPS: tl.constexpr):
    """y where there is no gradient g of it, else the gradient of x."""
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    n = tl.arange(0, BLOCK)
    inside = (line < rows)[:, None] & (n < N)[None, :]
    at = line[:, None] * N + n[None, :]
    value = tl.load(x + at, mask=inside, other=float("-inf")).to(tl.float32)
    real = value > float("-inf")
    top = tl.maximum(tl.max(value, 1), 0.0)[:, None]
    slope = tl.where(real, tl.exp(value - top), 0.0)
    low = tl.exp(-top)
    e = tl.where(real, tl.where(tl.abs(value) < 0.5, _expm1_near_0(value) * low, slope - low), 0.0)
    norm = tl.sum(tl.abs(e), 1)[:, None] + EPS
    found = tl.maximum(e, 0.0) / norm
    if g is not None:
        d = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(d * found, 1)[:, None]
        found = tl.where(e > 0, d - mean, tl.where(e < 0, mean, 0.0)) * slope / norm
    tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)
