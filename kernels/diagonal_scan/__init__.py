"""The elementwise linear recurrence under EMAs, LRU, S5 and RG-LRU."""

import math

import torch
from torch import Tensor

from kernels import check, op
from kernels.diagonal_scan.chunked import chunked
from kernels.diagonal_scan.reference import reference


def _fake(
    x_BTD: Tensor, decay: Tensor, state_BD: Tensor | None, segments_BT: Tensor | None, keep: int
) -> tuple[Tensor, Tensor]:
    rows, _, size = x_BTD.shape
    moments = (keep + 1,) if keep else ()
    state = x_BTD.new_empty(rows, *moments, size, dtype=torch.promote_types(x_BTD.dtype, torch.float32))
    return torch.empty_like(x_BTD, memory_format=torch.contiguous_format), state


_op = op.Op("diagonal_scan", reference, chunked, _fake)


def diagonal_scan(
    decay: Tensor,
    x: Tensor,
    *,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """h_t = decay_t * h_{t-1} + x_t, elementwise (LRU arXiv 2303.06349, S5 2208.04933, RG-LRU 2402.19427).

    x (B, T, ...), real or complex; decay of x's shape, or of x.shape[2:] where it does not change over time; both real
    or both complex. Any decay is allowed: nothing is divided and no logarithm is taken.
    state: (B, ...), h before the first token; None is zeros.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
    Returns h in x's shape and dtype, and the state after, (B, ...), or with keep (B, keep+1, ...): before the last
    `keep` columns and after each; fp32 at least, or complex. Raises ValueError or TypeError naming the argument.
    """
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise TypeError("diagonal_scan: x must be a tensor (B, T, ...)")
    rows, tokens, *sizes = x.shape
    if not x.is_complex():
        check.floating("diagonal_scan", "x", x)
    if not isinstance(decay, Tensor) or tuple(decay.shape) not in (tuple(x.shape), tuple(sizes)):
        raise ValueError(f"diagonal_scan: decay must be a tensor of x's shape {tuple(x.shape)} or {tuple(sizes)}")
    for name, value in (("decay", decay), ("state", state)):
        if value is None:
            continue
        if value.is_complex() != x.is_complex() or not (value.is_complex() or value.is_floating_point()):
            kind = "complex" if x.is_complex() else "real floating point"
            raise TypeError(f"diagonal_scan: {name} must be {kind}, as x is, got {value.dtype}")
        check.device("diagonal_scan", name, value, x)
    if state is not None:
        check.shape("diagonal_scan", "state", state, (rows, *sizes), f"(B, ...) = {(rows, *sizes)}")
    check.segments("diagonal_scan", segments_BT, rows, tokens)
    check.keep("diagonal_scan", keep, tokens)
    size = math.prod(sizes)
    decay = decay.reshape(*((rows, tokens) if decay.dim() == x.dim() else ()), size)
    state = None if state is None else state.reshape(rows, size)
    h, state = _op(x.reshape(rows, tokens, size), decay, state, segments_BT, keep)
    return h.view(x.shape), state.view(*state.shape[:-1], *sizes)
