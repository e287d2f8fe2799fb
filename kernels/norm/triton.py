"""Normalisation on a GPU: a row stays on chip, so each tensor crosses memory once.

Backward gives each program a run of rows; what it adds up for weight and bias leaves the chip once per program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.rows import tile

PROGRAMS = 512  # of backward: enough to fill a large card, few enough for the sums of weight and bias to be cheap


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, center: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference`."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    stream = x.new_empty(0) if residual is None else torch.empty_like(x)
    size = x.shape[-1]
    rows = x.numel() // max(size, 1)
    block, lines, warps = tile(size)
    launch(
        _forward, (triton.cdiv(rows, lines),), x, weight, bias, residual, y, stream, rows, eps,
        size, block, lines, center, num_warps=warps,
    )  # fmt: skip
    return y, stream


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    x, weight, bias, residual, center, eps = args
    x, dy = x.contiguous(), grads[0].contiguous()
    residual = None if residual is None else residual.contiguous()
    dstream = None if residual is None else grads[1].contiguous()
    size = x.shape[-1]
    rows = x.numel() // max(size, 1)
    block, lines, warps = tile(size)
    programs = min(PROGRAMS, triton.cdiv(rows, lines))
    dx = torch.empty_like(x)
    sums = [x.new_empty(programs, size, dtype=torch.float32) if need else None for need in needs[1:3]]
    launch(
        _backward, (programs,), x, weight, residual, dy, dstream, dx, *sums, rows, eps,
        size, block, lines, center, num_warps=warps,
    )  # fmt: skip
    dweight, dbias = (None if s is None else s.sum(0).to(p.dtype) for s, p in zip(sums, (weight, bias), strict=True))
    return [g for g, need in zip((dx, dweight, dbias, dx), needs, strict=False) if need]


@triton.jit
def _forward(
    x, weight, bias, residual, y, stream, rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    d = tl.arange(0, BLOCK)
    inside = (line < rows)[:, None] & (d < D)[None, :]
    at = line.to(tl.int64)[:, None] * D + d[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(stream.dtype.element_ty)
        tl.store(stream + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if CENTER:
        value = tl.where(inside, value - tl.sum(value, 1)[:, None] / D, 0.0)
    value *= (1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / D + eps))[:, None]
    if weight is not None:
        value *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, weight, residual, dy, dstream, dx, dweight, dbias, rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    w = tl.full((BLOCK,), 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    for block in range(program, tl.cdiv(rows, LINES), tl.num_programs(0)):
        line = block * LINES + tl.arange(0, LINES)
        inside = (line < rows)[:, None] & (d < D)[None, :]
        at = line.to(tl.int64)[:, None] * D + d[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            value = value.to(x.dtype.element_ty).to(tl.float32)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if CENTER:
            value = tl.where(inside, value - tl.sum(value, 1)[:, None] / D, 0.0)
        scale = (1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / D + eps))[:, None]
        value *= scale
        of_weight += tl.sum(g * value, 0)
        of_bias += tl.sum(g, 0)
        g *= w[None, :]
        found = g - value * (tl.sum(g * value, 1)[:, None] / D)
        if CENTER:
            found -= tl.sum(g, 1)[:, None] / D
        found *= scale
        if dstream is not None:
            found += tl.load(dstream + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, found.to(dx.dtype.element_ty), mask=inside)
    if dweight is not None:
        tl.store(dweight + program * D + d, of_weight, mask=d < D)
    if dbias is not None:
        tl.store(dbias + program * D + d, of_bias, mask=d < D)
