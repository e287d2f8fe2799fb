"""Rectified softmax for CPUs: whole-tensor passes, and a gradient from the input alone."""

import torch
from torch import Tensor

from kernels.softpick.reference import EPS


def chunked(x: Tensor) -> Tensor:
    """As `reference`; cannot be recorded by autograd."""
    e, norm, _ = _raised(x)
    return e.relu_().div_(norm).to(x.dtype)


def grad(args, outputs, grads, needs) -> list[Tensor]:
    """dx_i = exp(x_i - m) / (sum |e| + EPS) ([e_i > 0] g_i - sign(e_i) sum_j g_j y_j)."""
    e, norm, top = _raised(args[0])
    g = grads[0].to(e.dtype)
    mean = (g * e.relu()).sum(-1, keepdim=True).div_(norm)
    dx = torch.where(e > 0, g, 0).sub_(e.sign() * mean)
    return [dx.mul_((args[0] - top).exp_()).div_(norm).to(args[0].dtype)]


def _raised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    top = wide.amax(-1, keepdim=True).clamp_(min=0) if x.shape[-1] else wide.new_zeros(*x.shape[:-1], 1)
    low = (-top).exp()
    e = (wide - top).exp_().sub_(low)
    small = (top > 0) & (top < 1)  # only in such a row is the difference of exponentials not exact enough
    if small.any():
        e = torch.where(small, wide.expm1().mul_(low), e)
    e.masked_fill_(wide == -torch.inf, 0)
    return e, e.abs().sum(-1, keepdim=True) + EPS, top
