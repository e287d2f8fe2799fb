"""Sums, means and maxima of segments on a GPU: rows are sorted by segment once, then a program has a segment.

No two programs write one number, so a result is the same every time. Backward uses the order of forward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch

SAVED = 2


def forward(x_ED: Tensor, segments_E: Tensor, count: int, reduce: str) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`, and for `grad` the rows sorted by segment and where each segment begins."""
    ordered_E, order_E = segments_E.sort(stable=True)
    starts_N1 = torch.searchsorted(ordered_E, torch.arange(count + 1, device=segments_E.device))
    x_ED = x_ED.contiguous()
    y_ND = x_ED.new_empty(count, x_ED.shape[1])
    _run(_reduce, count, x_ED.shape[1], x_ED, order_E, starts_N1, y_ND, REDUCE=reduce)
    return y_ND, order_E, starts_N1


def fake(x_ED: Tensor, segments_E: Tensor, count: int, reduce: str) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of `forward`."""
    order_E = torch.empty_like(segments_E, memory_format=torch.contiguous_format)
    return x_ED.new_empty(count, x_ED.shape[1]), order_E, segments_E.new_empty(count + 1)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """As `chunked.grad`."""
    x_ED, _, count, reduce = args
    x_ED = x_ED.contiguous()
    dx_ED = torch.empty_like(x_ED)
    _run(_spread, count, x_ED.shape[1], x_ED, *outputs, grads[0].contiguous(), dx_ED, REDUCE=reduce)
    return [dx_ED]


def _run(kernel, count: int, size: int, *tensors, REDUCE: str) -> None:
    block = min(128, triton.next_power_of_2(max(size, 1)))
    columns = triton.cdiv(size, block)
    lines = max(4, min(32, 1024 // block))
    launch(kernel, (count * columns,), *tensors, columns, size, block, lines, REDUCE, num_warps=2)


@triton.jit
def _rows(x, order, first, end, d, D: tl.constexpr, LINES: tl.constexpr, other: tl.constexpr):
    """Some rows of a segment in fp32, where they are, and which numbers are there at all."""
    e = first + tl.arange(0, LINES)
    inside = (e < end)[:, None] & (d < D)[None, :]
    at = tl.load(order + e, mask=e < end, other=0)[:, None] * D + d[None, :]
    return tl.load(x + at, mask=inside, other=other).to(tl.float32), at, inside


@triton.jit
def _largest(x, order, start, end, d, D: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr):
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(start, end, LINES):
        value, _, _ = _rows(x, order, first, end, d, D, LINES, float("-inf"))
        most = tl.maximum(most, tl.max(value, 0))
    return most


@triton.jit
def _reduce(
    x, order, starts, y, columns, D: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, REDUCE: tl.constexpr
):  # fmt: skip
    own = (tl.program_id(0) // columns).to(tl.int64)
    d = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    start, end = tl.load(starts + own), tl.load(starts + own + 1)
    if REDUCE == "max":
        found = tl.where(start < end, _largest(x, order, start, end, d, D, BLOCK, LINES), 0.0)
    else:
        found = tl.zeros((BLOCK,), tl.float32)
        for first in range(start, end, LINES):
            value, _, _ = _rows(x, order, first, end, d, D, LINES, 0.0)
            found += tl.sum(value, 0)
        if REDUCE == "mean":
            found /= tl.maximum(end - start, 1).to(tl.float32)
    tl.store(y + own * D + d, found.to(y.dtype.element_ty), mask=d < D)


@triton.jit
def _spread(
    x, order, starts, g, dx, columns, D: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, REDUCE: tl.constexpr
):  # fmt: skip
    own = (tl.program_id(0) // columns).to(tl.int64)
    d = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    start, end = tl.load(starts + own), tl.load(starts + own + 1)
    share = tl.load(g + own * D + d, mask=d < D, other=0.0).to(tl.float32)
    most = tl.zeros((BLOCK,), tl.float32)
    if REDUCE == "mean":
        share /= tl.maximum(end - start, 1).to(tl.float32)
    if REDUCE == "max":
        most = _largest(x, order, start, end, d, D, BLOCK, LINES)
        equals = tl.zeros((BLOCK,), tl.float32)
        for first in range(start, end, LINES):
            value, _, inside = _rows(x, order, first, end, d, D, LINES, 0.0)
            equals += tl.sum(tl.where(inside & (value == most[None, :]), 1.0, 0.0), 0)
        share /= tl.maximum(equals, 1.0)
    for first in range(start, end, LINES):
        value, at, inside = _rows(x, order, first, end, d, D, LINES, 0.0)
        found = tl.broadcast_to(share[None, :], (LINES, BLOCK))
        if REDUCE == "max":
            found = tl.where(value == most[None, :], found, 0.0)
        tl.store(dx + at, found.to(dx.dtype.element_ty), mask=inside)
