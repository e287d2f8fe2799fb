"""Causal convolution with a filter as long as the sequence, under Hyena, S4's convolution form and MEGA."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.long_conv.chunked import chunked, grad
from kernels.long_conv.reference import reference


def _fake(x_BTD: Tensor, filter_DL: Tensor, skip_D: Tensor | None) -> Tensor:
    return torch.empty_like(x_BTD, memory_format=torch.contiguous_format)


_op = op.Op("long_conv", reference, chunked, _fake, grad=grad)


def long_conv(x_BTD: Tensor, filter_DL: Tensor, *, skip_D: Tensor | None = None) -> Tensor:
    """y_t = sum_j filter_j x_{t-j} + skip x_t over j = 0 .. min(t, L-1), for each channel (Hyena, arXiv 2302.10866).

    x (B, T, D), filter (D, L), any L of at least 1; skip (D) or None. All floating point.
    Returns y in x's shape and dtype, computed in fp32 (fp64 for fp64) by Fourier transforms: later inputs change
    earlier outputs by rounding, no more. Raises ValueError or TypeError naming the argument.
    """
    check.shape("long_conv", "x_BTD", x_BTD, (None, None, None), "(B, T, D)")
    check.floating("long_conv", "x_BTD", x_BTD)
    size = x_BTD.shape[2]
    check.shape("long_conv", "filter_DL", filter_DL, (size, None), f"(D={size}, L), D from x_BTD")
    if filter_DL.shape[1] < 1:
        raise ValueError("long_conv: filter_DL must have L of at least 1")
    if skip_D is not None:
        check.shape("long_conv", "skip_D", skip_D, (size,), f"(D={size},), D from x_BTD")
    for name, value in (("filter_DL", filter_DL), ("skip_D", skip_D)):
        if value is not None:
            check.floating("long_conv", name, value)
            check.device("long_conv", name, value, x_BTD)
    return _op(x_BTD, filter_DL, skip_D)
