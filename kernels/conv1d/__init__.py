"""Causal depthwise convolution that carries its tail, the short memory in front of most recurrences."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.conv1d.chunked import chunked, grad
from kernels.conv1d.reference import reference


def _fake(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    state_BWD: Tensor | None,
    segments_BT: Tensor | None,
    silu: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    rows, _, dim = x_BTD.shape
    moments = (keep + 1,) if keep else ()
    state = x_BTD.new_empty(rows, *moments, weight_DW.shape[1] - 1, dim)
    return torch.empty_like(x_BTD, memory_format=torch.contiguous_format), state


_op = op.Op("conv1d", reference, chunked, _fake, grad=grad)


def conv1d(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = None,
    state_BWD: Tensor | None = None,
    segments_BT: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution over the last W real tokens of each token's document, zeros before its start.

    x (B, T, D), weight (D, W), bias (D) or None; activation None or "silu".
    state_BWD: (B, W-1, D), the last W-1 inputs of the carried document; None is zeros.
    segments_BT: (B, T) int64, 0 carried, n the n-th document begun in this call, -1 padding (output 0, no effect).
    Returns y (B, T, D) and the state after, (B, W-1, D), or with keep (B, keep+1, W-1, D): before the last `keep`
    columns and after each. Both in x.dtype. Raises ValueError or TypeError naming the argument.
    """
    check.shape("conv1d", "x_BTD", x_BTD, (None, None, None), "(B, T, D)")
    rows, tokens, dim = x_BTD.shape
    check.floating("conv1d", "x_BTD", x_BTD)
    check.shape("conv1d", "weight_DW", weight_DW, (dim, None), f"(D={dim}, W), D from x_BTD")
    taps = weight_DW.shape[1]
    if taps < 1:
        raise ValueError("conv1d: weight_DW must have W of at least 1")
    if bias_D is not None:
        check.shape("conv1d", "bias_D", bias_D, (dim,), f"(D={dim},), D from x_BTD")
    if state_BWD is not None:
        want = (rows, taps - 1, dim)
        check.shape("conv1d", "state_BWD", state_BWD, want, f"(B={rows}, W-1={taps - 1}, D={dim})")
    for name, value in (("weight_DW", weight_DW), ("bias_D", bias_D), ("state_BWD", state_BWD)):
        if value is not None:
            check.floating("conv1d", name, value)
            check.device("conv1d", name, value, x_BTD)
    check.segments("conv1d", segments_BT, rows, tokens)
    check.keep("conv1d", keep, tokens)
    if activation not in (None, "silu"):
        raise ValueError(f"conv1d: activation={activation!r} must be None or 'silu'")
    return _op(x_BTD, weight_DW, bias_D, state_BWD, segments_BT, activation == "silu", keep)
