"""Normalisation of the last dimension, after the addition to a residual stream where there is one."""

import torch
from torch import Tensor

from kernels import check, op
from kernels.norm.chunked import chunked, grad
from kernels.norm.reference import reference


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, center: bool, eps: float
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, y.new_empty(0) if residual is None else torch.empty_like(y)


_op = op.Op("norm", reference, chunked, _fake, grad=grad)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, residual: Tensor | None = None, eps: float = 1e-6
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    x (..., D) floating point; weight (D) or None. Statistics and weight in fp32 (fp64 for fp64), result in x.dtype.
    residual: of x's shape and dtype; x + residual is what is normalised, and (y, x + residual) is returned.
    Raises ValueError or TypeError naming the argument.
    """
    return _norm("rms_norm", x, weight, None, residual, False, eps)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (arXiv 1607.06450).

    As `rms_norm`; bias (D) or None.
    """
    return _norm("layer_norm", x, weight, bias, residual, True, eps)


def _norm(name, x, weight, bias, residual, center, eps):
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError(f"{name}: x must be a tensor (..., D) of at least one dimension")
    check.floating(name, "x", x)
    size = x.shape[-1]
    for label, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check.shape(name, label, value, (size,), f"(D={size},), the last size of x")
            check.floating(name, label, value)
            check.device(name, label, value, x)
    if residual is not None:
        check.shape(name, "residual", residual, tuple(x.shape), f"{tuple(x.shape)}, the shape of x")
        check.dtype(name, "residual", residual, x.dtype)
        check.device(name, "residual", residual, x)
    if eps < 0:
        raise ValueError(f"{name}: eps={eps} must be at least 0")
    y, stream = _op(x, weight, bias, residual, center, float(eps))
    return y if residual is None else (y, stream)
